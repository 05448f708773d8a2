"""Sentence-pair similarity: two towers and one tower on 10,000 Chinese pairs, beside the published figures.

    python benchmarks/sentence_pairs.py --work DIR [--model DIR] [--epochs 3] [--lr 2e-5] [--only NAME …]

8,000 pairs train, 2,000 test, split by a fixed seed. The published figures come from a larger model (MacBERT-base, 102
million parameters) and a split of their own; give that model by --model to compare like with like. Each method leaves
DIR/<name>.json and is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import questions as zh
import torch
from numpy.typing import NDArray

from raytower.config import make_config
from raytower.metrics import accuracy_f1, auc, best_threshold
from raytower.models.cross_encoder import CrossEncoder, CrossScorer
from raytower.models.encoder import Encoder
from raytower.models.forward import ForwardEngine
from raytower.training.config import TrainRerankerConfig, TrainRetrieverConfig
from raytower.training.reranker import train_reranker
from raytower.training.retriever import train_retriever

NUM_TRAIN = 8_000
SPLIT_SEED = 0
MAX_LENGTH = 128
BATCH_SIZE = 32
Rows = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to decide; `published` is accuracy and F1 of MacBERT-base, `threshold` what its scores are cut at."""

    title: str
    objective: dict[str, Any] | None
    one_tower: bool
    threshold: float
    published: tuple[float, float] | None
    published_speed: int | None


METHODS = {
    "zero_shot": Method(
        title="two towers, not trained",
        objective=None,
        one_tower=False,
        threshold=0.8,
        published=None,
        published_speed=None,
    ),
    "cosine_embedding": Method(
        title="two towers, cosine embedding, margin 0.3",
        objective={"name": "cosine_embedding", "margin": 0.3},
        one_tower=False,
        threshold=0.8,
        published=(0.7625, 0.7007),
        published_speed=256,
    ),
    "cross_entropy": Method(
        title="one tower, cross-entropy of two classes",
        objective={"name": "pointwise_cross_entropy"},
        one_tower=True,
        threshold=0.0,  # the difference of the two logits: above 0 the second class is the likelier
        published=(0.914, 0.888),
        published_speed=520,
    ),
    "regression": Method(
        title="one tower, squared error",
        objective={"name": "pointwise_regression", "loss": "mse"},
        one_tower=True,
        threshold=0.5,
        published=(0.9135, 0.888),
        published_speed=528,
    ),
}


def main() -> None:
    arguments = parse()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}")
    train, test = split(arguments.data / "sentence_similarity" / "train_pair_1w.json", arguments.pairs)
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) for row in train]
    zh.write_rows(work / "train.jsonl", [(line,) for line in lines])
    settings = {
        "model": arguments.model.resolve().name,
        "train": len(train),
        "test": len(test),
        "epochs": arguments.epochs,
        "lr": arguments.lr,
        "dtype": arguments.dtype,
        "prefix": arguments.prefix,
    }
    for name in arguments.only:
        if zh.is_done(work / f"{name}.json", settings):
            continue
        record = run(name, train, test, arguments, work)
        zh.write_record(work / f"{name}.json", {"settings": settings, **record})
        print(f"{name}: accuracy {record['accuracy']:.4f}", flush=True)
    done = {
        name: zh.read_record(work / f"{name}.json")
        for name in METHODS
        if zh.is_done(work / f"{name}.json", settings)
    }
    print_table(done, settings)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, default=zh.DEFAULT_DATA)
    parser.add_argument("--model", type=Path, default=zh.DEFAULT_MODEL)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--lr", type=float, default=2e-5)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--prefix", default=zh.PREFIX, help="of both sides of the two towers; '' for none")
    parser.add_argument(
        "--pairs", type=int, default=10_000, help="for a trial: fewer, split in the same proportion"
    )
    parser.add_argument("--only", nargs="*", choices=list(METHODS), default=list(METHODS))
    return parser.parse_args()


def split(path: Path, num_pairs: int) -> tuple[Rows, Rows]:
    """Training and test rows by a fixed seed."""
    rows = [json.loads(line) for line in zh.read_lines(path)]
    random.Random(SPLIT_SEED).shuffle(rows)
    rows = rows[:num_pairs]
    num_train = NUM_TRAIN * len(rows) // 10_000
    return rows[:num_train], rows[num_train:]


def run(name: str, train: Rows, test: Rows, arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Train by config, then score the test pairs; two towers also with a threshold chosen on the training pairs."""
    method = METHODS[name]
    trained_rate, model_dir = None, str(arguments.model.resolve())
    if method.objective is not None:
        figures = train_method(method, arguments, work / "train.jsonl", work / "runs" / name)
        trained_rate = figures["steps"] * BATCH_SIZE / figures["seconds"]
        model_dir = str(work / "runs" / name)
    scores, rate = score(method, model_dir, test, arguments)
    labels = labels_of(test)
    accuracy, f1 = accuracy_f1(scores, labels, method.threshold)
    record: dict[str, Any] = {
        "accuracy": accuracy,
        "f1": f1,
        "auc": auc(scores, labels),
        "train_pairs_per_second": trained_rate,
        "score_pairs_per_second": rate,
        "correct": "".join("01"[int(hit)] for hit in (scores >= method.threshold) == (labels == 1)),
    }
    if not method.one_tower:
        train_scores, _ = score(method, model_dir, train, arguments)
        threshold = best_threshold(train_scores, labels_of(train))
        chosen_accuracy, chosen_f1 = accuracy_f1(scores, labels, threshold)
        record["chosen"] = {"threshold": threshold, "accuracy": chosen_accuracy, "f1": chosen_f1}
    return record


def train_method(method: Method, arguments: argparse.Namespace, path: Path, output: Path) -> dict[str, Any]:
    """The training job's figures; a finished job is not repeated."""
    values: dict[str, Any] = {
        "model": str(arguments.model.resolve()),
        "train": {"path": str(path), "format": "scored"},
        "output": str(output),
        "objective": method.objective,
        "optimizer": {"lr": arguments.lr, "weight_decay": 0.01},
        "batch_size": BATCH_SIZE,
        "epochs": arguments.epochs,
        "max_length": MAX_LENGTH,
        "dtype": arguments.dtype,
        "seed": 0,
        # On one machine a worker with all cores trained faster here than two that sum their gradients.
        "workers": {"num": 1, "num_cpus": os.cpu_count() or 1},
    }
    if method.one_tower:
        return train_reranker(make_config(TrainRerankerConfig, values))
    prefixes = {"query_prefix": arguments.prefix, "document_prefix": arguments.prefix}
    return train_retriever(make_config(TrainRetrieverConfig, {**values, **prefixes}))


def score(
    method: Method, model_dir: str, rows: Rows, arguments: argparse.Namespace
) -> tuple[NDArray[np.float32], float]:
    """Scores of the pairs, and pairs scored a second by one process with all cores."""
    left, right = [row["sentence1"] for row in rows], [row["sentence2"] for row in rows]
    if method.one_tower:
        scorer = CrossScorer(CrossEncoder.load(model_dir), dtype=arguments.dtype, max_length=MAX_LENGTH)
        started = time.perf_counter()
        scores = scorer.score(left, right)
    else:
        engine = ForwardEngine(Encoder.load(model_dir), dtype=arguments.dtype, max_length=MAX_LENGTH)
        started = time.perf_counter()
        scores = (engine.encode(left, arguments.prefix) * engine.encode(right, arguments.prefix)).sum(1)
    return scores, len(rows) / (time.perf_counter() - started)


def labels_of(rows: Rows) -> NDArray[np.int64]:
    return np.array([int(row["label"]) for row in rows])


def print_table(records: dict[str, dict[str, Any]], settings: dict[str, Any]) -> None:
    print(
        f"\n{settings['model']}, {settings['train']:,} training and {settings['test']:,} test pairs, "
        f"batch {BATCH_SIZE}, lr {settings['lr']}, {settings['epochs']:g} epochs, {settings['dtype']}, at most "
        f"{MAX_LENGTH} tokens; accuracy with a 95 % bootstrap interval"
    )
    print(
        "| method | cut | accuracy | F1 | AUC | trained pairs/s | scored pairs/s | published accuracy, F1, pairs/s "
        "(MacBERT-base, GPU) |\n|---|---|---|---|---|---|---|---|"
    )
    for name, record in records.items():
        method = METHODS[name]
        hits = np.array([float(digit) for digit in record["correct"]])
        rate = record["train_pairs_per_second"]
        speeds = [f"{rate:.0f}" if rate else "", f"{record['score_pairs_per_second']:.0f}"]
        published = "" if method.published is None else f"{method.published[0]}, {method.published[1]}, "
        published += str(method.published_speed or "")
        cells = [method.title, f"{method.threshold:g}", zh.with_interval(hits), f"{record['f1']:.4f}"]
        print("| " + " | ".join([*cells, f"{record['auc']:.4f}", *speeds, published]) + " |")
        if "chosen" in record:
            chosen = record["chosen"]
            cells = ["the same, cut chosen on the training pairs", f"{chosen['threshold']:.3f}"]
            cells += [f"{chosen['accuracy']:.4f}", f"{chosen['f1']:.4f}", "", "", "", ""]
            print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
