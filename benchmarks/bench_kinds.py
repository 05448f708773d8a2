"""The kinds that search over codes, side by side: seconds to build, bytes a row, queries a second at a recall.

    python benchmarks/bench_kinds.py [--rows 100000] [--dims 256 768] [--kinds ivf_rabitq ivf_sq8 ivf_pq] [--threads 1]

Clustered vectors, one shard, parameters as planned, whole vectors in memory for rescoring, k 10, 1,000 queries that are
no rows. Seconds are CPU time of the process: beside other work on the machine they tell more than the clock.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from typing import Any

import faiss
import numpy as np
from synthetic import clustered

from raytower.index.faiss_index import fill, new_index, train
from raytower.index.kinds import parameter_grid, search_index
from raytower.index.plan import IndexRequest

K, QUERIES, BATCH = 10, 1000, 4096
TARGETS = (0.95, 0.99)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000])
    parser.add_argument("--dims", type=int, nargs="+", default=[256, 768])
    parser.add_argument("--kinds", nargs="+", default=["ivf_rabitq", "ivf_sq8", "ivf_pq"])
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    faiss.omp_set_num_threads(arguments.threads)
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {arguments.threads} threads, ",
        end="",
    )
    print(f"faiss {faiss.__version__}; load {os.getloadavg()[0]:.1f}\n")
    print("| rows | dim | kind | train s | fill s | bytes a row | q/s at recall .95 | q/s at recall .99 |")
    print("|---|---|---|---|---|---|---|---|")
    for rows in arguments.rows:
        for dim in arguments.dims:
            vectors = clustered(rows + QUERIES, dim)
            corpus, queries = vectors[:rows], vectors[rows:]
            flat = faiss.IndexFlatIP(dim)
            flat.add(corpus)
            bounds = flat.search(queries, K)[0][:, -1:]
            for kind in arguments.kinds:
                print(
                    f"| {rows:,} | {dim} | {kind} | {' | '.join(measured(kind, corpus, queries, bounds))} |",
                    flush=True,
                )


def measured(kind: Any, corpus: np.ndarray, queries: np.ndarray, bounds: np.ndarray) -> list[str]:
    rows, dim = corpus.shape
    plan = IndexRequest(rows=rows, dim=dim, kind=kind, shards=1, memory_bytes=2**42).plan()
    index = new_index(kind, dim, plan.parameters)
    sample = corpus[np.sort(np.random.default_rng(0).permutation(rows)[: plan.train_rows])]
    started = time.process_time()
    train(kind, index, sample)
    trained = time.process_time()
    index = fill(kind, index, (corpus[start : start + BATCH] for start in range(0, rows, BATCH)), rows)
    filled = time.process_time()
    size = len(faiss.serialize_index(index)) / rows
    cells = [f"{trained - started:.1f}", f"{filled - trained:.1f}", f"{size:.0f}"]
    settings = parameter_grid(kind, plan.parameters, rows, K, rescored=True)
    for target in TARGETS:
        # The fastest of the settings that reach it: one of each factor.
        found: dict[int, tuple[float, dict[str, int]]] = {}
        for setting in settings:
            if setting["k_factor"] in found:
                continue
            started = time.process_time()
            scores, _ = search_index(kind, index, queries, K, setting, exact=corpus)
            speed = len(queries) / (time.process_time() - started)
            if (scores >= bounds - 1e-5).mean() >= target:
                found[setting["k_factor"]] = (speed, setting)
        if not found:
            cells.append("not reached")
            continue
        speed, setting = max(found.values(), key=lambda item: item[0])
        cells.append(f"{speed:,.0f} (nprobe {setting['nprobe']}, k_factor {setting['k_factor']})")
    return cells


if __name__ == "__main__":
    main()
