"""Training: raytower beside sentence-transformers' trainer, same model, pairs, batches, schedule and cores.

    python benchmarks/bench_training.py speed [--steps 60] [--repeats 3] [--no-ray]
    python benchmarks/bench_training.py quality --output DIR [--side ours theirs] [--seeds 0 1 2] [--train FILE]
        [--peer-batch-size N] [--peer-lr LR] [--peer-pairs N] [--peer-dtype bfloat16]

speed: pairs a second of one process with all cores, both sides in turn, and of `raytower train-retriever` beside our
own bare step, so that Ray's cost shows. quality: recall on all dev queries after one epoch, against a corpus sample
that holds every relevant text; one JSON file for each side and seed, so that a run can be made in pieces. With
`--peer-*` the peer gets its own batch, learning rate and share of the pairs, as for a comparison at equal time.
The peer is SentenceTransformerTrainer with MultipleNegativesRankingLoss (needs `datasets` and `accelerate`).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import questions as zh
import torch
from numpy.typing import NDArray

from raytower.config import make_config
from raytower.training.config import TrainRetrieverConfig
from raytower.training.optimizer import make_optimizer, make_schedule
from raytower.training.retriever import RetrieverTask, train_retriever
from raytower.training.step import TrainingStep

SKIPPED_STEPS = 5
KS = (1, 10)
PEER = "sentence-transformers float32"
# The moments when each step ended, the start of training first.
Clock = list[float]
Figures = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What both sides share."""

    model: str
    batch_size: int
    lr: float
    scale: float
    weight_decay: float
    warmup_ratio: float
    max_grad_norm: float


def main() -> None:
    arguments = parse()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}")
    settings = Settings(
        model=str(arguments.model.resolve()),
        batch_size=arguments.batch_size,
        lr=arguments.lr,
        scale=arguments.scale,
        weight_decay=0.01,
        warmup_ratio=0.1,
        max_grad_norm=1.0,
    )
    arguments.run(settings, arguments)


def parse() -> argparse.Namespace:
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--data", type=Path, default=zh.DEFAULT_DATA)
    shared.add_argument("--model", type=Path, default=zh.DEFAULT_MODEL)
    shared.add_argument("--batch-size", type=int, default=64)
    shared.add_argument("--lr", type=float, default=2e-5)
    shared.add_argument("--scale", type=float, default=20.0)
    shared.add_argument("--pairs", type=int, default=20_000)
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(required=True)
    speed_parser = commands.add_parser("speed", parents=[shared])
    speed_parser.add_argument("--steps", type=int, default=60)
    speed_parser.add_argument("--repeats", type=int, default=3)
    speed_parser.add_argument("--no-ray", action="store_true")
    speed_parser.set_defaults(run=speed)
    quality_parser = commands.add_parser("quality", parents=[shared])
    quality_parser.add_argument("--output", type=Path, required=True)
    quality_parser.add_argument("--train", type=Path, help="a file of pairs, in place of the data's own")
    quality_parser.add_argument("--peer-batch-size", type=int)
    quality_parser.add_argument("--peer-lr", type=float)
    quality_parser.add_argument("--peer-pairs", type=int, help="the peer trains on the first so many")
    quality_parser.add_argument("--peer-dtype", choices=["float32", "bfloat16"], default="float32")
    quality_parser.add_argument("--side", nargs="*", choices=["ours", "theirs"], default=["ours", "theirs"])
    quality_parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    quality_parser.add_argument("--dtype", default="bfloat16", help="of our side")
    quality_parser.add_argument(
        "--workers", type=int, default=2, help="of our side; the cores are shared out"
    )
    quality_parser.add_argument("--corpus-rows", type=int, default=100_000)
    quality_parser.add_argument("--queries", type=int, help="for a trial: only the first so many")
    quality_parser.set_defaults(run=quality)
    return parser.parse_args()


# --- speed ---------------------------------------------------------------------------------------------------------


def speed(settings: Settings, arguments: argparse.Namespace) -> None:
    """Interleaved repeats of every side over the same pairs; medians and ratios."""
    num_steps = arguments.steps + SKIPPED_STEPS
    pairs = zh.training_pairs(arguments.data, arguments.pairs)[: num_steps * settings.batch_size]
    if len(pairs) < num_steps * settings.batch_size:
        raise SystemExit(f"{num_steps} steps need {num_steps * settings.batch_size} pairs; raise --pairs")
    sides: dict[str, Callable[[], Clock]] = {
        PEER: lambda: train_theirs(settings, pairs, seed=0)[1],
        "sentence-transformers bfloat16": lambda: train_theirs(settings, pairs, seed=0, bf16=True)[1],
        "raytower float32": lambda: train_ours(settings, pairs, "float32"),
        "raytower bfloat16": lambda: train_ours(settings, pairs, "bfloat16"),
    }
    clocks: dict[str, list[Clock]] = {name: [] for name in sides}
    jobs: dict[int, list[Figures]] = {1: [], os.cpu_count() or 1: []}
    for _ in range(arguments.repeats):
        for name, train in sides.items():
            clocks[name].append(train())
        for workers in jobs if not arguments.no_ray else ():
            jobs[workers].append(run_job(settings, pairs, workers))
    rates = {
        name: [rate(clock, settings.batch_size, SKIPPED_STEPS) for clock in values]
        for name, values in clocks.items()
    }
    base = statistics.median(rates[PEER])
    print(
        f"\nbatch {settings.batch_size}, {arguments.steps} steps after {SKIPPED_STEPS} that do not count, median of "
        f"{arguments.repeats}, {torch.get_num_threads()} threads"
    )
    print("| one process | ratio | pairs/s | lowest and highest |\n|---|---|---|---|")
    for name, values in rates.items():
        median = statistics.median(values)
        print(f"| {name} | {median / base:.2f} | {median:.1f} | {min(values):.1f}, {max(values):.1f} |")
    if not arguments.no_ray:
        print_jobs(statistics.median(rates["raytower bfloat16"]), jobs, settings.batch_size)


def print_jobs(bare_rate: float, jobs: dict[int, list[Figures]], batch_size: int) -> None:
    """Ray's cost: the job's steps beside the bare ones, its loop from the first batch on, and the whole job."""
    cores = os.cpu_count() or 1
    print("\n| bfloat16 | ratio | pairs/s | loop, s | whole job, s |\n|---|---|---|---|---|")
    print(f"| bare step, one process, {torch.get_num_threads()} threads | 1.00 | {bare_rate:.1f} | | |")
    for workers, figures in jobs.items():
        job = {name: statistics.median(one[name] for one in figures) for name in figures[0]}
        found = batch_size / job["step_seconds"]
        name = f"`raytower train-retriever`, {workers} x {cores // workers} cores"
        print(
            f"| {name} | {found / bare_rate:.2f} | {found:.1f} | {job['loop_seconds']:.0f} | {job['job_seconds']:.0f} |"
        )


def rate(clock: Clock, batch_size: int, skipped: int) -> float:
    """Pairs a second from the end of step `skipped` to the end of the last."""
    return (len(clock) - 1 - skipped) * batch_size / (clock[-1] - clock[skipped])


def train_ours(settings: Settings, pairs: zh.Pairs, dtype: str) -> Clock:
    """The product's task and training step in this process, on no Ray: one epoch over `pairs`."""
    # The config wants a path and an output; neither is touched here.
    values = retriever_values(settings, Path("unused"), seed=0, dtype=dtype, workers=1)
    config = make_config(TrainRetrieverConfig, values)
    task = RetrieverTask(config, config.start, num_documents=None, teacher=None)
    model = task.build(None).train()
    num_steps = len(pairs) // settings.batch_size
    optimizer = make_optimizer(model, config.optimizer)
    schedule = make_schedule(optimizer, num_steps, config.optimizer.warmup_ratio)
    step = TrainingStep(
        model,
        optimizer,
        schedule,
        dtype=getattr(torch, dtype),
        max_grad_norm=config.optimizer.max_grad_norm,
    )
    clock = [time.perf_counter()]
    for number in range(num_steps):
        rows = pairs[number * settings.batch_size : (number + 1) * settings.batch_size]
        columns = {"query": [left for left, _ in rows], "document": [right for _, right in rows]}
        step.run(number, [columns], task.backward)
        clock.append(time.perf_counter())
    return clock


def train_theirs(
    settings: Settings, pairs: zh.Pairs, seed: int, bf16: bool = False, no_duplicates: bool = False
) -> tuple[Any, Clock]:
    """sentence-transformers' trainer, one epoch over `pairs`: the trained model and when each step ended."""
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from transformers import TrainerCallback

    clock: Clock = []

    class StepClock(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clock.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.append(time.perf_counter())

    model = SentenceTransformer(settings.model, device="cpu")
    model.max_seq_length = zh.MAX_LENGTH
    columns = {
        "anchor": [zh.PREFIX + left for left, _ in pairs],
        "positive": [zh.PREFIX + right for _, right in pairs],
    }
    with tempfile.TemporaryDirectory() as folder:
        options = SentenceTransformerTrainingArguments(
            output_dir=folder,
            num_train_epochs=1,
            per_device_train_batch_size=settings.batch_size,
            dataloader_drop_last=True,
            learning_rate=settings.lr,
            weight_decay=settings.weight_decay,
            warmup_steps=settings.warmup_ratio,  # below 1 it is a share of the steps
            lr_scheduler_type="linear",
            max_grad_norm=settings.max_grad_norm,
            seed=seed,
            bf16=bf16,
            batch_sampler="no_duplicates" if no_duplicates else "batch_sampler",
            use_cpu=True,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = SentenceTransformerTrainer(
            model=model,
            args=options,
            train_dataset=Dataset.from_dict(columns),
            loss=MultipleNegativesRankingLoss(model, scale=settings.scale),
            callbacks=[StepClock()],
        )
        trainer.train()
    return model, clock


def run_job(settings: Settings, pairs: zh.Pairs, workers: int) -> Figures:
    """`raytower train-retriever` in a process of its own: seconds of a step, of its loop and of the whole job."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        zh.write_rows(folder / "pairs.tsv", pairs)
        values = retriever_values(settings, folder, seed=0, dtype="bfloat16", workers=workers)
        # JSON is YAML too.
        text = json.dumps({**values, "log_every_steps": SKIPPED_STEPS})
        (folder / "config.yaml").write_text(text, encoding="utf-8")
        started = time.perf_counter()
        command = [
            sys.executable,
            "-m",
            "raytower.cli",
            "train-retriever",
            "--config",
            str(folder / "config.yaml"),
        ]
        environment = {**os.environ, "RAY_DEDUP_LOGS": "0"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
        figures = json.loads(done.stdout.strip().splitlines()[-1])
        return {
            "step_seconds": step_seconds(done.stderr, settings.batch_size),
            "loop_seconds": figures["seconds"],
            "job_seconds": time.perf_counter() - started,
        }


def step_seconds(progress: str, batch_size: int) -> float:
    """Seconds of a step after the skipped ones, from a job's progress lines, which give rows/s from the start on."""
    found = re.findall(r"step (\d+)/\d+ .*? ([\d.]+) rows/s", progress)
    seconds_at = {
        int(step): int(step) * batch_size / float(rows_per_second) for step, rows_per_second in found
    }
    if SKIPPED_STEPS not in seconds_at or len(seconds_at) < 2:
        raise SystemExit(f"the job's progress names no step {SKIPPED_STEPS}, or no later one:\n{progress}")
    last = max(seconds_at)
    return (seconds_at[last] - seconds_at[SKIPPED_STEPS]) / (last - SKIPPED_STEPS)


def retriever_values(
    settings: Settings, folder: Path, *, seed: int, dtype: str, workers: int
) -> dict[str, Any]:
    """The config of our job, which finds the pairs in `folder` and leaves the encoder there."""
    return {
        "model": settings.model,
        "train": {"path": str(folder / "pairs.tsv"), "format": "pairs"},
        "output": str(folder / "encoder"),
        "objective": {"name": "in_batch_negatives", "scale": settings.scale},
        "optimizer": optimizer_values(settings),
        "batch_size": settings.batch_size,
        "epochs": 1,
        "max_length": zh.MAX_LENGTH,
        "query_prefix": zh.PREFIX,
        "document_prefix": zh.PREFIX,
        "dtype": dtype,
        "seed": seed,
        "workers": {"num": workers, "num_cpus": (os.cpu_count() or 1) / workers},
    }


def optimizer_values(settings: Settings) -> dict[str, float]:
    names = ("lr", "weight_decay", "warmup_ratio", "max_grad_norm")
    return {name: getattr(settings, name) for name in names}


# --- quality -------------------------------------------------------------------------------------------------------


def quality(settings: Settings, arguments: argparse.Namespace) -> None:
    """Train what is missing of the sides and seeds asked for, then print the table of all that is there."""
    pairs = quality_pairs(arguments)
    dev = zh.dev_sample(arguments.data, arguments.corpus_rows, arguments.queries)
    peer = replace(
        settings,
        batch_size=arguments.peer_batch_size or settings.batch_size,
        lr=arguments.peer_lr or settings.lr,
    )
    peer_pairs = pairs[: arguments.peer_pairs]
    # Each side's records are of its own settings, so that another peer leaves ours as they are.
    ours = recorded_of(settings, pairs, dev)
    theirs = recorded_of(peer, peer_pairs, dev)
    folder: Path = arguments.output

    def once(name: str, recorded: dict[str, Any], make: Callable[[], tuple[str | Path, float]]) -> None:
        if zh.is_done(folder / f"{name}.json", recorded):
            return
        encoder_dir, seconds = make()
        record = zh.measure(encoder_dir, dev, KS)
        zh.write_record(
            folder / f"{name}.json", {"settings": recorded, "train_seconds": round(seconds, 1), **record}
        )
        print(
            f"{name}: recall@10 {record['recall@10']:.4f}, trained in {seconds:.0f} s, measured in "
            f"{record['measure_seconds']:.0f} s",
            flush=True,
        )

    once("zero_shot", ours, lambda: (settings.model, 0.0))
    for seed in arguments.seeds:
        if "theirs" in arguments.side:
            name = f"theirs-{arguments.peer_dtype}-batch{peer.batch_size}-lr{peer.lr:g}-seed{seed}"
            once(name, theirs, lambda: quality_theirs(peer, peer_pairs, folder / name, seed, arguments))  # noqa: B023
        if "ours" in arguments.side:
            name = f"ours-{arguments.dtype}-seed{seed}"
            once(name, ours, lambda: quality_ours(settings, pairs, folder / name, seed, arguments))  # noqa: B023
    print_quality(folder, dev)


def quality_pairs(arguments: argparse.Namespace) -> zh.Pairs:
    if arguments.train is None:
        return zh.training_pairs(arguments.data, arguments.pairs)
    rows = [row.split("\t") for row in zh.read_lines(arguments.train)]
    return [(left, right) for left, right in rows][: arguments.pairs]


def recorded_of(settings: Settings, pairs: zh.Pairs, dev: zh.DevSample) -> dict[str, Any]:
    return {
        **vars(settings),
        "model": Path(settings.model).name,
        "pairs": len(pairs),
        "queries": len(dev.queries),
        "corpus_rows": len(dev.corpus),
        "max_length": zh.MAX_LENGTH,
    }


def quality_theirs(
    settings: Settings, pairs: zh.Pairs, folder: Path, seed: int, arguments: argparse.Namespace
) -> tuple[Path, float]:
    bf16 = arguments.peer_dtype == "bfloat16"
    model, clock = train_theirs(settings, pairs, seed, bf16, no_duplicates=True)
    model.save(str(folder / "encoder"), create_model_card=False)
    return folder / "encoder", clock[-1] - clock[0]


def quality_ours(
    settings: Settings, pairs: zh.Pairs, folder: Path, seed: int, arguments: argparse.Namespace
) -> tuple[Path, float]:
    zh.write_rows(folder / "pairs.tsv", pairs)
    values = retriever_values(settings, folder, seed=seed, dtype=arguments.dtype, workers=arguments.workers)
    figures = train_retriever(make_config(TrainRetrieverConfig, values))
    return folder / "encoder", float(figures["seconds"])


def print_quality(folder: Path, dev: zh.DevSample) -> None:
    """Means over the seeds that are there, intervals over queries, and paired differences."""
    sides: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*.json")):
        record = zh.read_record(path)
        if (record["queries"], record["corpus_rows"]) == (len(dev.queries), len(dev.corpus)):
            sides.setdefault(path.stem.rpartition("-seed")[0] or path.stem, []).append(record)
    zero_shot = {k: zh.recall_values(sides["zero_shot"][0], k) for k in KS}
    print(
        f"\n{len(dev.queries):,} queries, {len(dev.corpus):,} corpus texts; means over seeds, 95 % bootstrap "
        "intervals over queries"
    )
    print(
        "| side | seeds | pairs | batch | lr | seconds | recall@1 | recall@10 | recall@1 less zero-shot | "
        "recall@10 less zero-shot | recall@10 of each seed |" + "\n" + "|---" * 11 + "|"
    )
    means: dict[str, dict[int, NDArray[np.float64]]] = {}
    for name in sorted(sides, key=lambda name: name != "zero_shot"):
        records = sides[name]
        values = {k: np.mean([zh.recall_values(record, k) for record in records], axis=0) for k in KS}
        means[name] = values
        settings = records[0]["settings"]
        cells = [name, str(len(records))]
        cells += [f"{settings[key]:,}" for key in ("pairs", "batch_size", "lr")]
        cells += [f"{statistics.median(record['train_seconds'] for record in records):.0f}"]
        cells += [zh.with_interval(values[k]) for k in KS]
        cells += [zh.difference_with_interval(values[k], zero_shot[k]) for k in KS]
        cells += [", ".join(f"{record['recall@10']:.4f}" for record in records)]
        print("| " + " | ".join(cells) + " |")
    for ours in (name for name in means if name.startswith("ours")):
        for theirs in (name for name in means if name.startswith("theirs")):
            found = [
                f"recall@{k} {zh.difference_with_interval(means[ours][k], means[theirs][k])}" for k in KS
            ]
            print(f"\n{ours} less {theirs} (paired): {', '.join(found)}")


if __name__ == "__main__":
    main()
