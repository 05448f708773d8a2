"""Exact search in one pass over the table, against NumPy's own sort, whatever the shards lose."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from raytower.errors import InputError
from raytower.index.change import delete_from_index
from raytower.index.change_config import IndexDeleteConfig
from raytower.index.exact import search_exact
from raytower.index.reader import Index
from tests.support.index_cases import brute_force, build, clustered_vectors, embeddings_of


def _ids(index: Index, queries: np.ndarray, k: int) -> list[list[str]]:
    return [[found.id for found in index.documents(rows)] for rows in search_exact(index, queries, k).rows]


def test_blocks_of_rows_give_what_a_sort_of_all_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors, queries = clustered_vectors(230), clustered_vectors(9, seed=3)
    build(tmp_path / "index", embeddings_of(tmp_path / "in", vectors), shards=2)
    index = Index.open(str(tmp_path / "index"))
    monkeypatch.setattr("raytower.index.exact._ROWS_AT_ONCE", 7)
    assert _ids(index, queries, 12) == brute_force(vectors, queries, 12)
    assert search_exact(index, queries, 1000).rows.shape == (9, 230)
    best = np.sort(queries.astype(np.float64) @ vectors.astype(np.float64).T, axis=1)[:, ::-1]
    assert search_exact(index, queries, 5).scores == pytest.approx(best[:, :5], abs=1e-5)
    delete_from_index(IndexDeleteConfig(index=str(tmp_path / "index"), ids=["id 3", "id 200"]))
    left = [
        [name for name in line if name not in ("id 3", "id 200")][:12]
        for line in brute_force(vectors, queries, 14)
    ]
    assert _ids(Index.open(str(tmp_path / "index")), queries, 12) == left


def test_wrong_asks_are_refused(tmp_path: Path) -> None:
    build(tmp_path / "index", embeddings_of(tmp_path / "in", clustered_vectors(20)))
    index = Index.open(str(tmp_path / "index"))
    with pytest.raises(InputError, match="k is 0"):
        search_exact(index, clustered_vectors(1), 0)
    with pytest.raises(InputError, match="shape"):
        search_exact(index, np.ones((1, 3)), 1)
