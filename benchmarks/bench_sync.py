"""`raytower index sync` with 1 % changed texts: its cost beside encoding and building all of them.

    python benchmarks/bench_sync.py --work DIR --model DIR --texts corpus.tsv [--rows 40000] [--repeats 3]

By the clock, in one process whose Ray runs already; a sync of so few texts loads the model and encodes in the process.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from raytower.config import make_config
from raytower.encoding.config import EncodeConfig
from raytower.encoding.job import encode
from raytower.index.build import build_index
from raytower.index.change_config import IndexSyncConfig
from raytower.index.config import IndexBuildConfig
from raytower.index.sync import sync_index
from raytower.runtime import ensure_ray

CORES = os.cpu_count() or 1


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--texts", type=Path, required=True, help="a text a line")
    parser.add_argument("--rows", type=int, default=40_000)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    shutil.rmtree(arguments.work, ignore_errors=True)
    arguments.work.mkdir(parents=True)
    corpus = arguments.work / "corpus.jsonl"
    lines = arguments.texts.read_text(encoding="utf-8").splitlines()[: arguments.rows]
    source = {"path": str(corpus)}
    write_corpus(corpus, lines)
    embeddings, index = arguments.work / "embeddings", arguments.work / "index"
    settings = {"encoder": arguments.model, "input": source, "output": str(embeddings), "max_length": 64}
    settings |= {
        "prefix": "query: ",
        "dtype": "bfloat16",
        "workers": {"min": CORES, "num": CORES},
    }
    ensure_ray()  # its start is neither side's
    full = clock(lambda: encode(make_config(EncodeConfig, settings)))
    values = {"embeddings": str(embeddings), "output": str(index), "kind": "hnsw", "shards": 1}
    full += clock(lambda: build_index(make_config(IndexBuildConfig, values)))
    print(f"encode and build: {full:.1f} s")
    for number in range(arguments.repeats):
        for row in range(number, len(lines), 100):
            lines[row] += "?"
        write_corpus(corpus, lines)
        seconds = clock(
            lambda: sync_index(make_config(IndexSyncConfig, {"index": str(index), "input": source}))
        )
        print(f"sync of 1 % changed texts: {seconds:.2f} s, {seconds / full:.1%} of the whole", flush=True)


def write_corpus(place: Path, texts: Sequence[str]) -> None:
    rows = [json.dumps({"id": f"q{number}", "text": text}) for number, text in enumerate(texts)]
    place.write_text("\n".join(rows) + "\n", encoding="utf-8")


def clock(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
