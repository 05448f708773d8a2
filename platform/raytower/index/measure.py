"""Measured recall: sampled vectors as queries, exact search by streaming, the smallest parameters that suffice.

Equal rows are one answer: a row is right where its score is that of the k-th neighbour or better, whichever of many
equal texts it is.

Shape legend: Q queries, D dimension, K neighbours counted, C candidates kept.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from raytower.index.kinds import SHARDS_PROBE, Vectors

if TYPE_CHECKING:
    from raytower.index.shard_build import TableRows

NUM_QUERIES = 256
# Recall is measured at the k that is asked for and at this one, which rerankers and evaluations take.
_DEEP_K = 100
# Rows that tie with the k-th neighbour are as right as it is; so many beyond k are looked at for ties. Where all of
# them tie there may be more, and what a search returns is scored.
_TIES = 32
# Scores of so many rows exist at once: 1 MiB for 256 queries, and a few times that while the best are picked.
_SCORED_AT_ONCE = 1_024
_TIE_TOLERANCE = 1e-5
# The curve ends where recall has been within this of perfect, or has not risen over so many points.
_PERFECT = 0.9995
_LEVEL_POINTS = 6


class Search(Protocol):
    """Rows (Q, up to k) of the embeddings, best first, at the given parameters; -1 is padding."""

    def __call__(self, vectors: Vectors, k: int, parameters: Mapping[str, int]) -> NDArray[np.int64]: ...


# Vectors (rows, D) of some rows of the embeddings.
FetchVectors = Callable[[NDArray[np.int64]], Vectors]


@dataclass(frozen=True)
class HeldOut:
    """Rows taken as queries (Q,), and their vectors (Q, D)."""

    rows: NDArray[np.int64]
    vectors: Vectors


@dataclass(frozen=True)
class Wanted:
    """Queries whose `k` best rows are looked for; `k` is the largest at which recall is measured."""

    queries: HeldOut
    k: int


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


def measured_ks(k: int, rows: int) -> tuple[int, ...]:
    """At which numbers of hits to measure an index of so many rows that is asked for k: k and 100, if it holds them."""
    return tuple(sorted({max(min(wanted, rows - 1), 1) for wanted in (k, _DEEP_K)}))


def hold_out(source: TableRows, seed: int) -> HeldOut:
    """Up to 256 random rows; another draw than the one that trained the index."""
    return HeldOut(*source.sample(NUM_QUERIES, seed + 1))


class ExactSearch:
    """The best rows for some queries by exact inner products, among vectors that are read for another purpose too."""

    def __init__(self, wanted: Wanted) -> None:
        self._wanted = wanted
        nothing = (len(wanted.queries.rows), 0)
        self.hits = ExactHits(np.empty(nothing, np.float32), np.empty(nothing, np.int64))

    def add(self, rows: NDArray[np.int64], vectors: Vectors) -> None:
        """Look through some more rows (N,) and their vectors (N, D)."""
        for start in range(0, len(rows), _SCORED_AT_ONCE):
            self._add(rows[start : start + _SCORED_AT_ONCE], vectors[start : start + _SCORED_AT_ONCE])

    def _add(self, rows: NDArray[np.int64], vectors: Vectors) -> None:
        queries, k = self._wanted.queries, self._wanted.k
        scores = queries.vectors @ vectors.T
        scores[queries.rows[:, None] == rows[None, :]] = -np.inf
        if self.hits.rows.shape[1] == k + _TIES:
            # Few rows of a later batch are among the best of any query; to sort the others takes most of the time.
            better = np.flatnonzero((scores > self.hits.scores[:, -1:]).any(axis=0))
            scores, rows = scores[:, better], rows[better]
        self.hits = merge_exact([self.hits, ExactHits(scores, np.broadcast_to(rows, scores.shape))], k)


def exact_hits(source: TableRows, wanted: Wanted) -> ExactHits:
    """The best rows of a source, streamed."""
    search = ExactSearch(wanted)
    for rows, vectors in source.stream():
        search.add(rows, vectors)
    return search.hits


def merge_exact(parts: list[ExactHits], k: int) -> ExactHits:
    """The best of several row ranges, deep enough to see what ties with the k-th."""
    scores = np.concatenate([part.scores for part in parts], axis=1)
    rows = np.concatenate([part.rows for part in parts], axis=1)
    kept = min(k + _TIES, scores.shape[1])
    top = np.argpartition(-scores, kept - 1, axis=1)[:, :kept]
    order = np.take_along_axis(top, np.argsort(-np.take_along_axis(scores, top, 1), axis=1, kind="stable"), 1)
    return ExactHits(np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1))


def measure_recall(
    search: Search,
    queries: HeldOut,
    exact: ExactHits,
    ks: Sequence[int],
    *,
    target: float,
    grid: Callable[[int], list[dict[str, int]]],
    placed_shards: int | None = None,
    vectors: FetchVectors | None = None,
) -> dict[int, MeasuredRecall]:
    """At each k: search at rising parameters, and choose the smallest that reach `target`, or the best where none do.

    k + 1 hits are asked and the query's own row is dropped. Where candidates are rescored, every k_factor has a curve
    of its own, measured until one reaches the target. An index placed by cluster is measured once more at the chosen
    parameters, over rising numbers of shards visited.

    Args:
        exact: of the same queries, at the largest k or deeper.
        grid: the search parameters to try at some k, from the cheapest up.
        placed_shards: how many shards an index placed by cluster has; None for another.
        vectors: scores rows where more rows tie than `exact` holds; without it such rows count as wrong.
    """
    found = {}
    for k in ks:
        if (
            exact.scores.shape[1] < k or np.isneginf(exact.scores[:, k - 1]).any()
        ):  # no k rows beside the query
            found[k] = MeasuredRecall(1.0, True, grid(k)[0], (), 0)
        else:
            judge = _Judge(queries, exact, k, vectors)
            found[k] = _measure_at(k, search, judge, target, grid(k), placed_shards)
    return found


def _measure_at(
    k: int,
    search: Search,
    judge: _Judge,
    target: float,
    grid: list[dict[str, int]],
    placed_shards: int | None,
) -> MeasuredRecall:
    def recall_at(parameters: dict[str, int]) -> float:
        return judge.recall(search(judge.queries.vectors, k + 1, parameters))

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
    placed = _measure_placement(placed_shards or 0, parameters, recall_at, target)
    if placed:
        chosen = next(point for point in placed if point["recall"] >= min(target, recall))
        parameters, recall = {**parameters, SHARDS_PROBE: chosen[SHARDS_PROBE]}, chosen["recall"]
    return MeasuredRecall(
        recall=recall,
        reached=recall >= target,
        search_parameters=parameters,
        curve=tuple(_curve_point(parameters, recall) for parameters, recall in curve),
        num_queries=len(judge.queries.rows),
        placement_curve=tuple(placed),
    )


def _measure_placement(
    shards: int, parameters: dict[str, int], recall_at: Callable[[dict[str, int]], float], target: float
) -> list[dict[str, Any]]:
    """Recall over the number of placed shards visited, 1 to all."""
    points = []
    for probe in range(1, shards + 1):
        recall = recall_at({**parameters, SHARDS_PROBE: probe})
        points.append({SHARDS_PROBE: probe, "share": round(probe / shards, 4), "recall": recall})
        if recall >= max(target, _PERFECT):
            break
    return points


class _Judge:
    """Counts the right rows of answers to the same queries."""

    def __init__(self, queries: HeldOut, exact: ExactHits, k: int, vectors: FetchVectors | None) -> None:
        self.queries = queries
        self._exact = exact
        self._k = k
        self._vectors = vectors
        bounds = exact.scores[:, k - 1 : k]
        right = exact.scores >= bounds - _tolerance(bounds)
        self._right = [set(rows[keep].tolist()) for rows, keep in zip(exact.rows, right, strict=True)]
        self._wrong: list[set[int]] = [set() for _ in self._right]
        self._open = right[:, -1]  # lines where rows beyond the last candidate may tie too

    def recall(self, found: NDArray[np.int64]) -> float:
        answers = [
            [row for row in line if row not in (own, -1)][: self._k]
            for line, own in zip(found.tolist(), self.queries.rows.tolist(), strict=True)
        ]
        if self._vectors is not None:
            for line in np.flatnonzero(self._open).tolist():
                unknown = set(answers[line]) - self._right[line] - self._wrong[line]
                if unknown:
                    self._score(line, sorted(unknown), self._vectors)
        right = sum(len(wanted.intersection(line)) for line, wanted in zip(answers, self._right, strict=True))
        return right / (self._k * len(answers))

    def _score(self, line: int, rows: list[int], vectors: FetchVectors) -> None:
        # Beside the k-th neighbour, scored by the same vectors: those stored may be rounded.
        bound, *scores = (
            vectors(np.array([self._exact.rows[line, self._k - 1], *rows])) @ self.queries.vectors[line]
        )
        for row, score in zip(rows, scores, strict=True):
            (self._right if score >= bound - _tolerance(bound) else self._wrong)[line].add(row)


def _tolerance(bounds: Any) -> Any:
    return _TIE_TOLERANCE * np.maximum(1, np.abs(bounds))


def _ended(recalls: list[float], target: float) -> bool:
    if recalls[-1] >= max(target, _PERFECT):
        return True
    return len(recalls) > _LEVEL_POINTS and recalls[-1] <= min(recalls[-1 - _LEVEL_POINTS :])


def _curve_point(parameters: dict[str, int], recall: float) -> dict[str, Any]:
    name = next(iter(set(parameters) - {"k_factor"}), None)
    extra = {"k_factor": parameters["k_factor"]} if "k_factor" in parameters else {}
    value = None if name is None else parameters[name]
    return {"parameter": name, "value": value, **extra, "recall": round(recall, 5)}
