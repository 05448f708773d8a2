"""The in-batch loss and its backward pass beside plain cross-entropy over the same cosines, without a model.

    python benchmarks/bench_loss.py speed [--pairs 4096] [--dim 256] [--repeats 7]
    python benchmarks/bench_loss.py memory [--pairs 16384 65536]

speed: both sides in turn, keys compared anew each time. "plain" is torch's cross_entropy over scale times all cosines,
which knows of no equal texts and holds the matrix. memory: each size in a process of its own, the peak of its resident
memory above what it held with the embeddings there, and seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from raytower.objectives.config import InBatchNegatives
from raytower.objectives.keys import NO_KEY, BatchKeys
from raytower.objectives.targets import Targets

SCALE = 20.0
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    speed_parser = commands.add_parser("speed")
    speed_parser.add_argument("--pairs", type=int, default=4096)
    speed_parser.add_argument("--repeats", type=int, default=7)
    memory_parser = commands.add_parser("memory")
    memory_parser.add_argument("--pairs", type=int, nargs="+", default=[16_384, 65_536])
    one_parser = commands.add_parser("measure-memory")
    one_parser.add_argument("--pairs", type=int, required=True)
    for command, run in ((speed_parser, speed), (memory_parser, memory), (one_parser, measure_memory)):
        command.add_argument("--dim", type=int, default=256)
        command.set_defaults(run=run)
    arguments = parser.parse_args()
    arguments.run(arguments)


def make_columns(num_pairs: int, dim: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    columns = [torch.randn(num_pairs, dim, generator=generator) for _ in range(2)]
    return [nn.functional.normalize(column, dim=-1).requires_grad_() for column in columns]


def make_keys(num_pairs: int, num_labels: int | None) -> BatchKeys:
    """Queries and documents of which each text comes twice in a hundred rows; with labels or without."""
    generator = torch.Generator().manual_seed(1)
    columns = torch.full((2, num_pairs, 3), NO_KEY)
    columns[:, :, 0] = torch.randint(1, 50 * num_pairs, (2, num_pairs), generator=generator)
    if num_labels is not None:
        columns[:, :, 2] = torch.randint(1, num_labels + 1, (num_pairs,), generator=generator)
    return BatchKeys(query=columns[0], documents=(columns[1],))


def plain(columns: list[Tensor]) -> None:
    query, document = columns
    logits = SCALE * (query @ document.T)
    nn.functional.cross_entropy(logits, torch.arange(len(query))).backward()


def ours(columns: list[Tensor], num_labels: int | None = None, symmetric: bool = False) -> None:
    keys = make_keys(len(columns[0]), num_labels)
    InBatchNegatives(scale=SCALE, symmetric=symmetric)(columns, Targets(keys=keys)).backward()


def speed(arguments: argparse.Namespace) -> None:
    columns = make_columns(arguments.pairs, arguments.dim)
    sides: dict[str, Callable[[], None]] = {
        "plain cross-entropy": lambda: plain(columns),
        "in_batch_negatives": lambda: ours(columns),
        "in_batch_negatives, 100 labels": lambda: ours(columns, 100),
        "in_batch_negatives, 2 labels": lambda: ours(columns, 2),
        "in_batch_negatives, symmetric": lambda: ours(columns, symmetric=True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(arguments.repeats + 1):
        for name, side in sides.items():
            start = time.perf_counter()
            side()
            if repeat > 0:  # the first fills memory and caches
                seconds[name].append(time.perf_counter() - start)
    print(f"{describe()}; {arguments.pairs:,} pairs, {arguments.dim} dimensions, {arguments.repeats} repeats")
    print("| loss and backward | ratio | seconds | lowest and highest |\n|---|---|---|---|")
    peer = statistics.median(seconds["plain cross-entropy"])
    for name, taken in seconds.items():
        middle = statistics.median(taken)
        print(f"| {name} | {middle / peer:.2f} | {middle:.2f} | {min(taken):.2f}, {max(taken):.2f} |")


def memory(arguments: argparse.Namespace) -> None:
    print(f"{describe()}; {arguments.dim} dimensions")
    print("| pairs | peak above embeddings and libraries, MiB | the matrix of cosines alone, MiB | seconds |")
    print("|---|---|---|---|")
    for pairs in arguments.pairs:
        command = [
            sys.executable,
            __file__,
            "measure-memory",
            "--pairs",
            str(pairs),
            "--dim",
            str(arguments.dim),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
        found = json.loads(done.stdout)
        matrix = pairs * pairs * 4 / MIB
        print(
            f"| {pairs:,} | {found['bytes'] / MIB:,.0f} | {matrix:,.0f} | {found['seconds']:.1f} |",
            flush=True,
        )


def measure_memory(arguments: argparse.Namespace) -> None:
    columns = make_columns(arguments.pairs, arguments.dim)
    ours(make_columns(8, arguments.dim))  # libraries take what they take
    held = peak_bytes()
    start = time.perf_counter()
    ours(columns)
    print(json.dumps({"bytes": peak_bytes() - held, "seconds": time.perf_counter() - start}))


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def describe() -> str:
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"


if __name__ == "__main__":
    main()
