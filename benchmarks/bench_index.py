"""Index: building and searching beside raw faiss and hnswlib, same vectors, same cores, same measured recall.

    python benchmarks/bench_index.py build  [--rows 100000] [--dim 256] [--repeats 3]
    python benchmarks/bench_index.py search [--rows 100000] [--dim 256] [--queries 2000] [--repeats 21] [--shards 4]
    python benchmarks/bench_index.py growth [--sizes 10000 50000 100000 400000]

build: vectors a second of training, adding and writing, with all cores, in one process on each side; ours reads an
embeddings folder, writes the table of documents and vectors, its id index and checksums besides. Then the job: 2
workers of one core beside 1 worker.
search: queries a second of a batch at the smallest efSearch that reaches a recall. Our side goes through the published
index, its loader and its merge; it walks over 8-bit codes with exact scores after, the peers over full vectors.
growth: seconds of the build job over rising sizes, and the exponent of the line through their logarithms.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import hnswlib
import numpy as np
from synthetic import Vectors, blocks_of, clustered, write_embeddings

from raytower.config import make_config
from raytower.index.build import ShardPlan, build_index, build_shards, ingest
from raytower.index.config import IndexBuildConfig
from raytower.index.embeddings import Embeddings
from raytower.index.plan import IndexRequest
from raytower.index.reader import Index
from raytower.index.tasks import Run
from raytower.runtime import ensure_ray
from raytower.storage import Location

CORES = os.cpu_count() or 1
M, EF_CONSTRUCTION = 32, 100
# Queries and an efSearch to row numbers (queries, 10).
Search = Callable[[Vectors, int], Any]
GRID = tuple(range(3, 24)) + tuple(range(24, 64, 2)) + tuple(range(64, 512, 16))
TARGETS = (0.95, 0.98, 0.99)


def main() -> None:
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--rows", type=int, default=100_000)
    shared.add_argument("--dim", type=int, default=256)
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(required=True)
    build = commands.add_parser("build", parents=[shared])
    build.add_argument("--repeats", type=int, default=3)
    build.set_defaults(run=bench_build)
    search = commands.add_parser("search", parents=[shared])
    search.add_argument("--queries", type=int, default=2000)
    search.add_argument("--repeats", type=int, default=21)
    search.add_argument("--shards", type=int, default=4)
    search.add_argument(
        "--cpu",
        action="store_true",
        help="count processor time, all sides on one thread: for a machine that others use. Threads that wait for each "
        "other count as work, which four searches a query do four times as often as one",
    )
    search.set_defaults(run=bench_search)
    growth = commands.add_parser("growth", parents=[shared])
    growth.add_argument("--sizes", type=int, nargs="+", default=[10_000, 50_000, 100_000, 400_000])
    growth.set_defaults(run=bench_growth)
    arguments = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {CORES} cores, faiss {faiss.__version__}")
    arguments.run(arguments)


# --- build ---------------------------------------------------------------------------------------------------------


def bench_build(arguments: argparse.Namespace) -> None:
    """The table of one process, then that of the job."""
    ensure_ray()  # its start is not the index's
    vectors = clustered(arguments.rows, arguments.dim)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        embeddings = write_embeddings(folder / "embeddings", blocks_of(vectors), arguments.dim)
        for kind in ("hnsw", "ivf_flat"):
            sides: dict[str, Callable[[], float]] = {
                "raw faiss": lambda: raw_build(folder, vectors, kind),  # noqa: B023
                "raytower, one shard, no Ray": lambda: our_build(folder, embeddings, kind, CORES),  # noqa: B023
            }
            if kind == "hnsw":
                sides["raw faiss over 8-bit codes and full vectors, our kind"] = lambda: raw_build(
                    folder, vectors, "our hnsw"
                )
                sides["hnswlib"] = lambda: hnswlib_build(folder, vectors)
            print_rates(kind, sides, arguments)
        for kind in ("hnsw", "ivf_flat"):
            jobs = {
                "1 worker of 1 core": lambda: job(folder, embeddings, kind, workers=1)["seconds"],  # noqa: B023
                "2 workers of 1 core": lambda: job(folder, embeddings, kind, workers=2)["seconds"],  # noqa: B023
            }
            print_rates(f"{kind}, `raytower index build`, 2 shards, all steps", jobs, arguments)


def print_rates(title: str, sides: dict[str, Callable[[], float]], arguments: argparse.Namespace) -> None:
    """Interleaved repeats; the first side is the one that ratios compare with."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(arguments.repeats):
        for name, run in sides.items():
            seconds[name].append(run())
    base = statistics.median(next(iter(seconds.values())))
    print(f"\n{title}: {arguments.rows:,} x {arguments.dim}, median of {arguments.repeats}")
    print("| way | ratio | vectors/s | lowest and highest |\n|---|---|---|---|")
    for name, values in seconds.items():
        rates = [arguments.rows / value for value in values]
        median = arguments.rows / statistics.median(values)
        ratio = base / statistics.median(values)
        print(f"| {name} | {ratio:.2f} | {median:,.0f} | {min(rates):,.0f}, {max(rates):,.0f} |")


def raw_build(folder: Path, vectors: Vectors, kind: str) -> float:
    faiss.omp_set_num_threads(CORES)
    started = time.perf_counter()
    dim = vectors.shape[1]
    if kind == "hnsw":
        index = faiss.IndexHNSWFlat(dim, M, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = EF_CONSTRUCTION
    elif kind == "our hnsw":
        index = faiss.index_factory(dim, f"HNSW{M}_SQ8,RFlat", faiss.METRIC_INNER_PRODUCT)
        faiss.downcast_index(index.base_index).hnsw.efConstruction = EF_CONSTRUCTION
    else:
        plan = IndexRequest(rows=len(vectors), dim=dim, kind="ivf_flat", shards=1).plan()
        nlist = plan.parameters["nlist"]
        index = faiss.index_factory(dim, f"IVF{nlist},Flat", faiss.METRIC_INNER_PRODUCT)
    if not index.is_trained:
        # As many training rows as the plan takes on the other side.
        wanted = IndexRequest(
            rows=len(vectors), dim=dim, kind="hnsw" if "hnsw" in kind else "ivf_flat", shards=1
        ).plan()
        index.train(vectors[np.sort(np.random.default_rng(0).permutation(len(vectors))[: wanted.train_rows])])
    index.add(vectors)
    faiss.write_index(index, str(folder / "raw.faiss"))
    return time.perf_counter() - started


def hnswlib_build(folder: Path, vectors: Vectors) -> float:
    started = time.perf_counter()
    index = hnswlib.Index(space="ip", dim=vectors.shape[1])
    index.init_index(len(vectors), ef_construction=EF_CONSTRUCTION, M=M)
    index.add_items(vectors, num_threads=CORES)
    index.save_index(str(folder / "raw.hnswlib"))
    return time.perf_counter() - started


def our_build(folder: Path, embeddings: Path, kind: Any, num_threads: int) -> float:
    """The build's own steps in this process, without measuring recall: the table with its id index, then the shard."""
    source, index = Embeddings(Location.of(embeddings)), Location.of(folder / "built")
    shutil.rmtree(folder / "built", ignore_errors=True)
    run = Run(threads=num_threads)
    started = time.perf_counter()
    plan = IndexRequest(rows=source.rows, dim=source.origin.dim, kind=kind, shards=1).plan()
    table, _ = ingest(index, source, 0, [], run)
    shards = ShardPlan(
        index=index,
        table=table,
        origin=source.origin,
        plan=plan,
        placing="rows",
        seed=0,
        made_of=source.identity(),
    )
    build_shards(shards, run)
    return time.perf_counter() - started


def job(folder: Path, embeddings: Path, kind: str, workers: int, shards: int = 2) -> dict[str, Any]:
    shutil.rmtree(folder / "index", ignore_errors=True)
    values = {
        "embeddings": str(embeddings),
        "output": str(folder / "index"),
        "kind": kind,
        "shards": shards,
        "workers": {"num": workers, "num_cpus": 1},
    }
    return build_index(make_config(IndexBuildConfig, values))


# --- search --------------------------------------------------------------------------------------------------------


def bench_search(arguments: argparse.Namespace) -> None:
    """One row a recall target, sides timed in turn."""
    threads = 1 if arguments.cpu else CORES
    vectors = clustered(arguments.rows, arguments.dim)
    queries = clustered(arguments.queries, arguments.dim, seed=1)
    flat = faiss.IndexFlatIP(arguments.dim)
    flat.add(vectors)
    exact = flat.search(queries, 10)[1]
    raw = faiss.IndexHNSWFlat(arguments.dim, M, faiss.METRIC_INNER_PRODUCT)
    raw.hnsw.efConstruction = EF_CONSTRUCTION
    raw.add(vectors)
    lib = hnswlib.Index(space="ip", dim=arguments.dim)
    lib.init_index(len(vectors), ef_construction=EF_CONSTRUCTION, M=M)
    lib.add_items(vectors, num_threads=CORES)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        embeddings = write_embeddings(folder / "embeddings", blocks_of(vectors), arguments.dim)
        one = open_built(folder / "one", embeddings, 1)
        many = open_built(folder / "many", embeddings, arguments.shards)
        sides: dict[str, Search] = {
            "raw faiss": lambda found, ef: raw.search(
                found, 10, params=faiss.SearchParametersHNSW(efSearch=ef)
            )[1],
            "raytower, 1 shard": our_search(one),
            f"raytower, {arguments.shards} shards": our_search(many),
            "hnswlib": hnswlib_search(lib, threads),
        }
        faiss.omp_set_num_threads(threads)
        print(
            f"\n{arguments.rows:,} x {arguments.dim}, {arguments.queries} queries, {threads} threads, "
            f"median of {arguments.repeats}"
        )
        print(
            "| recall@10 at least | way | ratio | queries/s | efSearch | recall |\n|---|---|---|---|---|---|"
        )
        for target in TARGETS:
            compare(sides, queries, exact, target, arguments)


def open_built(folder: Path, embeddings: Path, shards: int) -> Index:
    folder.mkdir()
    job(folder, embeddings, "hnsw", workers=CORES, shards=shards)
    return Index.open(folder / "index")


def our_search(index: Index) -> Search:
    # The rows of a fresh build are numbered as its vectors are.
    return lambda queries, ef: index.search(queries, 10, search_parameters={"efSearch": ef}).rows


def hnswlib_search(index: Any, num_threads: int) -> Search:
    def search(queries: Vectors, ef: int) -> Any:
        index.set_ef(ef)
        return index.knn_query(queries, k=10, num_threads=num_threads)[0]

    return search


def compare(
    sides: dict[str, Search], queries: Vectors, exact: Any, target: float, arguments: argparse.Namespace
) -> None:
    clock = time.process_time if arguments.cpu else time.perf_counter
    chosen = {name: smallest(side, queries, exact, target) for name, side in sides.items()}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(arguments.repeats):
        for name, side in sides.items():
            started = clock()
            side(queries, chosen[name][0])
            seconds[name].append(clock() - started)
    base = statistics.median(next(iter(seconds.values())))
    for name, values in seconds.items():
        median = statistics.median(values)
        ef, recall = chosen[name]
        print(
            f"| {target} | {name} | {base / median:.2f} | {len(queries) / median:,.0f} | {ef} | {recall:.4f} |"
        )


def smallest(search: Search, queries: Vectors, exact: Any, target: float) -> tuple[int, float]:
    for ef in GRID:
        found = search(queries, ef)
        recall = float(np.mean([len(np.intersect1d(a, b)) / 10 for a, b in zip(found, exact, strict=True)]))
        if recall >= target:
            return ef, recall
    raise SystemExit(f"no efSearch up to {GRID[-1]} reaches {target}")


# --- growth --------------------------------------------------------------------------------------------------------


def bench_growth(arguments: argparse.Namespace) -> None:
    """Seconds a size and the fitted exponent, which is 1 where cost grows as the rows do."""
    ensure_ray()
    print(f"dim {arguments.dim}, `raytower index build`, 2 workers of 1 core, 2 shards, all steps")
    print("| kind | " + " | ".join(f"{size:,} rows, s" for size in arguments.sizes) + " | exponent |")
    print("|---" * (len(arguments.sizes) + 2) + "|")
    for kind in ("hnsw", "ivf_flat"):
        seconds = []
        for size in arguments.sizes:
            with tempfile.TemporaryDirectory() as name:
                vectors = clustered(size, arguments.dim)
                embeddings = write_embeddings(Path(name) / "embeddings", blocks_of(vectors), arguments.dim)
                del vectors
                seconds.append(job(Path(name), embeddings, kind, workers=2)["seconds"])
        slope = float(np.polyfit(np.log(arguments.sizes), np.log(seconds), 1)[0])
        cells = " | ".join(f"{value:.1f}" for value in seconds)
        print(f"| {kind} | {cells} | {slope:.2f} |", flush=True)


if __name__ == "__main__":
    main()
