"""Small embeddings folders and indexes for tests, made without an encoder and without Ray."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raytower.encoding.manifest import EmbeddingsFile, EmbeddingsManifest
from raytower.encoding.parts import write_part
from raytower.index.build import build_index
from raytower.index.config import IndexBuildConfig
from raytower.index.reader import Index
from raytower.index.tasks import Run
from raytower.storage import Location

HERE = Run()
DIM = 24


def unit_vectors(count: int, dim: int = 8, seed: int = 0) -> NDArray[np.float32]:
    vectors = np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def write_embeddings(
    folder: Path,
    ids: Sequence[str],
    vectors: NDArray[Any],
    texts: Sequence[str] | None = None,
    columns: dict[str, Any] | None = None,
    rows_per_file: int = 1_000_000,
    **manifest: Any,
) -> str:
    """An embeddings folder as the encoding job would have written it; returns its path."""
    table = pa.table(
        {
            "id": pa.array(list(ids), pa.string()),
            "text": pa.array(
                list(texts if texts is not None else [f"text of {name}" for name in ids]), pa.string()
            ),
            **(columns or {}),
        }
    )
    place = Location.of(folder)
    files = []
    for number, start in enumerate(range(0, len(ids), rows_per_file)):
        part = place / f"part-{number:08d}.parquet"
        rows = table.slice(start, rows_per_file)
        write_part(part, rows, vectors[start : start + rows_per_file], {})
        files.append(
            EmbeddingsFile(name=part.name, rows=rows.num_rows, bytes=part.size_bytes(), sha256=part.sha256())
        )
    settings: dict[str, Any] = {
        "fingerprint": "f" * 64,
        "encoder": "an-encoder",
        "dim": vectors.shape[1],
        "dtype": str(vectors.dtype),
        "normalised": True,
        "prefix": "",
        "max_length": 64,
    }
    EmbeddingsManifest(**{**settings, **manifest}, rows=len(ids), files=tuple(files)).write(place)
    return str(folder)


def build(folder: Path | str, embeddings: str, **settings: Any) -> dict[str, Any]:
    """An index over an embeddings folder, built in this process."""
    config = {"kind": "flat", **settings, "embeddings": embeddings, "output": str(folder)}
    return build_index(IndexBuildConfig.model_validate(config), run=HERE)


def clustered_vectors(rows: int, seed: int = 0, dim: int = DIM) -> np.ndarray:
    """Unit vectors around 20 centres that are the same for every seed, so that queries resemble documents."""
    centres = np.random.default_rng(1).normal(size=(20, dim))
    random = np.random.default_rng(seed)
    vectors = centres[random.integers(0, 20, rows)] + 0.6 * random.normal(size=(rows, dim))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def embeddings_of(folder: Path, vectors: np.ndarray, first: int = 0, **changes: Any) -> str:
    ids = changes.pop("ids", [f"id {row}" for row in range(first, first + len(vectors))])
    years = pa.array([2000 + first + row for row in range(len(vectors))], pa.int64())
    return write_embeddings(
        folder,
        ids,
        vectors,
        columns={"year": years, **changes.pop("columns", {})},
        rows_per_file=100,
        **changes,
    )


def brute_force(vectors: np.ndarray, queries: np.ndarray, k: int) -> list[list[str]]:
    scores = queries.astype(np.float64) @ vectors.astype(np.float64).T
    return [[f"id {row}" for row in np.argsort(-line, kind="stable")[:k]] for line in scores]


def found_ids(index: Index, queries: np.ndarray, k: int, **search: Any) -> list[list[str]]:
    hits = index.search(queries, k, **search)
    return [[document.id for document in index.documents(rows)] for rows in hits.rows]
