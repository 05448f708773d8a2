"""That lists are trained, filled and searched on a GPU, with the results of the CPU way, and how much faster.

    python benchmarks/gpu_index.py [--rows 1000000] [--dim 256] [--kinds ivf_flat ivf_sq8 ivf_pq flat]

Needs a build of FAISS for GPUs and a GPU; needs no Ray. Exits 1 where fewer than 999 of 1,000 hits agree: sums in
another order may swap neighbours that score alike, and give a row on the border of two lists to the other one.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import faiss
import numpy as np

from raytower.index.faiss_index import GpuIndex, fill, new_index, train
from raytower.index.kinds import search_index

K, QUERIES, BATCH = 10, 1000, 65_536
AGREEING = 0.999


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--kinds", nargs="+", default=["flat", "ivf_flat", "ivf_sq8", "ivf_pq"])
    arguments = parser.parse_args()
    if not hasattr(faiss, "StandardGpuResources") or not faiss.get_num_gpus():
        raise SystemExit("FAISS sees no GPU here; run this on a GPU node with pip install 'raytower[gpu]'")
    print(f"faiss {faiss.__version__}, {faiss.get_num_gpus()} GPUs, {arguments.rows:,} x {arguments.dim}\n")
    print("| kind | train s, CPU and GPU | fill s, CPU and GPU | q/s, CPU and GPU | hits that agree |")
    print("|---|---|---|---|---|")
    vectors = clustered(arguments.rows + QUERIES, arguments.dim)
    agreeing = [compare(kind, vectors[:-QUERIES], vectors[-QUERIES:]) for kind in arguments.kinds]
    sys.exit(0 if min(agreeing) >= AGREEING else 1)


def clustered(rows: int, dim: int) -> np.ndarray:
    random = np.random.default_rng(0)
    centres = random.normal(size=(1000, dim)).astype(np.float32)
    vectors = centres[random.integers(0, len(centres), rows)]
    vectors += 0.7 * random.standard_normal((rows, dim), np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def compare(kind: Any, corpus: np.ndarray, queries: np.ndarray) -> float:
    rows, dim = corpus.shape
    parameters = {"nlist": int(4 * rows**0.5), "pq_m": dim // 8, "nbits": 8}
    training = corpus[: 64 * parameters["nlist"]]
    times: dict[str, list[float]] = {"train": [], "fill": []}
    get_num_gpus = faiss.get_num_gpus
    for gpus in (0, 1):
        faiss.get_num_gpus = get_num_gpus if gpus else lambda: 0
        index = new_index(kind, dim, parameters)
        started = time.perf_counter()
        train(kind, index, training)
        times["train"].append(time.perf_counter() - started)
    # Both are filled from the training of the GPU, so that the same rows belong in the same lists.
    trained = faiss.serialize_index(index)
    filled = []
    for num_gpus in (0, 1):
        started = time.perf_counter()
        batches = (corpus[start : start + BATCH] for start in range(0, rows, BATCH))
        filled.append(fill(kind, faiss.deserialize_index(trained), batches, rows, num_gpus=num_gpus))
        times["fill"].append(time.perf_counter() - started)
    speeds, hits = [], []
    for index, gpu in ((filled[0], None), (filled[1], GpuIndex.of(kind, filled[1]))):
        if gpu is None and index is filled[1]:
            raise SystemExit(f"the GPU does not hold the index of kind {kind}; see the warning above")
        search_index(kind, index, queries, K, {"nprobe": 32}, gpu=gpu)  # the first call makes buffers
        started = time.perf_counter()
        hits.append(search_index(kind, index, queries, K, {"nprobe": 32}, gpu=gpu)[1])
        speeds.append(len(queries) / (time.perf_counter() - started))
    shared = [len(np.intersect1d(a, b)) for a, b in zip(*hits, strict=True)]
    agreeing = float(np.mean(shared)) / K
    cells = [", ".join(f"{value:.2f}" for value in values) for values in times.values()]
    print(
        f"| {kind} | {' | '.join(cells)} | {speeds[0]:,.0f}, {speeds[1]:,.0f} | {agreeing:.4f} |", flush=True
    )
    return agreeing


if __name__ == "__main__":
    main()
