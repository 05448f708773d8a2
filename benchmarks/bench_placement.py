"""Placement by cluster beside placement by rows: recall@10 and work a query against the share of shards visited.

    python benchmarks/bench_placement.py [--rows 50000] [--dim 64] [--shards 8,16] [--kinds flat,hnsw]
        [--embeddings DIR]

No Ray and no index on disk: each shard is one FAISS index in this process, queries visit its shards one after the
other, and their hits are merged. Queries a second are those of one core: processor time counts, not the clock, so
that other work on the machine does little harm. Recall is against exact search over all rows. The ways to place the
same vectors:

- cluster: `train_placement` on the corpus, each row on the shard of its nearest centroid;
- rows, routed: ranges of rows as they come, each with as many centroids, of a k-means over its own rows; a query
  visits by the same rule, so the difference to `cluster` is where the rows lie;
- rows, blind: the same ranges, shards drawn at random for each query, as one has to without centroids;
- one index: all rows in one index of the kind, what a single machine would do.

Queries are rows held out of the corpus; `between` queries lie halfway between two rows of different clusters.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from raytower.index.embeddings import Embeddings
from raytower.index.placement import CLUSTERS_PER_SHARD, Placement, train_placement
from raytower.storage import Location

K = 10
EF_SEARCH = 64
NUM_CENTRES = 1000
# Of each shard its row numbers and its FAISS index.
Built = list[tuple[NDArray[np.int64], Any]]


@dataclass(frozen=True)
class Data:
    """A corpus and queries for it, unit vectors."""

    name: str
    corpus: NDArray[np.float32]
    queries: NDArray[np.float32]


@dataclass(frozen=True)
class Way:
    """One placement of a corpus: the shard of each row, and the shards that each query visits."""

    name: str
    shard_of: NDArray[np.int32]
    # What visiting costs is part of the time of a search, unless it is blind.
    placement: Placement | None
    blind_order: NDArray[np.int64]

    def visit(self, queries: NDArray[np.float32], probe: int) -> NDArray[np.bool_]:
        if self.placement is not None:
            return self.placement.visit(queries, probe)
        visited = np.zeros(self.blind_order.shape, np.bool_)
        np.put_along_axis(visited, self.blind_order[:, :probe], True, axis=1)
        return visited


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--shards", default="8,16")
    parser.add_argument("--kinds", default="flat,hnsw")
    parser.add_argument("--clusters-per-shard", type=int, default=CLUSTERS_PER_SHARD)
    parser.add_argument(
        "--embeddings", help="an embeddings folder; its rows in file order are one more data set"
    )
    parser.add_argument("--only-embeddings", action="store_true", help="leave the synthetic data out")
    arguments = parser.parse_args()
    faiss.omp_set_num_threads(1)
    print(
        f"{platform.machine()}, faiss {faiss.__version__}, {arguments.queries} queries held out of the rows, "
        f"{arguments.clusters_per_shard} clusters a shard, HNSW with M 32, efConstruction 100 and efSearch "
        f"{EF_SEARCH} in each shard, median of {arguments.repeats} repeats\n"
    )
    for data in data_sets(arguments):
        for shards in (int(part) for part in arguments.shards.split(",")):
            for line in report(data, shards, arguments):
                print(line, flush=True)


def report(data: Data, shards: int, arguments: argparse.Namespace) -> Iterator[str]:
    """A table for one data set and number of shards; each cell is recall@10 and queries per second of one core."""
    ways = list(placements(data, shards, arguments.clusters_per_shard))
    probes = [probe for probe in (1, 2, 3, 4, 6, 8, 12, 16) if probe <= shards]
    sizes = np.bincount(ways[0].shard_of, minlength=shards)
    yield (
        f"## {data.name}, {len(data.corpus):,} x {data.corpus.shape[1]}, {shards} shards; largest cluster shard "
        f"{sizes.max() / sizes.mean():.2f} of the mean, smallest {sizes.min() / sizes.mean():.2f}"
    )
    yield ""
    shares = " | ".join(f"{probe} of {shards}" for probe in probes)
    yield f"| shards | placement | {shares} |"
    yield "|---" * (2 + len(probes)) + "|"
    exact = exact_rows(data)
    one = np.zeros(len(data.corpus), np.int32)
    alone = Way("one index", one, None, np.zeros((len(data.queries), 1), np.int64))
    for kind in arguments.kinds.split(","):
        whole = measure(alone, build(kind, data.corpus, one, 1), data, 1, exact, arguments.repeats)
        # The two ways by rows share their shards.
        indexes = {id(way.shard_of): build(kind, data.corpus, way.shard_of, shards) for way in ways[:2]}
        for way in ways:
            built = indexes[id(way.shard_of)]
            cells = [measure(way, built, data, probe, exact, arguments.repeats) for probe in probes]
            yield f"| {kind} | {way.name} | {' | '.join(cells)} |"
        yield f"| {kind} | one index | {(len(probes) - 1) * '| '}{whole} |"
    yield ""


def measure(way: Way, built: Built, data: Data, probe: int, exact: NDArray[np.int64], repeats: int) -> str:
    """Recall and queries per second of processor time, routing and merging included."""
    seconds = []
    for _ in range(repeats):
        started = time.process_time()
        found = search(built, way.visit(data.queries, probe), data.queries)
        seconds.append(time.process_time() - started)
    return f"{recall(found, exact):.3f}, {len(data.queries) / statistics.median(seconds):,.0f}"


def placements(data: Data, shards: int, clusters_per_shard: int) -> Iterator[Way]:
    placement = train_placement(
        data.corpus,
        shards,
        0,
        metric="cosine",
        clusters_per_shard=clusters_per_shard,
        num_threads=1,
    )
    blind = np.random.default_rng(0).permuted(np.tile(np.arange(shards), (len(data.queries), 1)), axis=1)
    yield Way("cluster", placement.assign(data.corpus), placement, blind)
    by_rows = (np.arange(len(data.corpus)) * shards // len(data.corpus)).astype(np.int32)
    own = [
        train_placement(
            data.corpus[by_rows == shard], 1, 0, metric="cosine", clusters_per_shard=clusters_per_shard
        )
        for shard in range(shards)
    ]
    counts = [len(item.centroids) for item in own]
    routed = Placement(
        np.concatenate([item.centroids for item in own]), np.repeat(np.arange(shards, dtype=np.int32), counts)
    )
    yield Way("rows, routed", by_rows, routed, blind)
    yield Way("rows, blind", by_rows, None, blind)


def build(kind: str, corpus: NDArray[np.float32], shard_of: NDArray[np.int32], shards: int) -> Built:
    built = []
    for shard in range(shards):
        rows = np.flatnonzero(shard_of == shard)
        index: Any
        if kind == "flat":
            index = faiss.IndexFlatIP(corpus.shape[1])
        else:
            index = faiss.IndexHNSWFlat(corpus.shape[1], 32, faiss.METRIC_INNER_PRODUCT)
            index.hnsw.efConstruction, index.hnsw.efSearch = 100, EF_SEARCH
        index.add(corpus[rows])
        built.append((rows, index))
    return built


def search(built: Built, visited: NDArray[np.bool_], queries: NDArray[np.float32]) -> NDArray[np.int64]:
    """The K best rows of each query over the shards that it visits, -1 where those hold fewer."""
    best_scores = np.full((len(queries), K), -np.inf, np.float32)
    best_rows = np.full((len(queries), K), -1)
    for shard, (rows, index) in enumerate(built):
        asking = np.flatnonzero(visited[:, shard])
        if not len(asking):
            continue
        scores, found = index.search(queries[asking], K)
        scores = np.concatenate([best_scores[asking], np.where(found < 0, -np.inf, scores)], axis=1)
        found = np.concatenate([best_rows[asking], np.where(found < 0, -1, rows[found])], axis=1)
        order = np.argsort(-scores, axis=1)[:, :K]
        best_scores[asking] = np.take_along_axis(scores, order, axis=1)
        best_rows[asking] = np.take_along_axis(found, order, axis=1)
    return best_rows


def recall(found: NDArray[np.int64], exact: NDArray[np.int64]) -> float:
    return float((found[:, :, None] == exact[:, None]).any(axis=1).mean())


def exact_rows(data: Data) -> NDArray[np.int64]:
    flat = faiss.IndexFlatIP(data.corpus.shape[1])
    flat.add(data.corpus)
    found: NDArray[np.int64] = flat.search(data.queries, K)[1]
    return found


def data_sets(arguments: argparse.Namespace) -> Iterator[Data]:
    if arguments.embeddings:
        yield stored(arguments.embeddings, arguments.queries)
    if arguments.only_embeddings:
        return
    rows, queries, dim = arguments.rows, arguments.queries, arguments.dim
    vectors, chosen = clustered(rows + queries, dim, zipf=0.0)
    corpus = vectors[:rows]
    yield Data("clustered", corpus, vectors[rows:])
    other = np.random.default_rng(1).permutation(rows)[:queries]
    apart = chosen[rows:] != chosen[other]
    yield Data("clustered, queries between clusters", corpus, unit(vectors[rows:] + corpus[other])[apart])
    skewed, _ = clustered(rows + queries, dim, zipf=1.0)
    yield Data("clusters of Zipf sizes", skewed[:rows], skewed[rows:])
    by_topic, of_topic = clustered(rows + queries, dim, zipf=0.0)
    yield Data(
        "clustered, corpus sorted by cluster",
        by_topic[:rows][np.argsort(of_topic[:rows], kind="stable")],
        by_topic[rows:],
    )
    even = unit(np.random.default_rng(0).normal(size=(rows + queries, dim)))
    yield Data("no clusters", even[:rows], even[rows:])


def clustered(rows: int, dim: int, *, zipf: float) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The vectors of bench_search.py, around 1,000 centres in a space of 64 directions, and the centre of each."""
    random = np.random.default_rng(0)
    basis, centres = random.normal(size=(64, dim)), random.normal(size=(NUM_CENTRES, 64))
    shares = 1 / np.arange(1, NUM_CENTRES + 1) ** zipf
    chosen = random.choice(NUM_CENTRES, rows, p=shares / shares.sum())
    vectors = (centres[chosen] + 0.7 * random.normal(size=(rows, 64))) @ basis
    return unit(vectors + 0.5 * random.normal(size=(rows, dim))), chosen


def stored(folder: str, num_queries: int) -> Data:
    """All rows of an embeddings folder in file order, as many as asked held out at random as queries."""
    source = Embeddings(Location.of(folder))
    files = range(len(source.manifest.files))
    vectors = unit(np.concatenate([part for file in files for _, part in source.stream(file)]))
    held_out = np.zeros(len(vectors), np.bool_)
    held_out[np.random.default_rng(0).permutation(len(vectors))[:num_queries]] = True
    name = f"embeddings of {Path(source.manifest.encoder).name}"
    return Data(name, vectors[~held_out], vectors[held_out])


def unit(vectors: NDArray[np.floating]) -> NDArray[np.float32]:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.ascontiguousarray(vectors / lengths, dtype=np.float32)


if __name__ == "__main__":
    main()
