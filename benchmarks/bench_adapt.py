"""`raytower adapt` where the truth is known: trained on structure alone, then asked what people have judged.

    python benchmarks/bench_adapt.py insuranceqa --work DIR [--model DIR] [--rows 1500] [--queries 300]
    python benchmarks/bench_adapt.py csl --work DIR [--model DIR] [--rows 1200]

insuranceqa: answers without their questions, by the rule `lead` (first sentence and rest). Then the real questions of
the test split search the whole answers, with the encoder that was given and with the trained one.
csl: abstracts whose line begins with a title, by the rules title and category; dev titles search abstracts, so its
pseudo-dev set is as near to judged queries as structure comes.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from questions import DEFAULT_MODEL

from raytower.adapt.config import AdaptConfig
from raytower.adapt.job import adapt
from raytower.config import make_config
from raytower.encoding.config import EncodeConfig
from raytower.encoding.job import encode
from raytower.evaluation.config import EvaluateConfig
from raytower.evaluation.evaluate import evaluate
from raytower.index.build import build_index
from raytower.index.config import IndexBuildConfig

_CSL = DEFAULT_MODEL.parent.parent / "data" / "csl_disciplines" / "train.txt"
_TITLE_LENGTHS = range(6, 41)
_MIN_ABSTRACT = 60


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("set", choices=("insuranceqa", "csl"))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", default=str(DEFAULT_MODEL))
    parser.add_argument("--data", type=Path, default=_CSL)
    parser.add_argument("--rows", type=int, default=1_200)
    parser.add_argument("--queries", type=int, default=300)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--dev-share", type=float, default=0.25)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    rules = ["lead"] if arguments.set == "insuranceqa" else ["title", "category"]
    (insurance if arguments.set == "insuranceqa" else csl)(arguments)
    config: dict[str, Any] = {
        "model": arguments.model,
        "corpus": str(arguments.work / "corpus.jsonl"),
        "output": str(arguments.work / "adapted"),
        "dev_share": arguments.dev_share,
        "pairs": {"rules": rules},
        "training": {
            "batch_size": arguments.batch_size,
            "epochs": 1,
            "max_length": arguments.max_length,
            "dtype": "bfloat16",
            "objective": {"name": "in_batch_negatives", "scale": 50},
            "optimizer": {"lr": arguments.lr},
        },
        "encoding": {"max_length": arguments.max_length, "dtype": "bfloat16"},
        "indexing": {"kind": "flat"},
        "mining": {"num_negatives": 1, "max_length": arguments.max_length, "dtype": "bfloat16"},
    }
    print(json.dumps(adapt(make_config(AdaptConfig, config)), indent=1, ensure_ascii=False))
    if arguments.set == "insuranceqa":
        judge(arguments)


def insurance(arguments: argparse.Namespace) -> None:
    """corpus.jsonl of answers, and judged.tsv of real questions, each with an answer that stands in it."""
    import insuranceqa_data

    draw = random.Random(0)
    answers = {name: _tidy(each["en"]) for name, each in insuranceqa_data.load_answers().items()}
    test = insuranceqa_data.load_test()
    names = draw.sample(sorted(test, key=int), arguments.queries)
    judged = [(_tidy(test[name]["en"]), answer) for name in names for answer in test[name]["answers"]]
    needed = sorted({answer for _, answer in judged}, key=int)
    others = sorted(set(answers) - set(needed), key=int)
    chosen = needed + draw.sample(others, max(arguments.rows - len(needed), 0))
    _write(arguments.work / "corpus.jsonl", ({"id": name, "text": answers[name]} for name in chosen))
    _write(
        arguments.work / "judged.jsonl",
        ({"query": question, "document": answers[name]} for question, name in judged),
    )


def csl(arguments: argparse.Namespace) -> None:
    rows = []
    for number, line in enumerate(arguments.data.read_text(encoding="utf-8").splitlines()):
        text, _, label = line.partition("\t")
        title, _, abstract = text.partition(" ")
        if (
            len(title) in _TITLE_LENGTHS
            and len(abstract) >= _MIN_ABSTRACT
            and not set(title) & set(",，。;；")
        ):
            rows.append({"id": str(number), "title": title, "text": abstract, "category": label})
    _write(arguments.work / "corpus.jsonl", rows[: arguments.rows])


def judge(arguments: argparse.Namespace) -> None:
    """The real questions over the whole answers, by both encoders, and their paired difference."""
    work, reports = arguments.work, []
    for name, encoder in (
        ("given", arguments.model),
        ("trained", str(work / "adapted" / "rounds" / "round-1" / "encoder")),
    ):
        embeddings, index = str(work / name / "embeddings"), str(work / name / "index")
        values = {"encoder": encoder, "input": str(work / "corpus.jsonl"), "output": embeddings}
        encode(make_config(EncodeConfig, {**values, "max_length": arguments.max_length, "dtype": "bfloat16"}))
        build_index(
            make_config(IndexBuildConfig, {"embeddings": embeddings, "output": index, "kind": "flat"})
        )
        reports.append(str(work / name / "report"))
        queries = str(work / "judged.jsonl")
        evaluate(
            make_config(
                EvaluateConfig,
                {
                    "encoder": encoder,
                    "index": index,
                    "queries": queries,
                    "metrics": ["ndcg@10", "recall@10"],
                    "output": reports[-1],
                },
            )
        )
    for metric in ("ndcg@10", "recall@10"):
        compared = evaluate(make_config(EvaluateConfig, {"compare": reports, "metrics": [metric]}))
        print(json.dumps({"judged questions": metric, **compared["comparisons"][0]}))


def _tidy(text: str) -> str:
    return " ".join(text.split())


def _write(path: Path, rows: Iterable[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
