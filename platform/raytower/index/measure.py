"""Measured recall: sampled vectors as queries, exact search by streaming, the smallest parameter that suffices.

Shape legend: Q queries, D dimension, K neighbours counted, C candidates kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raytower.encoding.manifest import EmbeddingsManifest
from raytower.index.faiss_import import import_faiss
from raytower.index.kinds import Vectors, parameter_grid
from raytower.index.reader import Index
from raytower.index.vectors import sample_rows, stream_rows
from raytower.storage import Location

NUM_QUERIES = 256
# Rows that tie with the k-th neighbour are as right as it is; so many beyond k are looked at for ties.
_TIES = 32
_TIE_TOLERANCE = 1e-6
# The curve ends where recall has been within this of perfect, or has not risen over so many points.
_PERFECT = 0.9995
_LEVEL_POINTS = 6


@dataclass(frozen=True)
class HeldOut:
    """Rows taken as queries (Q,), and their vectors (Q, D)."""

    rows: NDArray[np.int64]
    vectors: Vectors


@dataclass(frozen=True)
class ExactHits:
    """Best rows of the embeddings for each query, the query's own left out: scores and rows (Q, C)."""

    scores: Vectors
    rows: NDArray[np.int64]


@dataclass(frozen=True)
class MeasuredRecall:
    """Recall@k against exact search at the chosen parameters, and the whole curve that was measured."""

    recall: float
    reached: bool
    search_parameters: dict[str, int]
    curve: tuple[dict[str, Any], ...]
    num_queries: int


def hold_out(embeddings: Location, seed: int) -> HeldOut:
    """Up to 256 random rows; another draw than the one that trained the index."""
    return HeldOut(*sample_rows(embeddings, EmbeddingsManifest.read(embeddings), NUM_QUERIES, seed + 1))


def exact_hits(embeddings: Location, start: int, end: int, queries: HeldOut, k: int) -> ExactHits:
    """The best rows in start to end (exclusive) by exact inner products, streamed."""
    best = ExactHits(np.empty((len(queries.rows), 0), np.float32), np.empty((len(queries.rows), 0), np.int64))
    for batch in stream_rows(embeddings, EmbeddingsManifest.read(embeddings), start, end):
        scores = queries.vectors @ batch.vectors.T
        rows = np.arange(batch.first_row, batch.first_row + len(batch.vectors))
        scores[queries.rows[:, None] == rows[None, :]] = -np.inf
        best = merge_exact([best, ExactHits(scores, np.broadcast_to(rows, scores.shape))], k)
    return best


def merge_exact(parts: list[ExactHits], k: int) -> ExactHits:
    """The best of several row ranges, deep enough to see what ties with the k-th."""
    scores = np.concatenate([part.scores for part in parts], axis=1)
    rows = np.concatenate([part.rows for part in parts], axis=1)
    kept = min(k + _TIES, scores.shape[1])
    top = np.argpartition(-scores, kept - 1, axis=1)[:, :kept]
    order = np.take_along_axis(top, np.argsort(-np.take_along_axis(scores, top, 1), axis=1, kind="stable"), 1)
    return ExactHits(np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1))


def measure_recall(
    index: Index, queries: HeldOut, exact: ExactHits, *, target: float, num_threads: int
) -> MeasuredRecall:
    """Search at rising parameters; choose the smallest that reaches `target`, or the largest where none does.

    k + 1 hits are asked and the query's own row is dropped.
    """
    import_faiss().omp_set_num_threads(num_threads)
    manifest = index.manifest
    k = min(manifest.recall_k, manifest.rows - 1)
    grid = parameter_grid(manifest.kind, manifest.parameters, manifest.rows, max(k, 1))
    if k < 1:
        return MeasuredRecall(1.0, True, grid[0], (), 0)
    relevant = _relevant_rows(exact, k)
    starts = np.cumsum([0, *(entry.rows for entry in manifest.shards)])
    curve: list[tuple[dict[str, int], float]] = []
    for parameters in grid:
        hits = index.search(queries.vectors, k + 1, search_parameters=parameters)
        curve.append((parameters, _recall(starts[hits.shards] + hits.rows, queries.rows, relevant, k)))
        if _ended([recall for _, recall in curve], target):
            break
    chosen = next((point for point in curve if point[1] >= target), curve[-1])
    return MeasuredRecall(
        recall=chosen[1],
        reached=chosen[1] >= target,
        search_parameters=chosen[0],
        curve=tuple(_curve_point(parameters, recall) for parameters, recall in curve),
        num_queries=len(queries.rows),
    )


def _relevant_rows(exact: ExactHits, k: int) -> list[set[int]]:
    bounds = exact.scores[:, k - 1 : k]
    kept = exact.scores >= bounds - _TIE_TOLERANCE * np.maximum(1, np.abs(bounds))
    return [set(rows[keep].tolist()) for rows, keep in zip(exact.rows, kept, strict=True)]


def _recall(found: NDArray[np.int64], own: NDArray[np.int64], relevant: list[set[int]], k: int) -> float:
    right = 0
    for line, self_row, wanted in zip(found.tolist(), own.tolist(), relevant, strict=True):
        right += len(wanted.intersection([row for row in line if row != self_row][:k]))
    return right / (k * len(relevant))


def _ended(recalls: list[float], target: float) -> bool:
    if recalls[-1] >= max(target, _PERFECT):
        return True
    return len(recalls) > _LEVEL_POINTS and recalls[-1] <= min(recalls[-1 - _LEVEL_POINTS :])


def _curve_point(parameters: dict[str, int], recall: float) -> dict[str, Any]:
    name, value = next(iter(parameters.items()), (None, None))
    return {"parameter": name, "value": value, "recall": round(recall, 5)}
