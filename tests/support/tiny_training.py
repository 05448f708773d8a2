"""Small learnable training data of every kind, and a training loop in this process, without Ray."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from raytower.config import make_config
from raytower.data.pieces import Piece, Survey, read_piece
from raytower.training.batches import Rows, num_rows
from raytower.training.config import TrainJobConfig, TrainRetrieverConfig
from raytower.training.optimizer import make_optimizer, make_schedule
from raytower.training.step import TrainingStep
from raytower.training.task import Task
from raytower.training.windows import Window, draw_documents, plan_windows

TOPICS = "abcdefgh"


def question(number: int) -> str:
    return f"what is {TOPICS[number % 8] * 3} {number}?"


def answer(number: int) -> str:
    return f"{TOPICS[number % 8] * 5} is {number}"


def other_answer(number: int, times: int = 1) -> str:
    """An answer to another question, marked as such, so that a tiny cross-encoder can learn to tell it."""
    return answer(number + 3 * times) + " no" * times


def write_rows(path: Path, rows: list[str]) -> Path:
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def write_pairs(path: Path, rows: int) -> Path:
    return write_rows(path, [f"{question(i)}\t{answer(i)}" for i in range(rows)])


def write_triples(path: Path, rows: int) -> Path:
    lines = [f"{question(i)}\t{answer(i)}\t{other_answer(i)}" for i in range(rows)]
    return write_rows(path, ["query\ttitle\tneg_title", *lines])


def write_scored(path: Path, rows: int, low: float = 0.0) -> Path:
    """Half of the pairs match and have label 1, the others have `low`."""
    lines = [
        f"{question(i)}\t{other_answer(i) if i % 2 else answer(i)}\t{1 if i % 2 == 0 else low}"
        for i in range(rows)
    ]
    return write_rows(path, ["query\ttitle\tlabel", *lines])


def write_candidates(path: Path, rows: int, documents: int = 3) -> Path:
    """Each query's own answer, and others with falling scores."""
    lines = [
        json.dumps(
            {
                "query": question(i),
                "documents": [answer(i), *(other_answer(i, k) for k in range(1, documents))],
                "scores": [2.0 - k for k in range(documents)],
            }
        )
        for i in range(rows)
    ]
    return write_rows(path, lines)


def write_lines(path: Path, rows: int) -> Path:
    return write_rows(path, [question(i) for i in range(rows)])


def write_labelled(path: Path, rows: int) -> Path:
    return write_rows(path, [f"{question(i)}\ttopics##{TOPICS[i % 8]}" for i in range(rows)])


def worker_slice(rows: Rows, rank: int, world_size: int) -> Rows:
    """The rows of a batch that belong to one worker: contiguous and equally many for each."""
    size = num_rows(rows) // world_size
    return {name: values[rank * size : (rank + 1) * size] for name, values in rows.items()}


def read_whole_window(
    window: Window, pieces: Sequence[Piece], seed: int, num_documents: int | None = None
) -> pa.Table:
    """All rows of a window in their order, as one process has them that reads and shuffles it as a whole."""
    table = pa.concat_tables([read_piece(pieces[index]) for index in window.pieces])
    random = np.random.default_rng([seed, window.epoch, window.number])
    order = random.permutation(table.num_rows)
    if num_documents is not None and "documents" in table.column_names:
        table = draw_documents(table, num_documents, random)
    return table.take(order)


def cut_batches(tables: Iterable[pa.Table], batch_size: int) -> Iterator[Rows]:
    """The rows of the tables, every `batch_size` together; those at the end that fill none are left out."""
    rows: list[dict[str, Any]] = []
    for table in tables:
        rows += table.to_pylist()
        while len(rows) >= batch_size:
            yield {name: [row[name] for row in rows[:batch_size]] for name in table.column_names}
            del rows[:batch_size]


def batches_of(survey: Survey, config: TrainJobConfig, num_documents: int | None = None) -> Iterator[Rows]:
    """The batches that a run gets, over all its workers; made here without its way of reading."""
    rows = [piece.num_rows for piece in survey.pieces]
    windows = plan_windows(rows, seed=config.seed, window_rows=config.shuffle_rows)
    tables = (read_whole_window(window, survey.pieces, config.seed, num_documents) for window in windows)
    return cut_batches(tables, config.batch_size)


def train_here(
    task: Task[Any],
    config: TrainJobConfig,
    survey: Survey,
    num_steps: int,
    num_shares: int | None = None,
) -> tuple[nn.Module, list[float]]:
    """The task's model after `num_steps` steps of one worker, and the loss of each."""
    torch.manual_seed(config.seed)
    model = task.build(None).train()
    optimizer = make_optimizer(model, config.optimizer)
    step = TrainingStep(
        model,
        optimizer,
        make_schedule(optimizer, num_steps, config.optimizer.warmup_ratio),
        dtype=getattr(torch, config.dtype),
        max_grad_norm=config.optimizer.max_grad_norm,
        seed=config.seed,
        num_shares=num_shares,
    )
    batches = batches_of(survey, config, task.num_documents)
    many = config.accumulate_batches
    losses = [step.run(number, list(islice(batches, many)), task.backward) for number in range(num_steps)]
    return model, losses


def training_values(model: Path, train: Path, folder: Path, /, **changes: Any) -> dict[str, Any]:
    """Keys of a training by one worker that writes to `folder`/out, for the config of any trainer."""
    return {
        "model": str(model),
        "train": {"path": str(train)},
        "output": str(folder / "out"),
        "batch_size": 16,
        "max_length": 32,
        "dtype": "float32",
        "workers": {"num": 1},
        **changes,
    }


def retriever_config(encoder: Path, pairs: Path, output: Path, **changes: object) -> TrainRetrieverConfig:
    values = {
        "model": str(encoder),
        "train": {"path": str(pairs)},
        "output": str(output),
        "batch_size": 8,
        "max_length": 32,
        "dtype": "float32",
        "optimizer": {"lr": 1e-3},
        "workers": {"num": 1, "num_cpus": 0.5},
    }
    return make_config(TrainRetrieverConfig, {**values, **changes})
