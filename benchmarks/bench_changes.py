"""An index that changes and is filtered, beside LanceDB on the same rows: each builds its own kinds of index.

    python benchmarks/bench_changes.py STEP --work DIR [--rows 400000] [--texts corpus.tsv] [--repeats 5]

Needs the package lancedb. Steps, in this order: build (kept in DIR for the others), search, filters, texts, change,
additions. Vectors are clustered synthetic ones of --dim; documents are the lines of --texts with a number `share`
below 10,000, by chance and indexed on both sides. Both sides run in this process and take turns. Searches ask for one
query at a time and are counted by processor time, over all threads of the process, which other work on the machine
disturbs less than the clock; changes and reads are counted by the clock, medians and the least.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

# One query is answered by one thread on both sides; Lance's pool is read when it is imported.
if sys.argv[1:2] != ["build"]:
    os.environ.setdefault("LANCE_CPU_THREADS", "1")
os.environ.setdefault("LANCE_LOG", "error")

import faiss
import lancedb
import numpy as np
import pyarrow as pa
from lancedb.index import BTree, HnswSq, IvfPq
from numpy.typing import NDArray
from synthetic import Vectors, blocks_of, clustered, write_embeddings

from raytower.config import make_config
from raytower.index.build import build_index
from raytower.index.change import add_to_index, delete_from_index
from raytower.index.change_config import IndexAddConfig, IndexDeleteConfig
from raytower.index.config import IndexBuildConfig
from raytower.index.kinds import parameter_grid
from raytower.index.reader import Index
from raytower.index.tasks import Run

CORES = os.cpu_count() or 1
K = 10
TARGET = 0.95
OURS = ("hnsw", "ivf_pq")
THEIRS = {"IVF_HNSW_SQ": HnswSq, "IVF_PQ": IvfPq}
PAIRS = dict(zip(OURS, THEIRS, strict=True))
# Of 10,000 values of `share`, so many pass: 50 %, 1 % and 0.01 %.
LIMITS = (5_000, 100, 1)
# A query vector (D,) to the numbers of its hits.
Search = Callable[[Vectors], NDArray[np.int64]]


@dataclass(frozen=True)
class Side:
    """A tuned search: what it is called, at which setting, its recall without a filter."""

    name: str
    search: Callable[[Vectors, int | None], NDArray[np.int64]]
    setting: dict[str, int]
    recall: float


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("step", choices=sorted(STEPS))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=400_000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--texts", type=Path, help="a text a line; without it texts are row numbers")
    parser.add_argument("--kinds", nargs="+", choices=OURS, default=OURS, help="ours; each has its peer")
    arguments = parser.parse_args()
    print(
        f"{arguments.step}: {arguments.rows:,} rows, faiss {faiss.__version__}, lancedb {lancedb.__version__}"
    )
    STEPS[arguments.step](arguments)


# --- the two stores --------------------------------------------------------------------------------------------------


def documents(arguments: argparse.Namespace, first: int, count: int) -> pa.Table:
    """Ids, texts and shares of rows from `first` on; the same for equal numbers."""
    numbers = np.arange(first, first + count)
    texts = [f"question {number}" for number in numbers]
    if arguments.texts:
        lines = arguments.texts.read_text(encoding="utf-8").splitlines()
        texts = [lines[number % len(lines)] for number in numbers]
    shares = np.random.default_rng(first).integers(0, 10_000, count)
    return pa.table({"id": [f"q{number}" for number in numbers], "text": texts, "share": shares})


def lance_rows(table: pa.Table, vectors: Vectors) -> pa.Table:
    flat = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
    return table.append_column("vector", flat)


def pairs_of(arguments: argparse.Namespace) -> list[tuple[str, str]]:
    """Kinds of ours and theirs that stand beside each other."""
    return [(kind, PAIRS[kind]) for kind in arguments.kinds]


def our_folder(arguments: argparse.Namespace, kind: str) -> Path:
    return Path(arguments.work / f"raytower-{kind}")


def their_table(arguments: argparse.Namespace, kind: str) -> Any:
    return lancedb.connect(str(arguments.work / "lancedb")).open_table(kind)


def build(arguments: argparse.Namespace) -> None:
    """Seconds from vectors on disk or in memory to an index that answers, one run a side with all cores."""
    faiss.omp_set_num_threads(CORES)
    vectors = clustered(arguments.rows, arguments.dim)
    table = documents(arguments, 0, arguments.rows)
    embeddings = arguments.work / "embeddings"
    shutil.rmtree(embeddings, ignore_errors=True)
    write_embeddings(embeddings, blocks_of(vectors), arguments.dim, table)
    print("| raytower | seconds | LanceDB | seconds | ratio |\n|---|---|---|---|---|")
    for ours, theirs in pairs_of(arguments):
        shutil.rmtree(our_folder(arguments, ours), ignore_errors=True)
        started = time.perf_counter()
        build_index(
            make_config(
                IndexBuildConfig,
                {
                    "embeddings": str(embeddings),
                    "output": str(our_folder(arguments, ours)),
                    "kind": ours,
                    "shards": 1,
                    "indexed": ["share"],
                },
            ),
            Run(threads=CORES),
        )
        our_seconds = time.perf_counter() - started
        started = time.perf_counter()
        made = lancedb.connect(str(arguments.work / "lancedb")).create_table(
            theirs, lance_rows(table, vectors), mode="overwrite"
        )
        for column in ("id", "share"):
            made.create_index(column, config=BTree())
        made.create_index("vector", config=THEIRS[theirs](distance_type="dot"))
        their_seconds = time.perf_counter() - started
        print(
            f"| {ours} | {our_seconds:.1f} | {theirs} | {their_seconds:.1f} | {our_seconds / their_seconds:.2f} |",
            flush=True,
        )


# --- searching -------------------------------------------------------------------------------------------------------


def our_search(
    index: Index, setting: Mapping[str, int]
) -> Callable[[Vectors, int | None], NDArray[np.int64]]:
    def search(query: Vectors, limit: int | None = None) -> NDArray[np.int64]:
        condition = None if limit is None else f"share < {limit}"
        return index.search(query[None], K, search_parameters=setting, filter=condition).rows[0]

    return search


def their_search(
    table: Any, setting: Mapping[str, int]
) -> Callable[[Vectors, int | None], NDArray[np.int64]]:
    def search(query: Vectors, limit: int | None = None) -> NDArray[np.int64]:
        asked = table.search(query).distance_type("dot").limit(K).select(["id", "_distance"])
        for name, value in setting.items():
            asked = getattr(asked, name)(value)
        if limit is not None:
            asked = asked.where(f"share < {limit}", prefilter=True)
        return np.array([int(name[1:]) for name in asked.to_arrow()["id"].to_pylist()])

    return search


def tuned(arguments: argparse.Namespace, ours: str, theirs: str) -> tuple[Side, Side]:
    """Both at the cheapest setting of their grid that reaches the recall."""
    queries, exact = queries_of(arguments), exact_rows(arguments)
    index, table = Index.open(our_folder(arguments, ours)), their_table(arguments, theirs)
    manifest = index.manifest
    our_grid = parameter_grid(
        manifest.kind, manifest.parameters, manifest.rows, K, rescored=manifest.exact_dtype is not None
    )
    their_lines = (
        [
            [{**fixed, "ef": ef} for ef in (10, 12, 15, 20, 25, 30, 40, 50, 80, 120, 200, 400) if ef >= least]
            for fixed, least in (({"nprobes": 1}, K), ({"nprobes": 1, "refine_factor": 2}, 2 * K))
        ]
        if theirs == "IVF_HNSW_SQ"
        else [
            [{"refine_factor": factor, "nprobes": probes} for probes in (1, 2, 3, 5, 8, 12, 20, 30, 50)]
            for factor in (2, 5, 10, 20, 40)
        ]
    )
    our_lines = [
        list(line) for _, line in itertools.groupby(our_grid, key=lambda setting: setting.get("k_factor"))
    ]
    return (
        cheapest(f"raytower {ours}", lambda setting: our_search(index, setting), our_lines, queries, exact),
        cheapest(
            f"LanceDB {theirs}", lambda setting: their_search(table, setting), their_lines, queries, exact
        ),
    )


def cheapest(
    name: str,
    make: Callable[[dict[str, int]], Any],
    lines: Sequence[Sequence[dict[str, int]]],
    queries: Vectors,
    exact: Any,
) -> Side:
    """On each line of rising settings the first that reaches the recall; of those the one of least processor time."""
    reached = []
    for line in lines:
        for setting in line:
            search = make(setting)
            found = recall([search(query) for query in queries], exact)
            if found >= TARGET:
                reached.append(Side(name, search, setting, found))
                break
    if not reached:
        raise SystemExit(f"{name} does not reach recall {TARGET}")
    seconds = cpu_seconds([side.search for side in reached], queries, 3)
    return reached[int(np.argmin(seconds))]


def search(arguments: argparse.Namespace) -> None:
    """Queries a CPU second at the recall, one query a call."""
    queries = queries_of(arguments)
    print("| way | ratio | queries/CPU s | setting | recall@10 |\n|---|---|---|---|---|")
    for ours, theirs in pairs_of(arguments):
        faiss.omp_set_num_threads(1)
        sides = tuned(arguments, ours, theirs)
        seconds = cpu_seconds([side.search for side in sides], queries, arguments.repeats)
        for side, taken in zip(sides, seconds, strict=True):
            rate, ratio = len(queries) / taken, seconds[1] / taken
            print(
                f"| {side.name} | {ratio:.2f} | {rate:,.0f} | {side.setting} | {side.recall:.4f} |",
                flush=True,
            )


def filters(arguments: argparse.Namespace) -> None:
    """The settings of the unfiltered search, under filters on an indexed column."""
    queries = queries_of(arguments)
    print(
        "| allowed | way | ratio | queries/CPU s | first query, ms | recall@10 |\n|---|---|---|---|---|---|"
    )
    for ours, theirs in pairs_of(arguments):
        faiss.omp_set_num_threads(1)
        sides = tuned(arguments, ours, theirs)
        for limit in LIMITS:
            wanted = exact_rows(arguments, limit)
            asked = [lambda query, side=side: side.search(query, limit) for side in sides]  # noqa: B023
            first = [clock(lambda ask=ask: ask(queries[0])) for ask in asked]
            recalls = [recall([ask(query) for query in queries], wanted) for ask in asked]
            seconds = cpu_seconds(asked, queries, arguments.repeats)
            for side, start, found, taken in zip(sides, first, recalls, seconds, strict=True):
                print(
                    f"| {limit / 100} % | {side.name} | {seconds[1] / taken:.2f} | {len(queries) / taken:,.0f} | "
                    f"{start * 1000:.1f} | {found:.4f} |",
                    flush=True,
                )


def texts(arguments: argparse.Namespace) -> None:
    """Milliseconds by the clock to read the documents of so many hits."""
    index = Index.open(our_folder(arguments, "hnsw"))
    table = their_table(arguments, "IVF_HNSW_SQ").to_lance()
    random = np.random.default_rng(0)
    print("| hits | way | ratio | ms | least |\n|---|---|---|---|---|")
    for count in (10, 100):
        rows = [random.choice(arguments.rows, count, replace=False) for _ in range(20 * arguments.repeats)]
        ours = [clock(lambda rows=part: index.documents(rows)) for part in rows]
        theirs = [
            clock(lambda rows=part: table.take(rows.tolist(), columns=["id", "text", "share"]).to_pylist())
            for part in rows
        ]
        print_clock(str(count), {"raytower": ours, "Lance's take by place": theirs})


# --- changing --------------------------------------------------------------------------------------------------------


def change(arguments: argparse.Namespace) -> None:
    """Seconds of one change and the version that holds it, on copies of both stores; sides take turns."""
    index, table = copies(arguments)
    next_id = arguments.rows
    print("| change | way | ratio | ms | least |\n|---|---|---|---|---|")
    for count in (1, 1_000):
        seconds: dict[str, dict[str, list[float]]] = {
            name: {"raytower": [], "LanceDB": []} for name in ("add", "upsert", "delete")
        }
        for _ in range(arguments.repeats):
            values: dict[str, Any]
            for name in ("add", "upsert"):
                first = next_id if name == "add" else next_id - count
                rows, vectors = (
                    documents(arguments, first, count),
                    clustered(count, arguments.dim, seed=time.time_ns()),
                )
                folder = embeddings_of(arguments, rows, vectors)
                values = {"index": str(index), "embeddings": str(folder), "upsert": name == "upsert"}
                seconds[name]["raytower"].append(
                    clock(lambda: add_to_index(make_config(IndexAddConfig, values)))  # noqa: B023
                )
                data = lance_rows(rows, vectors)
                seconds[name]["LanceDB"].append(
                    clock(lambda: table.add(data) if name == "add" else upsert(table, data))  # noqa: B023
                )
                next_id = first + count
            ids = [f"q{number}" for number in range(next_id - count, next_id)]
            values = {"index": str(index), "ids": ids}
            seconds["delete"]["raytower"].append(
                clock(lambda: delete_from_index(make_config(IndexDeleteConfig, values)))  # noqa: B023
            )
            listed = ", ".join(f"'{name}'" for name in ids)
            seconds["delete"]["LanceDB"].append(clock(lambda: table.delete(f"id IN ({listed})")))  # noqa: B023
        for name, sides in seconds.items():
            print_clock(f"{name} {count:,}", sides)
    print_clock("delete 1, a new process after its imports", {"raytower": [fresh_delete(index, 0)]})


def upsert(table: Any, data: pa.Table) -> None:
    table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all().execute(data)


def fresh_delete(index: Path, row: int) -> float:
    code = (
        "import time; from raytower.index.change import *\n"
        "from raytower.config import make_config\n"
        "started = time.perf_counter()\n"
        f"delete_from_index(make_config(IndexDeleteConfig, {{'index': {str(index)!r}, 'ids': ['q{row}']}}))\n"
        "print(time.perf_counter() - started)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def additions(arguments: argparse.Namespace) -> None:
    """Search after 30 additions of 100 and of 1,000 rows, beside the same index before them."""
    queries = queries_of(arguments)
    faiss.omp_set_num_threads(1)
    print("| additions | way | cost beside the index before them | shards |\n|---|---|---|---|")
    sides = tuned(arguments, *pairs_of(arguments)[0])
    for count in (100, 1_000):
        index, table = copies(arguments)
        for number in range(30):
            rows = documents(arguments, arguments.rows + number * count, count)
            vectors = clustered(count, arguments.dim, seed=100 + number)
            folder = embeddings_of(arguments, rows, vectors)
            add_to_index(make_config(IndexAddConfig, {"index": str(index), "embeddings": str(folder)}))
            table.add(lance_rows(rows, vectors))
        opened = Index.open(index)
        after = [our_search(opened, sides[0].setting), their_search(table, sides[1].setting)]
        started = time.perf_counter()
        searches = [
            search for pair in zip((side.search for side in sides), after, strict=True) for search in pair
        ]
        ours, ours_after, theirs, theirs_after = cpu_seconds(searches, queries, arguments.repeats)
        print(f"| 30 of {count:,} | raytower | {ours_after / ours:.2f} | {len(opened.shards)} |")
        print(f"| 30 of {count:,} | LanceDB, before optimize | {theirs_after / theirs:.2f} | |", flush=True)
        started = time.perf_counter()
        table.optimize(cleanup_older_than=timedelta(0))
        optimised = time.perf_counter() - started
        theirs, theirs_after = cpu_seconds([sides[1].search, after[1]], queries, arguments.repeats)
        print(
            f"| 30 of {count:,} | LanceDB, after optimize ({optimised:.1f} s) | {theirs_after / theirs:.2f} | |",
            flush=True,
        )


def copies(arguments: argparse.Namespace) -> tuple[Path, Any]:
    """Both stores with graphs, to be changed."""
    ours, theirs = arguments.work / "changed-raytower", arguments.work / "changed-lancedb"
    for old, new in ((our_folder(arguments, "hnsw"), ours), (arguments.work / "lancedb", theirs)):
        shutil.rmtree(new, ignore_errors=True)
        shutil.copytree(old, new)
    return ours, lancedb.connect(str(theirs)).open_table("IVF_HNSW_SQ")


def embeddings_of(arguments: argparse.Namespace, rows: pa.Table, vectors: Vectors) -> Path:
    folder = arguments.work / "addition"
    shutil.rmtree(folder, ignore_errors=True)
    return write_embeddings(folder, blocks_of(vectors), arguments.dim, rows)


# --- measuring -------------------------------------------------------------------------------------------------------


def queries_of(arguments: argparse.Namespace) -> Vectors:
    return clustered(arguments.queries, arguments.dim, seed=1)


def exact_rows(arguments: argparse.Namespace, limit: int | None = None) -> list[NDArray[np.int64]]:
    """The best rows of each query by brute force among those that a filter lets through."""
    vectors = clustered(arguments.rows, arguments.dim)
    rows = np.arange(arguments.rows)
    if limit is not None:
        rows = np.flatnonzero(documents(arguments, 0, arguments.rows)["share"].to_numpy() < limit)
    faiss.omp_set_num_threads(CORES)
    found = faiss.knn(
        queries_of(arguments), vectors[rows], min(K, len(rows)), metric=faiss.METRIC_INNER_PRODUCT
    )[1]
    faiss.omp_set_num_threads(1)
    return list(rows[found])


def recall(found: Sequence[Any], wanted: Sequence[Any]) -> float:
    return float(
        np.mean([len(np.intersect1d(a, b)) / max(len(b), 1) for a, b in zip(found, wanted, strict=True)])
    )


def clock(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def cpu_seconds(searches: Sequence[Any], queries: Vectors, repeats: int) -> list[float]:
    """Median processor seconds for all queries, one a call; the ways take turns."""
    seconds: list[list[float]] = [[] for _ in searches]
    for _ in range(repeats):
        for search, taken in zip(searches, seconds, strict=True):
            started = time.process_time()
            for query in queries:
                search(query)
            taken.append(time.process_time() - started)
    return [statistics.median(taken) for taken in seconds]


def print_clock(title: str, sides: Mapping[str, Sequence[float]]) -> None:
    """A row a side; ratios are to the first."""
    base = statistics.median(next(iter(sides.values())))
    for name, seconds in sides.items():
        median = statistics.median(seconds)
        print(
            f"| {title} | {name} | {median / base:.2f} | {median * 1000:.1f} | {min(seconds) * 1000:.1f} |",
            flush=True,
        )


STEPS: dict[str, Callable[[argparse.Namespace], None]] = {
    "build": build,
    "search": search,
    "filters": filters,
    "texts": texts,
    "change": change,
    "additions": additions,
}

if __name__ == "__main__":
    main()
