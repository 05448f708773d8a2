"""Measured recall: sampled vectors as queries, exact search by streaming, the smallest parameter that suffices.

Shape legend: Q queries, D dimension, K neighbours counted, C candidates kept.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raytower.index.faiss_import import import_faiss
from raytower.index.kinds import Vectors, parameter_grid
from raytower.index.reader import SHARDS_PROBE, Index
from raytower.index.shard_build import TableRows

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
    placement_curve: tuple[dict[str, Any], ...] = ()


def hold_out(source: TableRows, seed: int) -> HeldOut:
    """Up to 256 random rows; another draw than the one that trained the index."""
    return HeldOut(*source.sample(NUM_QUERIES, seed + 1))


def exact_hits(source: TableRows, queries: HeldOut, k: int) -> ExactHits:
    """The best rows of a source by exact inner products, streamed."""
    best = ExactHits(np.empty((len(queries.rows), 0), np.float32), np.empty((len(queries.rows), 0), np.int64))
    for rows, vectors in source.stream():
        scores = queries.vectors @ vectors.T
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
    """Search at rising parameters; choose the smallest that reaches `target`, or the best where none does.

    k + 1 hits are asked and the query's own row is dropped. Where candidates are rescored, every k_factor has a curve
    of its own, measured until one reaches the target. An index placed by cluster is measured once more at the chosen
    parameters, over rising numbers of shards visited.
    """
    import_faiss().omp_set_num_threads(num_threads)
    manifest = index.manifest
    k = min(manifest.recall_k, manifest.rows - 1)
    rescored = manifest.exact_dtype is not None
    grid = parameter_grid(
        manifest.kind,
        manifest.parameters,
        manifest.rows,
        max(k, 1),
        rescored=rescored,
        shards=1 if manifest.placement else len(manifest.shards),
    )
    if k < 1:
        return MeasuredRecall(1.0, True, grid[0], (), 0)
    relevant = _relevant_rows(exact, k)

    def recall_at(parameters: dict[str, int]) -> float:
        hits = index.search(queries.vectors, k + 1, search_parameters=parameters)
        return _recall(hits.rows, queries.rows, relevant, k)

    curve: list[tuple[dict[str, int], float]] = []
    for _, settings in itertools.groupby(grid, key=lambda parameters: parameters.get("k_factor")):
        line: list[float] = []
        for parameters in settings:
            line.append(recall_at(parameters))
            curve.append((parameters, line[-1]))
            if _ended(line, target):
                break
        if max(line) >= target:
            break
    reaching = next((point for point in curve if point[1] >= target), None)
    parameters, recall = reaching or max(curve, key=lambda point: point[1])
    placed = _measure_placement(index, parameters, recall_at, target)
    if placed:
        chosen = next(point for point in placed if point["recall"] >= min(target, recall))
        parameters, recall = {**parameters, SHARDS_PROBE: chosen["shards_probe"]}, chosen["recall"]
    return MeasuredRecall(
        recall=recall,
        reached=recall >= target,
        search_parameters=parameters,
        curve=tuple(_curve_point(parameters, recall) for parameters, recall in curve),
        num_queries=len(queries.rows),
        placement_curve=tuple(placed),
    )


def _measure_placement(
    index: Index, parameters: dict[str, int], recall_at: Callable[[dict[str, int]], float], target: float
) -> list[dict[str, Any]]:
    """Recall over the number of placed shards visited, 1 to all; empty for an index that is not placed by cluster."""
    placement = index.manifest.placement
    if placement is None:
        return []
    points = []
    for probe in range(1, placement.shards + 1):
        recall = recall_at({**parameters, SHARDS_PROBE: probe})
        points.append({SHARDS_PROBE: probe, "share": round(probe / placement.shards, 4), "recall": recall})
        if recall >= max(target, _PERFECT):
            break
    return points


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
    name = next(iter(set(parameters) - {"k_factor"}), None)
    extra = {"k_factor": parameters["k_factor"]} if "k_factor" in parameters else {}
    value = None if name is None else parameters[name]
    return {"parameter": name, "value": value, **extra, "recall": round(recall, 5)}
