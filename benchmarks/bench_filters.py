"""Filtered search: speed and recall of each way at falling selectivity, beside raw faiss with a selector.

Speeds are queries a CPU second, which other work on the machine disturbs less than the clock.

    python benchmarks/bench_filters.py [--rows 100000] [--dim 128] [--queries 256] [--batch 256] [--repeats 3]

Every index is first given the smallest search parameter that reaches recall@10 0.95 without a filter. Then the same
queries are asked under filters that let a share of the rows through, chosen by chance or by the vectors themselves
(rows that lie towards one direction, so that most queries lie where few or no rows are allowed):

    chosen    search_index, which takes one of the next two by their predicted cost
    exact     the allowed rows scored one by one (all lists with a selector where no vectors are stored)
    widely    a wider search, then the exact way for queries whose answer it does not vouch for; left out where that
              would rank more than a twentieth of all rows
    selector  raw faiss with IDSelectorBitmap at the parameters of the unfiltered search
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
from synthetic import clustered

from raytower.index import kinds
from raytower.index.allowed import AllowedRows
from raytower.index.config import BuiltKind
from raytower.index.faiss_index import fill, new_index, train

K = 10
TARGET = 0.95
SHARES = (0.5, 0.1, 0.01, 0.001, 0.0001)
# Queries (Q, D) to scores and rows (Q, K).
Search = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Subject:
    """An index under test, at the parameters of its unfiltered search."""

    name: str
    kind: BuiltKind
    index: Any
    parameters: Mapping[str, int]
    exact: np.ndarray | None

    def search(
        self, queries: np.ndarray, allowed: AllowedRows | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        return kinds.search_index(
            self.kind, self.index, queries, K, self.parameters, allowed=allowed, exact=self.exact
        )

    @property
    def way(self) -> Any:
        return kinds._way(self.kind, self.index, self.parameters, self.exact)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--queries", type=int, default=256)
    parser.add_argument("--batch", type=int, default=256, help="queries of one call")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--kinds", default="hnsw,ivf_flat,ivf_rabitq+exact,ivf_sq8,ivf_sq8+exact,ivf_pq+exact"
    )
    arguments = parser.parse_args()
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, faiss {faiss.__version__}, ",
        end="",
    )
    print(
        f"{faiss.omp_get_max_threads()} threads, {arguments.rows} x {arguments.dim}, batches of {arguments.batch}"
    )
    vectors = clustered(arguments.rows + arguments.queries, arguments.dim)
    corpus, queries = vectors[: arguments.rows], vectors[arguments.rows :]
    for name in arguments.kinds.split(","):
        subject = make_subject(name, corpus, queries)
        print(f"\n{name} {dict(subject.parameters)}, recall@{K} without a filter ", end="")
        everything = AllowedRows.of(np.ones(len(corpus), np.bool_))
        print(
            f"{recall(subject.search(queries)[1], exact_rows(corpus, queries, everything)):.3f}, ",
            end="",
        )
        seconds = timed([subject.search], queries, arguments.batch, arguments.repeats)[0]
        print(f"{len(queries) / seconds:,.0f} q/s\n")
        print("| filter | allowed | chosen q/s, recall | exact | selector | widely |")
        print("|---|---|---|---|---|---|")
        for way in ("chance", "vectors"):
            for share in SHARES:
                compare(subject, corpus, queries, make_filter(way, share, corpus), way, arguments)


def make_subject(name: str, corpus: np.ndarray, queries: np.ndarray) -> Subject:
    """The index, at the smallest parameters that reach the target without a filter."""
    kind, _, stored = name.partition("+")
    built: BuiltKind = kind  # type: ignore[assignment]
    parameters = {
        "M": 32,
        "efConstruction": 100,
        "nlist": int(4 * len(corpus) ** 0.5),
        "pq_m": corpus.shape[1] // 4,
        "nbits": 8,
    }
    index = new_index(built, corpus.shape[1], parameters)
    train(built, index, corpus)
    index = fill(built, index, [corpus], len(corpus))
    wanted = exact_rows(corpus, queries, AllowedRows.of(np.ones(len(corpus), np.bool_)))
    exact = corpus if stored else None
    subjects = [
        Subject(name, built, index, setting, exact)
        for setting in kinds.parameter_grid(built, parameters, len(corpus), K, rescored=exact is not None)
    ]
    for subject in subjects:
        if recall(subject.search(queries)[1], wanted) >= TARGET:
            return subject
    print(f"{name} does not reach recall {TARGET}; its last setting is used")
    return subjects[-1]


def make_filter(way: str, share: float, corpus: np.ndarray) -> AllowedRows:
    count = max(round(share * len(corpus)), 1)
    random = np.random.default_rng(1)
    mask = np.zeros(len(corpus), np.bool_)
    if way == "chance":
        mask[random.choice(len(corpus), count, replace=False)] = True
    else:
        mask[np.argsort(-corpus @ random.normal(size=corpus.shape[1]))[:count]] = True
    return AllowedRows.of(mask)


def compare(
    subject: Subject,
    corpus: np.ndarray,
    queries: np.ndarray,
    allowed: AllowedRows,
    way: str,
    arguments: argparse.Namespace,
) -> None:
    """One row of the table, its ways timed in turn."""
    wanted = exact_rows(corpus, queries, allowed)
    searches: list[Search] = [
        lambda part: subject.search(part, allowed),
        lambda part: exactly(subject, part, allowed),
        lambda part: with_selector(subject, part, allowed),
    ]
    if kinds._first_reach(K, allowed) <= len(corpus) / 20:  # deeper rankings take minutes
        searches.append(lambda part: widely(subject, part, allowed))
    recalls = [recall(search(queries)[1], wanted) for search in searches]
    cells = [
        f"{len(queries) / seconds:,.0f}, {found:.3f}"
        for seconds, found in zip(
            timed(searches, queries, arguments.batch, arguments.repeats), recalls, strict=True
        )
    ]
    print(f"| {way} | {allowed.count:,} | {' | '.join([*cells, '', ''][:4])} |", flush=True)


def exactly(subject: Subject, queries: np.ndarray, allowed: AllowedRows) -> tuple[np.ndarray, np.ndarray]:
    return subject.way.exactly(queries, min(K, allowed.count), allowed)


def widely(subject: Subject, queries: np.ndarray, allowed: AllowedRows) -> tuple[np.ndarray, np.ndarray]:
    """One round of a wider search, then the exact way for what it does not vouch for."""
    depth = min(K, allowed.count)
    reach = kinds._first_reach(depth, allowed)
    (scores, rows), sure = subject.way.widely(queries, depth, allowed, reach)
    if not sure.all():
        scores[~sure], rows[~sure] = exactly(subject, queries[~sure], allowed)
    return scores, rows


def with_selector(
    subject: Subject, queries: np.ndarray, allowed: AllowedRows
) -> tuple[np.ndarray, np.ndarray]:
    selector = faiss.IDSelectorBitmap(allowed.bits)
    if subject.kind == "hnsw":
        walk = faiss.SearchParametersHNSW(efSearch=max(subject.parameters["efSearch"], K), sel=selector)
        params = faiss.IndexRefineSearchParameters(k_factor=2, base_index_params=walk)
    else:
        params = faiss.SearchParametersIVF(nprobe=subject.parameters["nprobe"], sel=selector)
    return subject.index.search(queries, K, params=params)


def timed(searches: list[Search], queries: np.ndarray, batch: int, repeats: int) -> list[float]:
    """Median CPU seconds for all queries, in calls of `batch`."""
    seconds: list[list[float]] = [[] for _ in searches]
    for _ in range(repeats):
        for search, times in zip(searches, seconds, strict=True):
            started = time.process_time()
            for start in range(0, len(queries), batch):
                search(queries[start : start + batch])
            times.append(time.process_time() - started)
    return [statistics.median(times) for times in seconds]


def exact_rows(corpus: np.ndarray, queries: np.ndarray, allowed: AllowedRows) -> np.ndarray:
    """The best rows (Q, min(K, allowed rows)) by brute force."""
    scores = queries @ corpus[allowed.rows].T
    return allowed.rows[np.argsort(-scores, axis=1, kind="stable")[:, :K]]


def recall(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.mean([len(np.intersect1d(a, b)) / len(b) for a, b in zip(found, wanted, strict=True)]))


if __name__ == "__main__":
    main()
