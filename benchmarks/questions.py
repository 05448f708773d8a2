"""What the scripts on zh_questions share: the seeded samples, exact recall of an encoder on them, intervals.

The dev sample is the same for every encoder and seed: all dev queries against a corpus sample that holds every
relevant text. Search is exact, so no index stands between an encoder and its figures. Imports no Ray.

Shape legend: Q queries, C corpus texts, D embedding dimension, K depth.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from raytower.metrics import bootstrap_interval, ranking_metrics
from raytower.models.encoder import Encoder
from raytower.models.forward import ForwardEngine

REPOSITORY = Path(__file__).resolve().parents[1]
DEFAULT_DATA = REPOSITORY.parent / "shared" / "data"
DEFAULT_MODEL = REPOSITORY.parent / "shared" / "models" / "e5-small-zh-en"
# This model has one prompt for both sides of a symmetric task.
PREFIX = "query: "
MAX_LENGTH = 64
SAMPLE_SEED = 0
_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
_QUERIES_PER_BLOCK = 256

Pairs = list[tuple[str, str]]


@dataclass(frozen=True)
class DevSample:
    """Queries, a corpus sample, and for each query the places of its relevant texts in the corpus."""

    queries: list[str]
    corpus: list[str]
    relevant: list[list[int]]


def training_pairs(data: Path, num_pairs: int) -> Pairs:
    """The first `num_pairs` training pairs after a seeded shuffle of all of them."""
    rows = read_lines(data / "zh_questions" / "recall" / "train.tsv")
    random.Random(SAMPLE_SEED).shuffle(rows)
    if num_pairs > len(rows):
        raise SystemExit(
            f"--pairs {num_pairs} is more than the {len(rows)} training pairs there are; lower it"
        )
    return [(left, right) for left, right in (row.split("\t") for row in rows[:num_pairs])]


def training_texts(data: Path, num_texts: int) -> list[str]:
    """The first `num_texts` unlabelled texts after a seeded shuffle of all of them."""
    rows = read_lines(data / "zh_questions" / "recall" / "train_unsupervised.txt")
    random.Random(SAMPLE_SEED).shuffle(rows)
    return rows[:num_texts]


def dev_sample(
    data: Path, corpus_rows: int, num_queries: int | None = None, *, drawn_queries: bool = False
) -> DevSample:
    """All dev queries (or the first `num_queries`), every text relevant to one of them, and a seeded draw of others.

    The first queries are of few sources; `drawn_queries` draws as many from all.
    """
    relevant: dict[str, dict[str, None]] = {}
    for row in read_lines(data / "zh_questions" / "recall" / "dev.tsv"):
        query, document = row.split("\t")
        relevant.setdefault(query, {})[document] = None
    names = list(relevant)
    if drawn_queries:
        random.Random(SAMPLE_SEED).shuffle(names)
    queries = names[:num_queries]
    needed = dict.fromkeys(document for query in queries for document in relevant[query])
    texts = dict.fromkeys(read_lines(data / "zh_questions" / "recall" / "corpus.tsv"))
    others = [text for text in texts if text not in needed]
    drawn = random.Random(SAMPLE_SEED).sample(others, min(max(corpus_rows - len(needed), 0), len(others)))
    corpus = [*needed, *drawn]
    places = {text: place for place, text in enumerate(corpus)}
    return DevSample(queries, corpus, [[places[text] for text in relevant[query]] for query in queries])


def measure(encoder_dir: str | Path, dev: DevSample, ks: Sequence[int]) -> dict[str, Any]:
    """Recall at each of `ks` by exact search over bfloat16 vectors, as a record that `recall_values` reads back.

    The record holds for each query its number of relevant texts and, for each k, how many were found: one base-36
    digit a query, so that intervals can be computed later without the vectors.
    """
    started = time.perf_counter()
    engine = ForwardEngine(Encoder.load(encoder_dir), dtype="bfloat16", max_length=MAX_LENGTH)
    query_QD = torch.from_numpy(engine.encode(dev.queries, PREFIX))
    corpus_CD = torch.from_numpy(engine.encode(dev.corpus, PREFIX))
    depth = min(max(ks), len(dev.corpus))
    blocks = [
        (block_qD @ corpus_CD.T).topk(depth, dim=1).indices for block_qD in query_QD.split(_QUERIES_PER_BLOCK)
    ]
    ranked = [[str(place) for place in row] for row in torch.cat(blocks).tolist()]
    judged = [{str(place): 1.0 for place in places} for places in dev.relevant]
    values = ranking_metrics(ranked, judged, ks)
    num_relevant = np.array([len(places) for places in dev.relevant])
    return {
        **{f"recall@{k}": float(values[f"recall@{k}"].mean()) for k in ks},
        "queries": len(dev.queries),
        "corpus_rows": len(dev.corpus),
        "relevant": _to_digits(num_relevant),
        "found": {str(k): _to_digits(values[f"recall@{k}"] * num_relevant) for k in ks},
        "measure_seconds": round(time.perf_counter() - started, 1),
    }


def recall_values(record: dict[str, Any], k: int) -> NDArray[np.float64]:
    """Recall@k of each query (Q,) from what `measure` returned."""
    return _from_digits(record["found"][str(k)]) / _from_digits(record["relevant"])


def with_interval(values: NDArray[np.float64]) -> str:
    """The mean of per-query values with its 95 % bootstrap interval over queries."""
    low, high = bootstrap_interval(values)
    return f"{values.mean():.4f} [{low:.4f}, {high:.4f}]"


def difference_with_interval(values: NDArray[np.float64], base: NDArray[np.float64]) -> str:
    """The mean difference of two encoders on the same queries, resampled together (paired bootstrap)."""
    difference = values - base
    low, high = bootstrap_interval(difference)
    return f"{difference.mean():+.4f} [{low:+.4f}, {high:+.4f}]"


def read_lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").rstrip("\n").split("\n")


def write_rows(path: Path, rows: Sequence[Sequence[str]]) -> None:
    """Tab-separated rows, one a line; a row of one text is the line itself."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join("\t".join(row) + "\n" for row in rows))


def write_record(path: Path, record: dict[str, Any]) -> None:
    """One JSON file, whole or not at all: an interrupted run leaves no half result to be skipped over."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(record, ensure_ascii=False, indent=1) + "\n")


def read_record(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))


def is_done(path: Path, settings: dict[str, Any]) -> bool:
    """Whether `path` is a record of these settings. Ends the script where it was made with others."""
    if not path.is_file():
        return False
    found = read_record(path)["settings"]
    if found != settings:
        changed = sorted(name for name in {*settings, *found} if found.get(name) != settings.get(name))
        raise SystemExit(
            f"{path} was made with another {', '.join(changed)}; choose another folder or remove it"
        )
    return True


def write_atomically(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def _to_digits(counts: NDArray[Any]) -> str:
    return "".join(_DIGITS[round(float(count))] for count in counts)


def _from_digits(text: str) -> NDArray[np.float64]:
    return np.array([_DIGITS.index(digit) for digit in text], dtype=np.float64)
