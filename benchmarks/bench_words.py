"""What the table of word embeddings costs in the backward pass: that of a multilingual model beside a small one.

    python benchmarks/bench_words.py [--repeats 5] [--threads 1] [--dtype float32]

Two layers of XLM-RoBERTa's shape, width 384, 64 pairs of 64 tokens each in eight chunks of 1,024: CPU seconds of the
backward pass, in turns, with our gradients of the rows that were read and with autograd's of the whole table.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import torch
from gpu_training import Batch, backward, make_batch
from transformers import PreTrainedTokenizerBase, XLMRobertaConfig, XLMRobertaModel

from raytower.models.encoder import Encoder, EncoderSettings
from raytower.models.two_tower import TwoTower
from raytower.training.config import OptimizerConfig
from raytower.training.optimizer import make_optimizer, make_schedule
from raytower.training.step import TrainingStep
from raytower.training.word_gradients import WordGradients

VOCABULARIES = {"250,002 rows": 250_002, "5,000 rows": 5_000}
PAIRS, LENGTH, TOKENS_PER_CHUNK = 64, 64, 1_024
_PADDING_ID = 1


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    ways = {
        f"{name}, {way}": (size, is_ours)
        for name, size in VOCABULARIES.items()
        for way, is_ours in (("rows that were read", True), ("autograd's whole table", False))
    }
    steps = {title: make_step(size, arguments.dtype, is_ours) for title, (size, is_ours) in ways.items()}
    seconds: dict[str, list[float]] = {title: [] for title in ways}
    for repeat in range(arguments.repeats + 1):
        for title, (size, _) in ways.items():
            taken = backward_seconds(steps[title], make_batch(PAIRS, LENGTH, size))
            if repeat:  # the first makes the optimizer's moments and fills caches
                seconds[title].append(taken)
    print(f"{arguments.dtype}, {arguments.threads} threads, median of {arguments.repeats}")
    print("| table | CPU s of the backward pass | lowest and highest |\n|---|---|---|")
    for title, values in seconds.items():
        print(f"| {title} | {statistics.median(values):.2f} | {min(values):.2f}, {max(values):.2f} |")


def make_step(vocabulary: int, dtype: str, is_ours: bool) -> TrainingStep:
    """A randomly initialised encoder whose table has `vocabulary` rows, as a training job makes it."""
    torch.manual_seed(0)
    config = XLMRobertaConfig(
        vocab_size=vocabulary,
        hidden_size=384,
        num_hidden_layers=2,
        num_attention_heads=12,
        intermediate_size=1_536,
    )
    tokenizer = cast(PreTrainedTokenizerBase, SimpleNamespace(pad_token_id=_PADDING_ID))
    encoder = Encoder(XLMRobertaModel(config, add_pooling_layer=False), tokenizer, EncoderSettings())
    tower = TwoTower(encoder, LENGTH, TOKENS_PER_CHUNK, None).train()
    optimizer = make_optimizer(tower, OptimizerConfig())
    schedule = make_schedule(optimizer, num_steps=1_000_000, warmup_ratio=0.1)
    words = WordGradients.of(tower) if is_ours else None
    return TrainingStep(tower, optimizer, schedule, dtype=getattr(torch, dtype), words=words)


def backward_seconds(step: TrainingStep, batch: Batch) -> float:
    """CPU seconds of all threads within the backward passes of one step, and in what sums the table's gradient."""
    taken = 0.0

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **settings: Any) -> Any:
            nonlocal taken
            started = time.process_time()
            result = function(*arguments, **settings)
            taken += time.process_time() - started
            return result

        return run

    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(torch.Tensor, "backward", timed(torch.Tensor.backward)))
        for name in ("begin", "finish"):
            function = timed(getattr(WordGradients, name))
            patches.enter_context(mock.patch.object(WordGradients, name, function))
        step.run(0, [batch], backward)
    return taken


if __name__ == "__main__":
    main()
