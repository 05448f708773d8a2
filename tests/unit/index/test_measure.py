"""Measured recall against its definition: equal rows are one answer, and each k has parameters of its own; no Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raytower.index.kinds import SHARDS_PROBE, Vectors
from raytower.index.measure import (
    ExactHits,
    HeldOut,
    Wanted,
    exact_hits,
    hold_out,
    measure_recall,
    measured_ks,
    merge_exact,
)

DIM = 16


@dataclass(frozen=True)
class Rows:
    """Vectors in memory from `first` on, as a source of batches."""

    vectors: Vectors
    batch: int = 50
    first: int = 0

    def stream(self) -> Iterator[tuple[np.ndarray, Vectors]]:
        for start in range(0, len(self.vectors), self.batch):
            vectors = self.vectors[start : start + self.batch]
            yield np.arange(self.first + start, self.first + start + len(vectors)), vectors

    def sample(self, count: int, seed: int) -> tuple[np.ndarray, Vectors]:
        rows = np.sort(np.random.default_rng(seed).permutation(len(self.vectors))[:count])
        return rows, self.vectors[rows]


def unit(rows: int, seed: int = 0) -> Vectors:
    vectors = np.random.default_rng(seed).normal(size=(rows, DIM))
    return np.ascontiguousarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), dtype=np.float32)


def boilerplate(distinct: int, copies: int) -> Vectors:
    """Distinct vectors, and many of one text, mixed."""
    vectors = np.concatenate([unit(distinct), np.repeat(unit(1, 1), copies, axis=0)])
    return vectors[np.random.default_rng(2).permutation(len(vectors))]


class LastFirst:
    """An exact search that breaks ties by the largest row, and finds only rows below a share of all."""

    def __init__(self, vectors: Vectors) -> None:
        self.vectors = vectors

    def __call__(self, vectors: Vectors, k: int, parameters: Mapping[str, int]) -> np.ndarray:
        scores = vectors @ self.vectors.T
        scores[:, parameters["nprobe"] * len(self.vectors) // 10 :] = -2
        order = np.lexsort((-np.arange(len(self.vectors))[None, :].repeat(len(vectors), 0), -scores), axis=1)
        return np.where(np.take_along_axis(scores, order, 1) == -2, -1, order)[:, :k]


def grid(k: int) -> list[dict[str, int]]:
    return [{"nprobe": value} for value in (2, 5, 9, 10)]


def exact(vectors: Vectors, queries: HeldOut, k: int) -> ExactHits:
    rows: Any = Rows(vectors)
    return exact_hits(rows, Wanted(queries, k))


def held_out(vectors: Vectors) -> HeldOut:
    rows: Any = Rows(vectors)
    return hold_out(rows, 0)


def found_of_all(vectors: Vectors, queries: HeldOut, fetch: Callable[[Any], Vectors]) -> Any:
    """What a search that reads everything finds of ten hits."""
    return measure_recall(
        LastFirst(vectors),
        queries,
        exact(vectors, queries, 10),
        [10],
        target=1,
        grid=lambda k: [{"nprobe": 10}],
        vectors=fetch,
    )[10]


class TestEqualRows:
    @pytest.mark.parametrize(("distinct", "copies"), [(300, 400), (0, 500), (300, 43), (300, 30)])
    def test_an_exact_search_has_recall_one(self, distinct: int, copies: int) -> None:
        vectors = boilerplate(distinct, copies)
        queries = held_out(vectors)
        found = found_of_all(vectors, queries, vectors.__getitem__)
        assert (found.recall, found.reached) == (1.0, True)

    def test_wrong_rows_stay_wrong(self) -> None:
        """Copies are searched for with the vector of a copy; what is returned besides does not count."""
        vectors = boilerplate(300, 400)
        copied = np.flatnonzero((vectors == unit(1, 1)).all(axis=1))
        others = np.flatnonzero(~(vectors == unit(1, 1)).all(axis=1))
        queries = HeldOut(copied[:4], vectors[copied[:4]])

        def search(asked: Vectors, k: int, parameters: Mapping[str, int]) -> np.ndarray:
            right = parameters["nprobe"]
            line = [*copied[100 : 100 + right], *others[: k - right]]
            return np.array([line] * len(asked))

        recalls = [
            measure_recall(
                search,
                queries,
                exact(vectors, queries, 10),
                [10],
                target=1,
                grid=lambda k, right=right: [{"nprobe": right}],
                vectors=vectors.__getitem__,
            )[10].recall
            for right in (0, 3, 10)
        ]
        assert recalls == [0.0, 0.3, 1.0]

    def test_rounded_vectors_tie_as_well(self) -> None:
        """What is fetched may be in half precision, where exact scores were not."""
        vectors = boilerplate(300, 400)
        queries = held_out(vectors)
        half = vectors.astype(np.float16)
        found = found_of_all(vectors, queries, lambda rows: half[rows].astype(np.float32))
        assert found.recall == 1.0

    def test_vectors_are_fetched_only_where_all_candidates_tie(self) -> None:
        vectors = unit(500)
        queries = held_out(vectors)

        def fetch(rows: np.ndarray) -> Vectors:
            raise AssertionError(f"fetched {rows}")

        found = measure_recall(
            LastFirst(vectors), queries, exact(vectors, queries, 10), [10], target=1, grid=grid, vectors=fetch
        )[10]
        assert (found.recall, found.search_parameters) == (1.0, {"nprobe": 10})


class TestEachK:
    def test_parameters_are_chosen_at_each(self) -> None:
        """The nearest ten of each query stand among the first half of the rows, the hundred among nine tenths."""
        vectors = unit(1000)
        queries = HeldOut(np.array([0]), vectors[:1])
        order = np.argsort(-(vectors @ vectors[0]))
        # Rows 1 to 10 of the ranking to the front, up to 100 below row 900.
        near, middle, far = order[1:11], order[11:101], order[101:]
        placed = np.concatenate([order[:1], near, far[:480], middle, far[480:]])
        vectors = vectors[placed]
        queries = HeldOut(np.array([0]), vectors[:1])
        found = measure_recall(
            LastFirst(vectors), queries, exact(vectors, queries, 100), [10, 100], target=0.95, grid=grid
        )
        assert found[10].search_parameters == {"nprobe": 2}
        assert found[100].search_parameters == {"nprobe": 9}
        assert [found[k].reached for k in (10, 100)] == [True, True]
        assert [point["recall"] for point in found[100].curve] == [0.1, 0.19, 1.0]

    @pytest.mark.parametrize(
        ("k", "rows", "expected"),
        [
            (10, 1000, (10, 100)),
            (10, 50, (10, 49)),
            (100, 1000, (100,)),
            (300, 1000, (100, 300)),
            (10, 1, (1,)),
        ],
    )
    def test_at_which(self, k: int, rows: int, expected: tuple[int, ...]) -> None:
        assert measured_ks(k, rows) == expected

    def test_a_single_row(self) -> None:
        vectors = unit(1)
        queries = HeldOut(np.array([0]), vectors)
        found = measure_recall(
            LastFirst(vectors), queries, exact(vectors, queries, 1), [1], target=1, grid=grid
        )
        assert (found[1].recall, found[1].num_queries) == (1.0, 0)

    def test_real_queries_are_no_rows(self) -> None:
        """Their row is -1, and k hits of k + 1 count."""
        vectors = unit(400)
        queries = HeldOut(np.full(20, -1), unit(20, 9))
        found = measure_recall(
            LastFirst(vectors), queries, exact(vectors, queries, 10), [10], target=1, grid=grid
        )[10]
        assert found.recall == 1.0

    def test_shards_visited_are_measured_at_each_k(self) -> None:
        vectors = unit(1000)
        queries = held_out(vectors)
        whole = LastFirst(vectors)

        def search(asked: Vectors, k: int, parameters: Mapping[str, int]) -> np.ndarray:
            """Two shards are enough for ten hits, more take four."""
            enough = parameters.get(SHARDS_PROBE, 4) >= (2 if k <= 11 else 4)
            return whole(asked, k, {"nprobe": 10 if enough else 3})

        found = measure_recall(
            search, queries, exact(vectors, queries, 100), [10, 100], target=0.95, grid=grid, placed_shards=4
        )
        assert [found[k].search_parameters[SHARDS_PROBE] for k in (10, 100)] == [2, 4]
        assert [len(found[k].placement_curve) for k in (10, 100)] == [2, 4]


class TestExactHits:
    @settings(max_examples=60, deadline=None)
    @given(
        rows=st.integers(2, 400),
        k=st.integers(1, 30),
        batch=st.integers(1, 90),
        distinct=st.integers(1, 400),
        seed=st.integers(0, 99),
    )
    def test_against_one_sort_of_all(self, rows: int, k: int, batch: int, distinct: int, seed: int) -> None:
        vectors = unit(distinct, seed)[np.random.default_rng(seed).integers(0, distinct, rows)]
        queries = HeldOut(np.array([0, rows - 1]), vectors[[0, rows - 1]])
        middle = rows // 2
        halves: Any = [Rows(vectors[:middle], batch), Rows(vectors[middle:], batch, middle)]
        found = merge_exact([exact_hits(half, Wanted(queries, k)) for half in halves if len(half.vectors)], k)
        scores = queries.vectors @ vectors.T
        scores[[0, 1], queries.rows] = -np.inf
        wanted = -np.sort(-scores, axis=1)[:, : k + 32]
        np.testing.assert_allclose(found.scores, wanted, atol=1e-6)
        np.testing.assert_allclose(np.take_along_axis(scores, found.rows, 1), found.scores, atol=1e-6)
        assert all(len(set(line)) == len(line) for line in found.rows.tolist())
