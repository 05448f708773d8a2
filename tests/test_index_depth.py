"""How many hits each of several graph shards is asked for: fewer than k only where that was measured to be enough."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raytower.config import make_config
from raytower.index.reader import Index
from raytower.index.update import IndexAddConfig, add_to_index
from tests.test_index import brute_force, build, clustered_vectors, found_ids, write_embeddings

pytestmark = pytest.mark.usefixtures("ray_cluster")

K, SHARDS = 10, 4
WORKERS = {"max": 2, "num_cpus": 0.5}


def graph(folder: Path, vectors: np.ndarray, recall: float) -> tuple[Path, dict[str, Any]]:
    figures = build(
        write_embeddings(folder / "embeddings", vectors),
        folder / "index",
        kind="hnsw",
        shards=SHARDS,
        target={"recall": recall, "k": K},
    )
    return folder / "index", figures


def recall_of(index: Index, vectors: np.ndarray, queries: np.ndarray) -> float:
    expected = brute_force(vectors, queries, K)
    found = found_ids(index, queries, K)
    return float(np.mean([len(set(a) & set(b)) / K for a, b in zip(expected, found, strict=True)]))


def test_spread_documents_need_few_hits_of_each_shard(tmp_path: Path) -> None:
    vectors = clustered_vectors(2000)
    folder, figures = graph(tmp_path, vectors, 0.8)
    assert figures["recall"] >= 0.8
    index = Index.open(folder)
    assert -(-K // SHARDS) <= index.manifest.search_parameters["efSearch"] < K
    queries = clustered_vectors(200, seed=5)
    found = index.search(queries, K)
    assert (found.shards >= 0).all()
    # No shard gave more than efSearch hits.
    most = max(int((found.shards == number).sum(axis=1).max()) for number in range(SHARDS))
    assert most <= index.manifest.search_parameters["efSearch"]
    assert recall_of(index, vectors, queries) >= 0.75  # other queries than those it was measured on


def test_documents_that_lie_together_are_measured_to_need_all(tmp_path: Path) -> None:
    """Of 16 groups that are alike four stand in each shard, so the ten nearest of a document are all in one."""
    centres = np.eye(24)[np.arange(2000) // 125]
    vectors = centres + 0.1 * np.random.default_rng(2).normal(size=centres.shape)
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    folder, figures = graph(tmp_path, vectors, 0.8)
    assert figures["recall"] >= 0.8
    index = Index.open(folder)
    assert index.manifest.search_parameters["efSearch"] >= 8  # fewer could not hold 0.8 of ten
    assert recall_of(index, vectors, vectors[::10] + np.float32(1e-3)) >= 0.75


def test_added_documents_are_not_cut_off(tmp_path: Path) -> None:
    """They are all about one thing that nothing before was about: every hit comes from the shards that were added."""
    vectors = clustered_vectors(2000)
    folder, _ = graph(tmp_path, vectors, 0.8)
    target = -np.sum(vectors, axis=0)
    news = (target / np.linalg.norm(target)) + 0.02 * np.random.default_rng(3).normal(size=(30, 24))
    news = (news / np.linalg.norm(news, axis=1, keepdims=True)).astype(np.float32)
    names = [f"new {number}" for number in range(30)]
    embeddings = write_embeddings(tmp_path / "more", news, ids=names)
    values = {"index": str(folder), "embeddings": str(embeddings), "workers": WORKERS}
    add_to_index(make_config(IndexAddConfig, values))
    scores = (news @ news.T)[:5]
    expected = [[names[row] for row in np.argsort(-line, kind="stable")[:K]] for line in scores]
    assert found_ids(Index.open(folder), news[:5], K) == expected


@pytest.mark.parametrize("k", [1, 3, 11, 60, 1990, 2000, 2500])
def test_k_hits_come_back_whatever_k(built: Path, k: int) -> None:
    index = Index.open(built)
    for parameters in ({}, {"efSearch": 1}, {"efSearch": 30}):
        found = index.search(clustered_vectors(3, seed=7), k, search_parameters=parameters)
        assert found.shards.shape == (3, min(k, 2000))
        assert (found.shards >= 0).all()
        for line in zip(found.shards, found.rows, strict=True):
            assert len(set(zip(*(part.tolist() for part in line), strict=True))) == min(k, 2000)


def test_a_filter_asks_every_shard_for_k(built: Path) -> None:
    """Matching documents may all stand in one shard, here the first fifty rows."""
    index = Index.open(built)
    vectors, queries = clustered_vectors(2000), clustered_vectors(5, seed=8)
    parameters = {"efSearch": 1}
    found = index.search(queries, K, search_parameters=parameters, filter={"year": {"$lt": 2050}})
    assert (found.shards == 0).all()
    expected = [np.argsort(-line, kind="stable")[:K].tolist() for line in queries @ vectors[:50].T]
    assert found.rows.tolist() == expected


@pytest.fixture(scope="module")
def built(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return graph(tmp_path_factory.mktemp("depth"), clustered_vectors(2000), 0.8)[0]
