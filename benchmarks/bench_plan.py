"""The index planner beside what is measured, and what it says of sizes that nobody measures on one machine.

    python benchmarks/bench_plan.py check [--sizes 100000 400000 1000000] [--dim 256] [--kinds flat hnsw ...]
    python benchmarks/bench_plan.py table [--rows 100000000 1000000000] [--dims 256 768]

check: one shard of clustered vectors of each kind, built as a Ray task builds it. Training and filling each run in a
process of their own that has loaded all libraries and built a small index before; what counts is the peak of its
resident memory above that. Memory to search is what FAISS takes for the file without mapping it: every page touched.
table: the plan of `auto` for several budgets of memory; nothing is built.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from synthetic import blocks_of, clustered, write_embeddings

from raytower.errors import InputError
from raytower.index import costs
from raytower.index.embeddings import Embeddings
from raytower.index.manifest import SHARDS_NAME
from raytower.index.plan import IndexPlan, IndexRequest, human_bytes
from raytower.index.shard_build import ShardTask, TableRows, build_shard, train_template
from raytower.index.table import DocumentTable, commit_fragments, table_batch, table_schema, write_fragments
from raytower.storage import Location

CORES = os.cpu_count() or 1
KINDS = ("flat", "hnsw", "ivf_flat", "ivf_rabitq", "ivf_sq8", "ivf_pq")
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(required=True)
    check = commands.add_parser("check")
    check.add_argument("--sizes", type=int, nargs="+", default=[100_000, 400_000, 1_000_000])
    check.add_argument("--dim", type=int, default=256)
    check.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    check.set_defaults(run=bench_check)
    table = commands.add_parser("table")
    table.add_argument("--rows", type=int, nargs="+", default=[10**8, 10**9])
    table.add_argument("--dims", type=int, nargs="+", default=[256, 768])
    table.set_defaults(run=print_plans)
    step = commands.add_parser("step")  # what `check` runs in processes of their own
    step.add_argument("what", choices=("train", "fill", "load"))
    step.add_argument("embeddings", type=Path)
    step.add_argument("kind", choices=KINDS)
    step.add_argument("folder", type=Path)
    step.set_defaults(run=run_step)
    arguments = parser.parse_args()
    arguments.run(arguments)


def plan_of(source: Embeddings, kind: Any) -> IndexPlan:
    return IndexRequest(
        rows=source.rows,
        dim=source.origin.dim,
        kind=kind,
        shards=1,
        memory_bytes=2**42,
        num_workers=1,
        threads_per_task=CORES,
        text_bytes=0,
    ).plan()


# --- check ---------------------------------------------------------------------------------------------------------


def bench_check(arguments: argparse.Namespace) -> None:
    print(f"{platform.processor() or platform.machine()}, {CORES} cores, faiss {faiss.__version__}")
    print(f"{arguments.dim} dimensions, clustered; each cell: predicted, measured, ratio\n")
    print("| kind | rows | fill MiB | train MiB | disk MiB | search MiB | train and fill s |")
    print("|---|---|---|---|---|---|---|")
    worst = 1.0
    for rows in arguments.sizes:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            vectors = clustered(rows, arguments.dim)
            embeddings = write_embeddings(folder / "embeddings", blocks_of(vectors), arguments.dim)
            del vectors
            for kind in arguments.kinds:
                cells, ratios = compare(embeddings, kind, folder / kind)
                print(f"| {kind} | {rows:,} | {' | '.join(cells)} |", flush=True)
                worst = max([worst, *(max(ratio, 1 / ratio) for ratio in ratios)])
    print(f"\nfarthest off in memory and disk: {worst - 1:.1%}")


def compare(embeddings: Path, kind: Any, folder: Path) -> tuple[list[str], list[float]]:
    """The cells of a row, and the ratios that are to lie within 15 %."""
    folder.mkdir()
    plan = plan_of(Embeddings(Location.of(embeddings)), kind)
    trained, filled, loaded = (step(what, embeddings, kind, folder) for what in ("train", "fill", "load"))
    parts = (plan.kind, plan.rows, plan.dim, plan.parameters)
    predicted = [
        costs.fill_bytes(*parts) / MIB,
        costs.train_bytes(plan.kind, plan.train_rows, plan.dim, plan.parameters) / MIB,
        plan.predicted_disk_bytes / MIB,
        plan.predicted_search_memory_bytes / MIB,
        # Reading the rows to check them and to measure recall is no part of these steps.
        plan.predicted_build_seconds - 2 * costs.check_seconds(plan.rows, plan.dim),
    ]
    measured = [
        filled["peak_mib"],
        trained["peak_mib"] if plan.train_rows else 0.0,
        filled["disk_mib"],
        loaded["peak_mib"],
        trained["seconds"] + filled["seconds"],
    ]
    pairs = list(zip(predicted, measured, strict=True))
    cells = [f"{a:,.0f}, {b:,.0f}, {a / b:.2f}" if b else "none" for a, b in pairs]
    return cells, [a / b for a, b in pairs[:4] if b]


def step(what: str, embeddings: Path, kind: str, folder: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "step", what, str(embeddings), kind, str(folder)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def run_step(arguments: argparse.Namespace) -> None:
    """Print the peak of memory above that of a process that has just done the same with a few rows."""
    with tempfile.TemporaryDirectory() as name:
        small = Path(name)
        few = write_embeddings(small / "embeddings", blocks_of(clustered(1000, 16)), 16)
        for what in ("train", "fill", "load"):
            one_step(what, few, arguments.kind, small)
    base = status_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
    started = time.perf_counter()
    found = one_step(arguments.what, arguments.embeddings, arguments.kind, arguments.folder)
    found["seconds"] = time.perf_counter() - started
    found["peak_mib"] = status_mib("VmHWM") - base
    print(json.dumps(found))


def one_step(what: str, embeddings: Path, kind: Any, folder: Path) -> dict[str, float]:
    source = Embeddings(Location.of(embeddings))
    plan = plan_of(source, kind)
    template = folder / "template.npy"
    rows = table_rows(source, folder.parent if folder.name == kind else folder)
    if what == "train":
        np.save(template, train_template(rows, kind, plan.dim, plan.parameters, plan.train_rows, 0, CORES))
        return {}
    task = ShardTask(
        source=rows,
        num_rows=source.rows,
        kind=kind,
        exact_dtype=plan.exact_dtype,
        made_of={"rows": source.rows},
        placed=False,
        num_threads=CORES,
    )
    if what == "load":
        faiss.read_index(str((rows.index / SHARDS_NAME / task.digest / "vectors.faiss").local_path))
        return {}
    return {"disk_mib": build_shard(task, np.load(template)).entry.bytes / MIB}


def table_rows(source: Embeddings, folder: Path) -> TableRows:
    """The rows of the embeddings as a table in `folder`, written by the first step that asks."""
    index = Location.of(folder / "index")
    table = DocumentTable.latest(index)
    if table is None:
        schema = table_schema(source.documents_schema(), source.manifest.dim, source.dtype)
        files = range(len(source.manifest.files))

        def batches() -> Iterator[Any]:
            row = 0
            for file in files:
                for documents, vectors in source.stream(file):
                    yield table_batch(documents, vectors, row, schema)
                    row += len(vectors)

        table = commit_fragments(index, write_fragments(index, batches(), schema), schema)
    return TableRows(index=index, table_version=table.version, unit=True, first=0, last=source.rows)


def status_mib(key: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) / 1024
    raise KeyError(key)


# --- table ---------------------------------------------------------------------------------------------------------


def print_plans(arguments: argparse.Namespace) -> None:
    print("64 workers of 8 threads, recall 0.95, vectors stored as float16 beside codes; texts not counted\n")
    print(
        "| rows | dim | memory | kind | shards | parameters | build task | search | disk | build | ms a query |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    refusals: list[str] = []
    for rows in arguments.rows:
        for dim in arguments.dims:
            for budget in (16, 64, 256, 1024, 4096):
                try:
                    plan = IndexRequest(
                        rows=rows,
                        dim=dim,
                        memory_bytes=budget * 2**30,
                        num_workers=64,
                        threads_per_task=8,
                        vector_dtype="float16",
                    ).plan()
                except InputError as error:
                    print(f"| {rows:,} | {dim} | {budget} GiB | refused |" + " |" * 7)
                    refusals.append(str(error))
                    continue
                print(plan_row(plan, budget))
    print("\nRefused:", *refusals, sep="\n- ")


def plan_row(plan: IndexPlan, budget: int) -> str:
    parameters = ", ".join(f"{name} {value}" for name, value in plan.parameters.items())
    sizes = (
        plan.predicted_build_memory_bytes_per_task,
        plan.predicted_search_memory_bytes,
        plan.predicted_disk_bytes,
    )
    return (
        f"| {plan.rows:,} | {plan.dim} | {budget} GiB | {plan.kind} | {plan.shards} | {parameters} | "
        + " | ".join(human_bytes(size) for size in sizes)
        + f" | {plan.predicted_build_seconds / 60:.0f} min | {plan.predicted_query_ms:.3g} |"
    )


if __name__ == "__main__":
    main()
