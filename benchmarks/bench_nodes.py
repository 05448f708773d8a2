"""Encoding on two nodes of one CPU beside one, on this machine, and beside as many bare processes.

    python benchmarks/bench_nodes.py [--texts 4000] [--repeats 3]

Rates are those after the workers' start-up. Two bare processes, which share nothing, tell what two of this machine's
cores are worth beside one.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# Run as a file, Python looks beside it alone; the cluster is that of the tests.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from raytower.demo.sample import find_demo_model
from tests.support.autoscaled import AutoscaledCluster, Kind

ROWS_PER_FILE = 128
_MAX_LENGTH = 64
_WARM_UP_TEXTS = 64


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--texts", type=int, default=4_000, help="of the corpus")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    rates: dict[tuple[str, int], list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = [
            f"is policy {row} paid out when {'the owner moves ' * (1 + row % 7)}"
            for row in range(arguments.texts)
        ]
        rows = [json.dumps({"id": f"{row}", "text": text}) for row, text in enumerate(texts)]
        (folder / "corpus.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
        for turn in range(arguments.repeats):
            for count in (1, 2):
                rates.setdefault(("nodes", count), []).append(on_nodes(count, folder, turn))
                rates.setdefault(("bare processes", count), []).append(bare(count, texts))
                print(
                    {f"{count} {what}": round(values[-1], 1) for (what, count), values in rates.items()},
                    flush=True,
                )
    print("| | texts/s of 1 | of 2 | ratio |\n| --- | --- | --- | --- |")
    for what in ("nodes", "bare processes"):
        one, two = (statistics.median(rates[what, count]) for count in (1, 2))
        print(f"| {what} | {one:.1f} | {two:.1f} | {two / one:.2f} |")


def on_nodes(count: int, folder: Path, turn: int) -> float:
    """Texts a second of a job with a worker on each of `count` nodes, from their being ready to the manifest."""
    output = folder / f"embeddings-{turn}-{count}"
    values: dict[str, Any] = {
        "encoder": find_demo_model(),
        "input": {"path": str(folder / "corpus.jsonl")},
        "output": str(output),
        "dtype": "float32",
        "max_length": _MAX_LENGTH,
        "rows_per_file": ROWS_PER_FILE,
        "workers": {"num": count, "num_cpus": 1, "num_gpus": 0},
    }
    config = folder / f"encode-{turn}-{count}.json"
    config.write_text(json.dumps(values), encoding="utf-8")
    with AutoscaledCluster({"cpu": Kind(cpus=1, least=count, most=count)}, most=count) as cluster:
        cluster.wait_until_nodes(count)
        said = cluster.run("encode", "encode", "--config", str(config), "--json")
    figures = json.loads(next(line for line in reversed(said.splitlines()) if line.startswith("{")))
    return float(figures["rows"] / (figures["seconds"] - figures["startup_seconds"]))


def bare(count: int, texts: list[str]) -> float:
    """Texts a second of `count` processes of one thread, each with its part of the texts, without Ray and files."""
    context = multiprocessing.get_context("spawn")
    begin = context.Barrier(count)
    with context.Pool(count, _begin_together, (begin,)) as pool:
        took = pool.map(_encode, [texts[number::count] for number in range(count)], chunksize=1)
    return len(texts) / max(took)


_barrier: Any = None


def _begin_together(barrier: Any) -> None:
    global _barrier
    _barrier = barrier


def _encode(texts: list[str]) -> float:
    import torch

    from raytower.models.encoder import Encoder
    from raytower.models.forward import ForwardEngine

    torch.set_num_threads(1)
    engine = ForwardEngine(Encoder.load(find_demo_model()), max_length=_MAX_LENGTH, dtype="float32")
    engine.encode(texts[:_WARM_UP_TEXTS])
    _barrier.wait(120)
    began = time.perf_counter()
    engine.encode(texts)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
