"""The demo's way on Chinese questions: zero-shot beside trained, on a corpus sample that holds every relevant text.

    python benchmarks/zh_questions.py --data DIR --model DIR --work DIR [--corpus-rows 50000] [--train-rows 8000]

DIR of --data holds train.tsv (pairs), dev.tsv (pairs) and corpus.tsv (one text a line). Prints one table. Of the whole
corpus: --corpus-rows 0; without training: --train-rows 0.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path
from typing import Any

from raytower.config import make_config
from raytower.encoding.config import EncodeConfig
from raytower.encoding.job import encode
from raytower.evaluation.config import EvaluateConfig
from raytower.evaluation.evaluate import evaluate
from raytower.index.build import build_index
from raytower.index.config import IndexBuildConfig
from raytower.training.config import TrainRetrieverConfig
from raytower.training.retriever import train_retriever

METRICS = ("hit@1", "hit@10", "recall@1", "recall@10", "recall@50", "mrr@10", "ndcg@10")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--prefix", default="query: ")
    parser.add_argument("--corpus-rows", type=int, default=50_000)
    parser.add_argument("--train-rows", type=int, default=8_000)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    sample(arguments)
    rows = {"zero-shot": measure("zero-shot", arguments.model, arguments)}
    if arguments.train_rows:
        train(arguments)
        rows["trained"] = measure("trained", str(arguments.work / "encoder"), arguments)
    print("| encoder | " + " | ".join(METRICS) + " |\n" + "|---" * (len(METRICS) + 1) + "|")
    for name, values in rows.items():
        cells = []
        for metric in METRICS:
            low, high = values["intervals"][metric]
            cells.append(f"{values[metric]:.3f} [{low:.3f}, {high:.3f}]")
        print(f"| {name} | " + " | ".join(cells) + " |")


def train(arguments: argparse.Namespace) -> None:
    """One pass over the sampled pairs."""
    started = time.perf_counter()
    figures = train_retriever(
        make_config(
            TrainRetrieverConfig,
            {
                "model": arguments.model,
                "train": {"path": str(arguments.work / "train.tsv"), "format": "pairs"},
                "output": str(arguments.work / "encoder"),
                "batch_size": 64,
                "max_length": 64,
                "query_prefix": arguments.prefix,
                "document_prefix": arguments.prefix,
                "optimizer": {"lr": 2e-5},
            },
        )
    )
    print(f"training: {figures['steps']} steps, {time.perf_counter() - started:.0f} s")


def sample(arguments: argparse.Namespace) -> None:
    """Corpus: every relevant text and a seeded draw of others. Training: a seeded draw of the pairs."""
    draw = random.Random(0)
    dev = read_lines(arguments.data / "dev.tsv")
    needed = {line.split("\t")[1] for line in dev}
    corpus = read_lines(arguments.data / "corpus.tsv")
    others = [text for text in corpus if text not in needed]
    room = arguments.corpus_rows - len(needed) if arguments.corpus_rows else len(others)
    kept = set(draw.sample(range(len(others)), max(room, 0)))
    chosen = [text for text in corpus if text in needed] + [others[row] for row in sorted(kept)]
    write_lines(arguments.work / "corpus.txt", chosen)
    write_lines(arguments.work / "dev.tsv", dev)
    train = read_lines(arguments.data / "train.tsv")
    write_lines(arguments.work / "train.tsv", draw.sample(train, min(arguments.train_rows, len(train))))


def measure(name: str, encoder: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Encode, index (HNSW, 2 shards) and evaluate on all dev queries; prints the time of each stage."""
    work = arguments.work
    encoded = encode(
        make_config(
            EncodeConfig,
            {
                "encoder": encoder,
                "input": {"path": str(work / "corpus.txt")},
                "output": str(work / f"embeddings-{name}"),
                "prefix": arguments.prefix,
                "max_length": 64,
                "dtype": "bfloat16",
                "workers": {"min": 2, "num": 2},
            },
        )
    )
    values = {
        "embeddings": str(work / f"embeddings-{name}"),
        "output": str(work / f"index-{name}"),
        "kind": "hnsw",
    }
    built = build_index(make_config(IndexBuildConfig, {**values, "shards": 2}))
    figures = evaluate(
        make_config(
            EvaluateConfig,
            {
                "encoder": encoder,
                "index": str(work / f"index-{name}"),
                "queries": {"path": str(work / "dev.tsv"), "format": "pairs"},
                "query_prefix": arguments.prefix,
                "output": str(work / f"report-{name}"),
                "dtype": "bfloat16",
                "max_length": 64,
            },
        )
    )
    print(
        f"{name}: encode {encoded['seconds']:.0f} s ({encoded['tokens_per_second']:,.0f} tokens/s), "
        f"index {built['seconds']:.0f} s (recall {built['recall']}), evaluate {figures['seconds']:.0f} s"
    )
    return figures


def read_lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").rstrip("\n").split("\n")


def write_lines(path: Path, lines: list[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    main()
