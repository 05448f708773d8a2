"""Measured recall: sampled vectors as queries, exact search by streaming, and the smallest parameter that suffices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raytower.encoding.manifest import EmbeddingsManifest
from raytower.index.faiss_import import import_faiss
from raytower.index.manifest import IndexManifest
from raytower.index.reader import Index
from raytower.index.vectors import sample_rows, stream_rows
from raytower.storage import Location

_NUM_QUERIES = 256
_GRIDS = {
    "hnsw": ("efSearch", (4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024)),
    "ivf": ("nprobe", (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256, 512, 1024, 4096, 16384, 65536)),
}


@dataclass(frozen=True)
class MeasuredRecall:
    """Recall@k against exact search at the chosen parameters, and the whole curve that was measured."""

    recall: float
    reached: bool
    search_parameters: dict[str, int]
    curve: tuple[dict[str, Any], ...]


def measure_recall(
    embeddings: str, index: Index, *, target: float, k: int, seed: int, num_threads: int
) -> MeasuredRecall:
    """Search sampled rows at rising parameters until the target is reached; a query's own row does not count."""
    faiss = import_faiss()
    faiss.omp_set_num_threads(num_threads)
    folder = Location.of(embeddings)
    manifest = EmbeddingsManifest.read(folder)
    own, queries = sample_rows(folder, manifest, _NUM_QUERIES, seed + 1)
    depth = min(k, manifest.rows - 1)
    if depth < 1:
        return MeasuredRecall(1.0, True, {}, ())
    exact = _without_own(exact_search(folder, manifest, queries, depth + 1), own, depth)
    offsets = np.cumsum([0, *(entry.rows for entry in index.manifest.shards)])
    curve: list[dict[str, Any]] = []
    for parameters in _settings(index.manifest):
        hits = index.search(queries, depth + 1, search_parameters=parameters)
        found = np.where(hits.shards < 0, -1, offsets[np.maximum(hits.shards, 0)] + hits.rows)
        recall = _overlap(_without_own(found, own, depth), exact)
        curve.append({**parameters, "recall": round(recall, 5)})
        if recall >= target:
            return MeasuredRecall(recall, True, parameters, tuple(curve))
    last = {name: value for name, value in curve[-1].items() if name != "recall"}
    return MeasuredRecall(float(curve[-1]["recall"]), False, last, tuple(curve))


def exact_search(
    folder: Location, manifest: EmbeddingsManifest, queries: NDArray[np.float32], k: int
) -> NDArray[np.int64]:
    """Row numbers (queries, k) of the k largest inner products over all stored vectors, best first."""
    best_scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
    best_rows = np.full((len(queries), k), -1, dtype=np.int64)
    for batch in stream_rows(folder, manifest, 0, manifest.rows):
        scores = np.concatenate([best_scores, queries @ batch.vectors.T], axis=1)
        numbers = np.arange(batch.first_row, batch.first_row + len(batch.vectors))
        rows = np.concatenate([best_rows, np.broadcast_to(numbers, (len(queries), len(numbers)))], axis=1)
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        best_scores, best_rows = np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)
    return best_rows


def _settings(manifest: IndexManifest) -> list[dict[str, int]]:
    """Parameter settings from the cheapest up; one empty setting for a kind that has none."""
    if manifest.kind == "flat":
        return [{}]
    name, grid = _GRIDS["hnsw" if manifest.kind == "hnsw" else "ivf"]
    if name == "efSearch":
        return [{name: value} for value in grid]
    nlist = manifest.parameters["nlist"]
    return [{name: value} for value in grid if value < nlist] + [{name: nlist}]


def _without_own(rows: NDArray[np.int64], own: NDArray[np.int64], depth: int) -> NDArray[np.int64]:
    kept = np.full((len(rows), depth), -1, dtype=np.int64)
    for number, (line, self_row) in enumerate(zip(rows, own, strict=True)):
        others = line[(line != self_row) & (line >= 0)][:depth]
        kept[number, : len(others)] = others
    return kept


def _overlap(found: NDArray[np.int64], exact: NDArray[np.int64]) -> float:
    pairs = zip(found, exact, strict=True)
    return float(np.mean([len(np.intersect1d(a[a >= 0], b)) / len(b) for a, b in pairs]))
