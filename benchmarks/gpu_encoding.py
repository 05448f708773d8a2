"""The forward engine on an accelerator, without Ray and FAISS: texts a second and utilisation of its matrix rate.

    PYTHONPATH=platform python benchmarks/gpu_encoding.py [--dtype bfloat16] [--length 64] [--texts 65536] [--compile]
    PYTHONPATH=platform python benchmarks/gpu_encoding.py --device cpu --small

Needs no model, no data and no network: an encoder of BERT's shape (12 layers of 768) with random weights. The goal is
at least half of the rate at which this device, in this run, multiplies large matrices in the same precision.

Model FLOP of a token: 2 a weight of the layers, and 4 · layers · width · length of its text in attention. Embedding
tables are looked up, not multiplied; padding does not count.

token ids: blocks of random ids of one length, so that nothing is padded: cutting batches, copies and forward.
padded: lengths between a quarter of that and the whole: what padding and masks cost.
strings: words of a random vocabulary through a WordPiece tokenizer in a thread beside the forward: what a worker does.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from raytower.models.block_engine import ForwardStats
from raytower.models.device import TORCH_DTYPES
from raytower.models.encoder import Encoder, EncoderSettings
from raytower.models.forward import ForwardEngine
from raytower.models.token_block import TokenBlock

SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
VOCABULARY = 21_128  # BERT-base-chinese's
GOAL = 0.5
MATRIX_SIZE = {"cuda": 8192, "cpu": 1024}
MEASURE_SECONDS = 2.0


def main() -> None:
    arguments = parse()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device here; add --device cpu --small to try the script")
    device = torch.device(arguments.device)
    engine = make_engine(arguments, device)
    peak = matrix_rate(device, TORCH_DTYPES[arguments.dtype])
    name = (
        torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    )
    print(f"{name}, torch {torch.__version__}, {arguments.dtype}, {arguments.length} tokens a text")
    print(f"matrix products here: {peak / 1e12:,.1f} TFLOP/s")
    print(
        f"{arguments.texts:,} texts, blocks of {engine.block_rows:,}, medians of {arguments.repeats}; "
        f"tokens_per_batch {engine.tokens_per_batch:,}"
    )
    print("\n| input | utilisation | texts/s | tokens/s | padding |\n|---|---|---|---|---|")
    utilisation = {}
    for kind, (run, lengths) in make_runs(engine, arguments).items():
        run()  # kernels are chosen, and compiled, for the shapes that the measured runs have
        stats, seconds = measure(run, device, arguments.repeats)
        utilisation[kind] = flop_of(engine, lengths) / seconds / peak
        padding = 1 - stats.tokens / stats.padded_tokens
        print(
            f"| {kind} | {utilisation[kind]:.1%} | {stats.rows / seconds:,.0f} | {stats.tokens / seconds:,.0f} | "
            f"{padding:.1%} |",
            flush=True,
        )
    print(f"tokens_per_batch afterwards: {engine.tokens_per_batch:,}")
    verdict = "reached" if utilisation["token ids"] >= GOAL else "missed"
    print(f"\nGoal, at least {GOAL:.0%} of the matrix rate: {verdict} ({utilisation['token ids']:.1%})")
    unwanted = {"ray", "faiss"} & set(sys.modules)
    if unwanted:
        raise SystemExit(f"{', '.join(sorted(unwanted))} was imported; the forward engine must not need it")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--dtype", choices=list(TORCH_DTYPES), default="bfloat16")
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--texts", type=int)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokens-per-batch", type=int)
    parser.add_argument("--compile", action="store_true", help="torch.compile the backbone")
    parser.add_argument("--small", action="store_true", help="2 layers of 128 and few texts")
    arguments = parser.parse_args()
    arguments.texts = arguments.texts or (256 if arguments.small else 65_536)
    return arguments


def make_engine(arguments: argparse.Namespace, device: torch.device) -> ForwardEngine:
    """A randomly initialised encoder, mean-pooled and normalised, on the device."""
    torch.manual_seed(0)
    width = 128 if arguments.small else 768
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        num_hidden_layers=2 if arguments.small else 12,
        num_attention_heads=width // 64,
        intermediate_size=4 * width,
    )
    settings = EncoderSettings(max_length=arguments.length)
    encoder = Encoder(BertModel(config, add_pooling_layer=False), make_tokenizer(), settings)
    engine = ForwardEngine(
        encoder, dtype=arguments.dtype, device=device, tokens_per_batch=arguments.tokens_per_batch
    )
    if arguments.compile:
        engine.encoder.backbone.compile(dynamic=True)
    return engine


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Words of letters, each in the vocabulary, by the algorithm of BERT."""
    words = [*SPECIAL_TOKENS, *(word_of(number) for number in range(VOCABULARY - len(SPECIAL_TOKENS)))]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")


def word_of(number: int) -> str:
    letters = ""
    for _ in range(4):
        number, letter = divmod(number, 26)
        letters += chr(ord("a") + letter)
    return letters


def make_runs(
    engine: ForwardEngine, arguments: argparse.Namespace
) -> dict[str, tuple[Callable[[], ForwardStats], np.ndarray]]:
    """The three inputs, each as a run over it and the tokens of its texts."""
    generator = np.random.default_rng(0)
    length, texts = arguments.length, arguments.texts
    ids = generator.integers(len(SPECIAL_TOKENS), VOCABULARY, (texts, length))
    lengths = generator.integers(max(length // 4, 1), length + 1, texts)
    whole = cut(list(ids), engine.block_rows)
    ragged = cut([row[:count] for row, count in zip(ids, lengths, strict=True)], engine.block_rows)
    strings = [" ".join(word_of(number) for number in row) for row in ids[:, : length - 2].tolist()]

    def run_blocks(blocks: list[TokenBlock]) -> ForwardStats:
        stats = ForwardStats()
        for block in blocks:
            engine.forward_block(block, stats)
        return stats

    def run_strings() -> ForwardStats:
        stats = ForwardStats()
        blocks = (strings[start : start + engine.block_rows] for start in range(0, texts, engine.block_rows))
        with engine.tokenise_ahead(blocks) as tokenised:
            for block in tokenised:
                engine.forward_block(block, stats)
        return stats

    full = np.full(texts, length)
    return {
        "token ids": (lambda: run_blocks(whole), full),
        "padded": (lambda: run_blocks(ragged), lengths),
        "strings": (run_strings, full),
    }


def cut(rows: list[np.ndarray], block_rows: int) -> list[TokenBlock]:
    return [TokenBlock.of(rows[start : start + block_rows]) for start in range(0, len(rows), block_rows)]


def measure(
    run: Callable[[], ForwardStats], device: torch.device, repeats: int
) -> tuple[ForwardStats, float]:
    """What one run counted, and the median seconds of a run; vectors have left the device when it ends."""
    seconds = []
    for _ in range(repeats):
        synchronise(device)
        started = time.perf_counter()
        stats = run()
        synchronise(device)
        seconds.append(time.perf_counter() - started)
    return stats, statistics.median(seconds)


def flop_of(engine: ForwardEngine, lengths: np.ndarray) -> float:
    """Model FLOP of texts with these numbers of tokens."""
    config = engine.encoder.backbone.config
    weights = config.num_hidden_layers * (
        4 * config.hidden_size**2 + 2 * config.hidden_size * config.intermediate_size
    )
    attention = 4 * config.num_hidden_layers * config.hidden_size
    return float(2 * weights * lengths.sum() + attention * (lengths.astype(float) ** 2).sum())


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP a second of square products, the median over at least some seconds after warming up."""
    size = MATRIX_SIZE[device.type]
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    rates: list[float] = []
    begun = time.perf_counter()
    while time.perf_counter() - begun < MEASURE_SECONDS or len(rates) < 5:
        synchronise(device)
        started = time.perf_counter()
        for _ in range(10):
            torch.matmul(left, right)
        synchronise(device)
        rates.append(10 * 2 * size**3 / (time.perf_counter() - started))
    return statistics.median(rates[1:])


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    main()
