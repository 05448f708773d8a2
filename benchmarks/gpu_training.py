"""The training step on an accelerator, without Ray and FAISS: speed, utilisation, and what gradient caching saves.

    PYTHONPATH=platform python benchmarks/gpu_training.py all     [--size base] [--batch 64 256 1024 4096]
    PYTHONPATH=platform python benchmarks/gpu_training.py speed   [--sizes base small] [--batch 256 1024]
    PYTHONPATH=platform python benchmarks/gpu_training.py largest [--sizes base] [--max-batch 131072]
    PYTHONPATH=platform python benchmarks/gpu_training.py memory  [--size base] [--batch 1024] [--chunk 32]

Needs no model, no data and no network: encoders of BERT's shapes with random weights, and random token ids of one
length, so that nothing is padded. On a CPU `speed` and `largest` try the same code at tiny sizes: add --device cpu, and
to `all` --device cpu --size tiny.

all: everything from texts, in less than ten minutes: pairs a second with tokenising inside the step and ahead of it,
padding, share of the rate at which the device multiplies matrices, memory by batch, and how often a step waits for the
device; then float32, texts without padding, adapters and dev rows. Lengths are log-normal, those of queries a quarter
of the documents'.
speed: pairs a second with in-batch negatives, and model FLOPs utilisation. Forward and backward of a token cost 6 FLOP
a weight of the layers, and 12 · layers · width · length in attention; embedding tables are looked up, not multiplied.
largest: the largest batch, doubling until the memory is full, with and without gradient caching.
memory: peak of a large batch by chunks beside the peak of a small one without caching, each in a process of its own.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from gpu_encoding import make_tokenizer, matrix_rate, word_of
from numpy.typing import NDArray
from torch import Tensor
from transformers import BertConfig, BertModel, PreTrainedTokenizerBase
from transformers.models.bert.modeling_bert import BertSelfAttention

from raytower.models.ahead import Ahead
from raytower.models.batch_planner import plan_batches
from raytower.models.chunks import Chunk
from raytower.models.config import LoraConfig
from raytower.models.encoder import Encoder, EncoderSettings
from raytower.models.lora import add_adapters, narrow_frozen
from raytower.models.token_block import TokenBlock
from raytower.models.two_tower import TwoTower, split_columns
from raytower.objectives.config import InBatchNegatives
from raytower.objectives.keys import BatchKeys, text_keys
from raytower.objectives.targets import Targets
from raytower.training.config import OptimizerConfig
from raytower.training.live_engine import LiveEngine
from raytower.training.optimizer import make_optimizer, make_schedule
from raytower.training.step import TrainingStep
from raytower.training.word_gradients import WordGradients

VOCABULARY = 21_128  # BERT-base-chinese's
FIRST_ORDINARY_ID = 106
NUM_COLUMNS = 2
WARM_UP_STEPS = 3
# What `raytower train-retriever` bounds a chunk to.
TOKENS_PER_CHUNK = {"cpu": 1024, "cuda": 65_536}
GOAL_RATIO = 1.3
MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Size:
    """A shape of BERT."""

    layers: int
    width: int
    heads: int
    intermediate: int


SIZES = {
    "base": Size(layers=12, width=768, heads=12, intermediate=3072),
    "small": Size(layers=12, width=384, heads=12, intermediate=1536),
    "tiny": Size(layers=2, width=128, heads=2, intermediate=512),
}


@dataclass(frozen=True)
class Batch:
    """Random texts as token ids. `chunks` are cut already where only the device is to be timed."""

    columns: list[TokenBlock]
    targets: Targets
    chunks: list[Chunk] | None = None

    @property
    def num_pairs(self) -> int:
        return len(self.columns[0])


def main() -> None:
    arguments = parse()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device here; add --device cpu to try the script at tiny sizes")
    if arguments.command is not measure_memory:
        print(describe_device(arguments.device))
    arguments.command(arguments)
    unwanted = {"ray", "faiss"} & set(sys.modules)
    if unwanted:
        raise SystemExit(f"{', '.join(sorted(unwanted))} was imported; the training step must not need it")


def parse() -> argparse.Namespace:
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    shared.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    shared.add_argument("--length", type=int, default=64)
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(required=True)
    speed_parser = commands.add_parser("speed", parents=[shared])
    speed_parser.add_argument("--sizes", nargs="+", choices=list(SIZES))
    speed_parser.add_argument("--batch", type=int, nargs="+")
    speed_parser.add_argument("--steps", type=int, default=10)
    speed_parser.add_argument("--repeats", type=int, default=3)
    speed_parser.add_argument(
        "--peak-tflops", type=float, default=989.0, help="the device's; H100 and H200 dense bf16"
    )
    speed_parser.set_defaults(command=speed)
    all_parser = commands.add_parser("all", parents=[shared])
    all_parser.add_argument("--size", choices=list(SIZES), default="base")
    all_parser.add_argument("--batch", type=int, nargs="+")
    all_parser.add_argument("--chunk", type=int, default=256, help="texts of a chunk of gradient caching")
    all_parser.add_argument("--seconds", type=float, help="how long each rate is measured at least")
    all_parser.set_defaults(command=everything)
    largest_parser = commands.add_parser("largest", parents=[shared])
    largest_parser.add_argument("--sizes", nargs="+", choices=list(SIZES))
    largest_parser.add_argument("--chunk", type=int, default=256)
    largest_parser.add_argument("--max-batch", type=int)
    largest_parser.set_defaults(command=largest)
    for name, command in (("memory", memory), ("measure-memory", measure_memory)):
        memory_parser = commands.add_parser(name, parents=[shared])
        memory_parser.add_argument("--size", choices=list(SIZES), default="small")
        memory_parser.add_argument("--batch", type=int, default=1024)
        memory_parser.add_argument("--small-batch", type=int, default=32)
        memory_parser.add_argument("--chunk", type=int, default=32, help="0: no gradient caching")
        memory_parser.add_argument("--repeats", type=int, default=3)
        memory_parser.set_defaults(command=command)
    return parser.parse_args()


# --- the step ------------------------------------------------------------------------------------------------------


def make_step(
    size: Size,
    arguments: argparse.Namespace,
    tokens_per_chunk: int,
    chunk: int | None,
    prepare: Callable[[TwoTower], None] | None = None,
) -> TrainingStep:
    """A randomly initialised encoder with optimizer and schedule, as a training job makes them, once it is prepared."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        intermediate_size=size.intermediate,
    )
    # Where ids come ready-made, only the padding id is ever asked for.
    is_from_texts = arguments.command is everything
    tokenizer = make_tokenizer() if is_from_texts else SimpleNamespace(pad_token_id=0)
    encoder = Encoder(
        BertModel(config, add_pooling_layer=False),
        cast(PreTrainedTokenizerBase, tokenizer),
        EncoderSettings(),
    )
    tower = TwoTower(encoder, arguments.length, tokens_per_chunk, chunk)
    if prepare is not None:
        prepare(tower)
    tower = tower.to(arguments.device).train()
    optimizer = make_optimizer(tower, OptimizerConfig())
    schedule = make_schedule(optimizer, num_steps=1_000_000, warmup_ratio=0.1)
    dtype = getattr(torch, arguments.dtype)
    return TrainingStep(tower, optimizer, schedule, dtype=dtype, words=WordGradients.of(tower))


def make_batch(num_pairs: int, length: int, vocabulary: int = VOCABULARY) -> Batch:
    generator = torch.Generator().manual_seed(0)
    shape = (NUM_COLUMNS, num_pairs, length)
    ids = torch.randint(FIRST_ORDINARY_ID, vocabulary, shape, generator=generator).tolist()
    queries, documents = ([f"{side}{row}" for row in range(num_pairs)] for side in "qd")
    keys = BatchKeys(query=text_keys(queries), documents=(text_keys(documents),))
    return Batch([TokenBlock.of(column) for column in ids], Targets(keys=keys))


def backward(step: TrainingStep, batch: Batch) -> Tensor:
    """What a retriever's task does with a batch, less tokenising; cached where the tower has rows of a chunk."""
    tower = cast(TwoTower, step.model)
    chunks = batch.chunks or tower.plan_chunks(batch.columns)
    objective = InBatchNegatives()

    def embed(some: list[Chunk]) -> list[Tensor]:
        with step.autocast():
            return cast(list[Tensor], step.parallel(some))

    def loss_of(vectors: Any) -> Tensor:
        return objective(split_columns(vectors, chunks, NUM_COLUMNS), batch.targets)

    if tower.rows_per_batch is None:
        return step.propagate(lambda: loss_of(embed(chunks)))
    return step.propagate_cached(lambda chunk: embed([chunk])[0], chunks, loss_of)


def timed_steps(step: TrainingStep, batch: Batch, num_steps: int) -> float:
    """Seconds of `num_steps` steps, the device idle before and after."""
    synchronise(step.device)
    started = time.perf_counter()
    for number in range(num_steps):
        step.run(number, [batch], backward)
    synchronise(step.device)
    return time.perf_counter() - started


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# --- everything, from texts ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Texts:
    """Pairs as a training job reads them."""

    queries: list[str]
    documents: list[str]


def everything(arguments: argparse.Namespace) -> None:
    """Whole steps from texts for each batch, then float32, adapters and dev rows."""
    device = torch.device(arguments.device)
    on_cpu = device.type == "cpu"
    # `length` is the median of documents here; few are longer than four times that.
    typical, arguments.length = arguments.length, 4 * arguments.length
    seconds = arguments.seconds or (0.5 if on_cpu else 4.0)
    peak = matrix_rate(device, getattr(torch, arguments.dtype))
    print(
        f"\n{arguments.size}, {arguments.dtype}, documents of {typical} and queries of {typical // 4} tokens, medians; "
        f"matrix products here: {peak / 1e12:,.1f} TFLOP/s; cached: chunks of {arguments.chunk} texts\n"
        "on the device: pairs/s of batches that lie there; in the step, ahead: with tokenising; utilisation: of ahead; "
        "filled up: padding of as few chunks as the budget allows; waits: for the device, in a step"
    )
    print(
        "| batch | on the device | in the step | ahead | utilisation | padding | filled up | chunks | waits | MiB |"
        "\n|---|---|---|---|---|---|---|---|---|---|"
    )
    for chunk in (None, arguments.chunk):
        step = make_step(SIZES[arguments.size], arguments, TOKENS_PER_CHUNK[device.type], chunk)
        for num_pairs in arguments.batch or ([16, 64] if on_cpu else [64, 256, 1024, 4096]):
            texts = [make_texts(num_pairs, typical, seed) for seed in range(4)]
            row = unless_out_of_memory(lambda step=step, texts=texts: row_of(step, texts, seconds, peak))
            name = f"{num_pairs:,}" if chunk is None else f"{num_pairs:,} cached"
            print(f"| {name} | {row or 'out of memory' + ' |' * 8} |", flush=True)
        del step
    compare_settings(
        arguments, [make_texts(64 if on_cpu else 256, typical, seed) for seed in range(4)], seconds
    )


def make_texts(num_pairs: int, typical: int, seed: int) -> Texts:
    """Words of log-normal number, with the given median for documents and a quarter of it for queries."""
    random = np.random.default_rng(seed)

    def column(median: float) -> list[str]:
        counts = np.maximum(random.lognormal(np.log(median), 0.6, num_pairs).astype(int), 1)
        return [" ".join(word_of(word) for word in random.integers(0, 20_000, count)) for count in counts]

    return Texts(column(typical / 4), column(typical))


def load_texts(step: TrainingStep, texts: Texts) -> Batch:
    """What a retriever's task does with rows ahead of the step."""
    tower = cast(TwoTower, step.model)
    columns = [tower.tokenise(texts.queries, ""), tower.tokenise(texts.documents, "")]
    keys = BatchKeys(query=text_keys(texts.queries), documents=(text_keys(texts.documents),))
    return Batch(columns, Targets(keys=keys).to(step.device), tower.plan_chunks(columns))


def row_of(step: TrainingStep, texts: Sequence[Texts], seconds: float, peak: float) -> str:
    """The columns of one batch."""
    tower = cast(TwoTower, step.model)
    loaded = [load_texts(step, some) for some in texts]
    num_pairs = loaded[0].num_pairs
    lengths = [TokenBlock.join(batch.columns).lengths for batch in loaded]
    tokens = sum(int(each.sum()) for each in lengths)
    chunks = [chunk for batch in loaded for chunk in batch.chunks or []]
    padded = sum(chunk.inputs["input_ids"].numel() for chunk in chunks)
    filled = [
        plan_batches(each, tower.tokens_per_batch, rows_per_batch=tower.rows_per_batch) for each in lengths
    ]
    flop = sum(flop_of_lengths(step, each) for each in lengths) / len(texts) / num_pairs
    if step.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    on_device = num_pairs * steps_per_second(step, cycle(loaded), seconds)
    peak_mib = f"{peak_bytes(step.device) / MIB:,.0f}" if step.device.type == "cuda" else ""
    in_step = num_pairs * steps_per_second(step, (load_texts(step, some) for some in cycle(texts)), seconds)
    with Ahead(lambda some: load_texts(step, some), cycle(texts)) as batches:
        ahead = num_pairs * steps_per_second(step, batches, seconds)
    return (
        f"{on_device:,.0f} | {in_step:,.0f} | {ahead:,.0f} | {ahead * flop / peak:.1%} | {1 - tokens / padded:.1%} | "
        f"{1 - tokens / sum(plan.num_padded_tokens for plan in filled):.1%} | {len(chunks) / len(texts):.1f} | "
        f"{waits_of(step, loaded[0])} | {peak_mib}"
    )


def steps_per_second(step: TrainingStep, batches: Iterable[Batch], seconds: float) -> float:
    """After some steps to warm up: over at least so many seconds and three steps, the device idle at the end."""
    number, started = 0, 0.0
    for number, batch in enumerate(batches):
        if number == WARM_UP_STEPS:
            synchronise(step.device)
            started = time.perf_counter()
        elif number > WARM_UP_STEPS + 2 and time.perf_counter() - started > seconds:
            break
        step.run(number, [batch], backward)
    synchronise(step.device)
    return (number - WARM_UP_STEPS) / (time.perf_counter() - started)


def waits_of(step: TrainingStep, batch: Batch) -> str:
    """How often the process waits for the device within a step, as torch counts it."""
    if step.device.type != "cuda":
        return ""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        step.run(0, [batch], backward)
        torch.cuda.set_sync_debug_mode("default")
    return str(sum("synchronizing" in str(warning.message) for warning in seen))


def flop_of_lengths(step: TrainingStep, lengths: NDArray[np.int64]) -> float:
    """FLOP of forward and backward over texts of these lengths; padding and recomputed passes do not count."""
    config = cast(TwoTower, step.model).encoder.backbone.config
    weights = config.num_hidden_layers * (
        4 * config.hidden_size**2 + 2 * config.hidden_size * config.intermediate_size
    )
    attention = 12 * config.num_hidden_layers * config.hidden_size
    return float(6 * weights * lengths.sum() + attention * (lengths.astype(float) ** 2).sum())


def drop_no_attention(tower: TwoTower, is_unpadded: bool) -> None:
    """Without dropout of attention, which alone allows texts that lie end to end; then with such, if asked for."""
    for module in tower.modules():
        if isinstance(module, BertSelfAttention):
            module.dropout.p = 0.0
    if is_unpadded:
        tower.eval().leave_out_padding([word_of(1), " ".join(map(word_of, range(9)))])


def compare_settings(arguments: argparse.Namespace, texts: Sequence[Texts], seconds: float) -> None:
    """Float32 by both ways of multiplying, texts without padding, adapters on either kind of base, and dev rows."""
    size, device = SIZES[arguments.size], torch.device(arguments.device)
    tokens = TOKENS_PER_CHUNK[device.type]

    def ways() -> Iterator[tuple[str, TrainingStep]]:
        exact = argparse.Namespace(**{**vars(arguments), "dtype": "float32"})
        for name, precision in (("float32", "highest"), ("float32 by TF32", "high")):
            torch.set_float32_matmul_precision(precision)
            yield name, make_step(size, exact, tokens, None)
        torch.set_float32_matmul_precision("highest")
        for name, is_unpadded in (("padded, no dropout of attention", False), ("unpadded, the same", True)):
            yield (
                name,
                make_step(
                    size,
                    arguments,
                    tokens,
                    None,
                    lambda tower, is_unpadded=is_unpadded: drop_no_attention(tower, is_unpadded),
                ),
            )
        if importlib.util.find_spec("peft") is None:
            print("no adapters: peft is not installed")
            return
        mixed = argparse.Namespace(**{**vars(arguments), "dtype": "bfloat16"})
        for name, is_narrow in (("adapters, base float32", False), ("adapters, base bfloat16", True)):
            yield (
                name,
                make_step(
                    size, mixed, tokens, None, lambda tower, is_narrow=is_narrow: adapt(tower, is_narrow)
                ),
            )

    print(f"\nbatch {len(texts[0].queries)}\n| step | pairs/s | weights, MiB |\n|---|---|---|")
    for name, step in ways():
        with Ahead(lambda some, step=step: load_texts(step, some), cycle(texts)) as batches:
            rate = len(texts[0].queries) * steps_per_second(step, batches, seconds)
        held = sum(p.numel() * p.element_size() for p in step.model.parameters()) / MIB
        print(f"| {name} | {rate:,.0f} | {held:,.1f} |", flush=True)
    step = make_step(size, arguments, tokens, None)
    step.model.eval()
    engine = LiveEngine(
        cast(TwoTower, step.model).encoder, dtype=arguments.dtype, max_length=arguments.length
    )
    documents = [text for some in texts for text in some.documents]
    engine.encode(documents)
    synchronise(device)
    started = time.perf_counter()
    engine.encode(documents)
    synchronise(device)
    print(f"\ndev rows: {len(documents) / (time.perf_counter() - started):,.0f} documents/s")


def adapt(tower: TwoTower, is_narrow: bool) -> None:
    add_adapters(tower.encoder.backbone, LoraConfig())
    if is_narrow:
        narrow_frozen(tower, torch.bfloat16)


# --- speed ---------------------------------------------------------------------------------------------------------


def speed(arguments: argparse.Namespace) -> None:
    """Pairs a second and utilisation for each size and batch: the device alone, and with cutting ids into tensors."""
    on_cpu = arguments.device == "cpu"
    sizes = arguments.sizes or (["tiny"] if on_cpu else ["base", "small"])
    batches = arguments.batch or ([32] if on_cpu else [64, 256, 1024, 4096])
    print(
        f"\n{arguments.dtype}, {arguments.length} tokens a text, medians of {arguments.repeats} x {arguments.steps} "
        f"steps; utilisation of {arguments.peak_tflops:g} TFLOP/s"
    )
    print(
        "| encoder | batch | utilisation | pairs/s | with cutting ids: pairs/s | GFLOP a pair |\n"
        "|---|---|---|---|---|---|"
    )
    for name in sizes:
        gflop = flop_per_pair(SIZES[name], arguments.length) / 1e9
        step = make_step(SIZES[name], arguments, TOKENS_PER_CHUNK[arguments.device], None)
        for num_pairs in batches:
            rates = step_rates(step, make_batch(num_pairs, arguments.length), arguments)
            if rates is None:
                print(f"| {name} | {num_pairs:,} | out of memory | | | {gflop:.1f} |", flush=True)
                continue
            device_rate, whole_rate = rates
            utilisation = device_rate * gflop / (arguments.peak_tflops * 1e3)
            print(
                f"| {name} | {num_pairs:,} | {utilisation:.1%} | {device_rate:,.0f} | {whole_rate:,.0f} | "
                f"{gflop:.1f} |",
                flush=True,
            )


def step_rates(step: TrainingStep, batch: Batch, arguments: argparse.Namespace) -> tuple[float, float] | None:
    """Pairs a second with chunks that lie on the device already, and with chunks cut in every step; None if too big."""

    def measure() -> tuple[float, float]:
        ready = Batch(batch.columns, batch.targets, cast(TwoTower, step.model).plan_chunks(batch.columns))
        timed_steps(step, ready, WARM_UP_STEPS)
        seconds: dict[bool, list[float]] = {True: [], False: []}
        for _ in range(arguments.repeats):
            for is_ready in seconds:
                seconds[is_ready].append(timed_steps(step, ready if is_ready else batch, arguments.steps))
        rates = [batch.num_pairs * arguments.steps / statistics.median(values) for values in seconds.values()]
        return rates[0], rates[1]

    return unless_out_of_memory(measure)


def flop_per_pair(size: Size, length: int) -> float:
    """FLOP of forward and backward of one pair; recomputed passes do not count."""
    weights = size.layers * (4 * size.width**2 + 2 * size.width * size.intermediate)
    per_token = 6 * weights + 12 * size.layers * size.width * length
    return float(NUM_COLUMNS * length * per_token)


def unless_out_of_memory(measure: Callable[[], Any]) -> Any:
    try:
        return measure()
    except torch.OutOfMemoryError:
        pass
    # Outside the handler: the exception's frames hold tensors.
    torch.cuda.empty_cache()
    return None


# --- the largest batch ---------------------------------------------------------------------------------------------


def largest(arguments: argparse.Namespace) -> None:
    """Double the batch until it does not fit, without and with gradient caching."""
    on_cpu = arguments.device == "cpu"
    sizes = arguments.sizes or (["tiny"] if on_cpu else ["base", "small"])
    limit = arguments.max_batch or (256 if on_cpu else 131_072)
    print(
        f"\n{arguments.dtype}, {arguments.length} tokens a text; batches double from 64 to at most {limit:,}"
    )
    print(
        "| encoder | way | largest batch | stopped by | pairs/s there | peak, MiB |\n|---|---|---|---|---|---|"
    )
    for name in sizes:
        tokens = TOKENS_PER_CHUNK[arguments.device]
        ways = {
            "whole batch": (tokens, None),
            f"chunks of {arguments.chunk} texts": (tokens, arguments.chunk),
        }
        for way, (tokens_per_chunk, chunk) in ways.items():
            step = make_step(SIZES[name], arguments, tokens_per_chunk, chunk)
            num_pairs, rate, peak, reason = 0, 0.0, "", f"the limit of {limit:,}"
            attempt = 64
            while attempt <= limit:
                found = try_batch(step, make_batch(attempt, arguments.length))
                if found is None:
                    reason = "memory"
                    break
                num_pairs, (rate, peak) = attempt, found
                attempt *= 2
            print(f"| {name} | {way} | {num_pairs:,} | {reason} | {rate:,.0f} | {peak} |", flush=True)


def try_batch(step: TrainingStep, batch: Batch) -> tuple[float, str] | None:
    """Pairs a second and peak MiB of a second step, or None where it does not fit; a CPU's peak is never reset."""

    def measure() -> tuple[float, str]:
        timed_steps(step, batch, 1)
        if step.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        rate = batch.num_pairs / timed_steps(step, batch, 1)
        return rate, f"{peak_bytes(step.device) / MIB:,.0f}" if step.device.type == "cuda" else ""

    return cast("tuple[float, str] | None", unless_out_of_memory(measure))


# --- memory --------------------------------------------------------------------------------------------------------


def memory(arguments: argparse.Namespace) -> None:
    """Peak of the large batch by chunks beside the small batch uncached; each runs in fresh processes, in turn."""
    ways = {
        f"batch {arguments.small_batch:,}, whole": (arguments.small_batch, 0),
        f"batch {arguments.batch:,}, chunks of {arguments.chunk} texts": (arguments.batch, arguments.chunk),
    }
    found: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for _ in range(arguments.repeats):
        for way, (num_pairs, chunk) in ways.items():
            command = [sys.executable, __file__, "measure-memory", "--device", arguments.device]
            command += [
                "--dtype",
                arguments.dtype,
                "--length",
                str(arguments.length),
                "--size",
                arguments.size,
            ]
            command += ["--batch", str(num_pairs), "--chunk", str(chunk)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
            found[way].append(json.loads(done.stdout.strip().splitlines()[-1]))
    names = ("peak", "above_state")
    medians = {
        way: {name: statistics.median(row[name] for row in rows) for name in names}
        for way, rows in found.items()
    }
    small, large = medians.values()
    print(
        f"\n{arguments.size}, {arguments.dtype}, {arguments.length} tokens a text, medians of {arguments.repeats} "
        "processes, MiB"
    )
    print("| way | peak | above weights, gradients and moments |\n|---|---|---|")
    for way, values in medians.items():
        print(f"| {way} | " + " | ".join(f"{values[name] / MIB:,.0f}" for name in names) + " |")
    ratios = {name: large[name] / max(small[name], 1.0) for name in names}
    print("| ratio | " + " | ".join(f"{ratios[name]:.2f}" for name in names) + " |")
    verdict = "reached" if ratios["peak"] <= GOAL_RATIO else "missed"
    print(f"\nGoal, ratio of peaks at most {GOAL_RATIO}: {verdict} ({ratios['peak']:.2f})")


def measure_memory(arguments: argparse.Namespace) -> None:
    """In a process of its own: the most bytes held during two steps, and how much of it the batch is to blame for.

    peak: all that the process held (on a CPU with its libraries), or that the device's allocator gave out. above_state:
    less what was held after a step of two tiny texts, when weights, gradients, moments and libraries were all there;
    these cost the same whatever the batch, so what is left is what the batch costs.
    """
    # Both ways cut texts alike, so that only what is kept differs.
    tokens_per_chunk = (arguments.chunk or arguments.small_batch) * arguments.length
    step = make_step(SIZES[arguments.size], arguments, tokens_per_chunk, arguments.chunk or None)
    timed_steps(step, make_batch(2, 2), 1)
    batch = make_batch(arguments.batch, arguments.length)
    held = held_bytes(step.device)
    timed_steps(step, batch, 2)
    peak = peak_bytes(step.device)
    print(json.dumps({"peak": peak, "above_state": peak - held}))


def held_bytes(device: torch.device) -> int:
    """Bytes held now: the process's resident memory, or what the device's allocator has given out."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_bytes(device: torch.device) -> int:
    """The most bytes ever held: the process's, or the device's since its last reset."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def describe_device(device: str) -> str:
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {os.cpu_count()} cores, tiny sizes"
    return f"{name}, torch {torch.__version__}"


if __name__ == "__main__":
    main()
