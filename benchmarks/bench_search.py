"""Search: two HNSW shards of raytower beside one raw faiss HNSW in one process, at equal measured recall.

    python benchmarks/bench_search.py [--rows 100000] [--dim 256] [--queries 2000] [--repeats 5]

Same vectors, same queries, same cores. Each side uses the smallest efSearch that reaches the recall on the queries;
our side goes through the published index, its loader and its merge. The raw index walks over full vectors, ours over
8-bit codes with exact scores after; what sharding alone costs shows in the last ratio, against our kind in one shard.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raytower.config import make_config
from raytower.encoding.manifest import EmbeddingsFile, EmbeddingsManifest
from raytower.index.build import build_index
from raytower.index.config import IndexBuildConfig
from raytower.index.reader import Index
from raytower.storage import Location

# Queries and an efSearch to row numbers (queries, 10).
Search = Callable[[np.ndarray, int], np.ndarray]
GRID = tuple(range(4, 64, 2)) + tuple(range(64, 512, 16))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--queries", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--shards", type=int, default=2)
    arguments = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, faiss {faiss.__version__}")
    vectors = clustered(arguments.rows + arguments.queries, arguments.dim)
    corpus, queries = vectors[: arguments.rows], vectors[arguments.rows :]
    exact = exact_rows(corpus, queries)
    raw = faiss.IndexHNSWFlat(arguments.dim, 32, faiss.METRIC_INNER_PRODUCT)
    raw.hnsw.efConstruction = 100
    raw.add(corpus)
    with tempfile.TemporaryDirectory() as folder:
        whole = build(Path(folder) / "whole", corpus, 1)
        index = build(Path(folder) / "sharded", corpus, arguments.shards)
        print(
            f"\n{arguments.rows} x {arguments.dim}, {arguments.queries} queries, median of {arguments.repeats}"
        )
        print(
            f"| recall@10 at least | ratio | ratio to one shard | raw faiss q/s (ef) | raytower q/s, "
            f"{arguments.shards} shards (ef) | 1 shard q/s (ef) | recalls |"
        )
        print("|---|---|---|---|---|---|---|")
        for target in (0.95, 0.98, 0.99):
            compare(
                [raw_search(raw), our_search(index), our_search(whole)],
                queries,
                exact,
                target,
                arguments.repeats,
            )


def raw_search(raw: faiss.IndexHNSWFlat) -> Search:
    return lambda queries, ef: raw.search(queries, 10, params=faiss.SearchParametersHNSW(efSearch=ef))[1]


def our_search(index: Index) -> Search:
    offsets = np.cumsum([0, *(entry.rows for entry in index.manifest.shards)])

    def search(queries: np.ndarray, ef: int) -> np.ndarray:
        hits = index.search(queries, 10, search_parameters={"efSearch": ef})
        return offsets[hits.shards] + hits.rows

    return search


def compare(sides: list[Search], queries: np.ndarray, exact: np.ndarray, target: float, repeats: int) -> None:
    """One row of the table: raw, ours sharded, ours in one shard, timed in turn."""
    chosen = [smallest(side, queries, exact, target) for side in sides]
    seconds: list[list[float]] = [[] for _ in sides]
    for _ in range(repeats):
        for side, (ef, _), times in zip(sides, chosen, seconds, strict=True):
            started = time.perf_counter()
            side(queries, ef)
            times.append(time.perf_counter() - started)
    raw, ours, whole = (statistics.median(times) for times in seconds)
    speeds = [
        f"{len(queries) / median:,.0f} ({ef})"
        for median, (ef, _) in zip((raw, ours, whole), chosen, strict=True)
    ]
    recalls = ", ".join(f"{recall:.4f}" for _, recall in chosen)
    print(f"| {target} | {raw / ours:.2f} | {whole / ours:.2f} | {' | '.join(speeds)} | {recalls} |")


def smallest(search: Search, queries: np.ndarray, exact: np.ndarray, target: float) -> tuple[int, float]:
    for ef in GRID:
        found = search(queries, ef)
        recall = float(np.mean([len(np.intersect1d(a, b)) / 10 for a, b in zip(found, exact, strict=True)]))
        if recall >= target:
            return ef, recall
    raise SystemExit(f"no efSearch up to {GRID[-1]} reaches {target}")


def clustered(rows: int, dim: int) -> np.ndarray:
    """Unit vectors around 1,000 centres in a space of 64 directions, as sentence embeddings roughly lie."""
    random = np.random.default_rng(0)
    basis = random.normal(size=(64, dim))
    centres = random.normal(size=(1000, 64))
    vectors = (centres[random.integers(0, 1000, rows)] + 0.7 * random.normal(size=(rows, 64))) @ basis
    vectors += 0.5 * random.normal(size=(rows, dim))
    return np.ascontiguousarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), dtype=np.float32)


def exact_rows(corpus: np.ndarray, queries: np.ndarray) -> np.ndarray:
    flat = faiss.IndexFlatIP(corpus.shape[1])
    flat.add(corpus)
    return flat.search(queries, 10)[1]


def build(folder: Path, corpus: np.ndarray, shards: int) -> Index:
    """The corpus through our own build job: an embeddings folder, two shards by Ray tasks, the verified loader."""
    (folder / "embeddings").mkdir(parents=True)
    flat = pa.FixedSizeListArray.from_arrays(pa.array(corpus.reshape(-1)), corpus.shape[1])
    names = [str(row) for row in range(len(corpus))]
    place = folder / "embeddings" / "part-00000000.parquet"
    pq.write_table(pa.table({"id": names, "text": names, "embedding": flat}), place)
    entry = EmbeddingsFile(
        name=place.name, rows=len(corpus), bytes=place.stat().st_size, sha256=Location.of(place).sha256()
    )
    EmbeddingsManifest(
        fingerprint="benchmark",
        encoder="none",
        dim=corpus.shape[1],
        dtype="float32",
        normalised=True,
        prefix="",
        max_length=1,
        rows=len(corpus),
        files=(entry,),
    ).write(Location.of(folder / "embeddings"))
    values = {"embeddings": str(folder / "embeddings"), "output": str(folder / "index"), "kind": "hnsw"}
    build_index(make_config(IndexBuildConfig, {**values, "shards": shards}))
    faiss.omp_set_num_threads(os.cpu_count() or 1)
    return Index.open(folder / "index")


if __name__ == "__main__":
    main()
