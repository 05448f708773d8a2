"""An encoder and a reranker for Chinese questions from all judged pairs, and what each step of search finds.

    python benchmarks/zh_questions.py --work DIR [--data DIR] [--model DIR] [--corpus-rows 20000] [--rerankers]

Puts the files that docs/results/zh_questions/*.yaml name into DIR, runs pipeline.yaml and measure.yaml there by
`raytower pipeline` (which goes on where it was, and runs nothing twice), and prints the table of all dev queries in
the whole corpus, or in a sample that holds every relevant text. `--rerankers`: rerankers.yaml too, and its table.
Pairs for tuning are held out by whole groups of paraphrases, so that no training text says what one of them does.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import questions as zh
from numpy.typing import NDArray

PIPELINES = zh.REPOSITORY / "docs" / "results" / "zh_questions"
METRICS = ("recall@1", "recall@10", "recall@50", "mrr@10", "ndcg@10")
# Title, output of its evaluation, and the output that its gain is counted from.
ROWS = (
    ("zero-shot, dense", "zero_shot", None),
    ("zero-shot, hybrid", "zero_shot_hybrid", "zero_shot"),
    ("trained, dense", "trained", "zero_shot"),
    ("trained, hybrid", "trained_hybrid", "trained"),
    ("trained, 20 reranked", "reranked", "trained"),
)
RERANKERS = ("pointwise_bce", "pointwise_classes", "pairwise", "listwise", "distilled", "reranker")
HELD_OUT = 1_600
Row = TypeVar("Row")
_LARGEST_GROUP = 12
_TUNE_ROWS = 20_000
_KINDS_PAIRS = 20_000
_KINDS_QUERIES = 1_000


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=zh.DEFAULT_DATA)
    parser.add_argument("--model", type=Path, default=zh.DEFAULT_MODEL)
    parser.add_argument("--corpus-rows", type=int, help="without it the whole corpus is searched")
    parser.add_argument("--rerankers", action="store_true")
    arguments = parser.parse_args()
    prepare(arguments.work, arguments.data / "zh_questions", arguments.model.resolve())
    put_corpus(arguments)
    for name in ("pipeline.yaml", "measure.yaml", *(["rerankers.yaml"] if arguments.rerankers else [])):
        shutil.copyfile(PIPELINES / name, arguments.work / name)
        command = [sys.executable, "-m", "raytower.cli", "pipeline", "--config", name]
        environment = {"HF_HUB_OFFLINE": "1", **os.environ}
        if code := subprocess.run(command, cwd=arguments.work, env=environment).returncode:
            raise SystemExit(f"{name} ended with {code}; run this again to go on")
    print("\n".join(table(arguments.work / "runs")))
    if arguments.rerankers:
        print("\n" + "\n".join(table_of_rerankers(arguments.work / "runs")))


def prepare(work: Path, data: Path, model: Path) -> None:
    """The files of pipeline.yaml, by fixed seeds."""
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "model").exists():
        (work / "model").symlink_to(model)
    pairs = [pair_of(row) for row in zh.read_lines(data / "recall" / "train.tsv")]
    group_of = groups(pairs)
    held = held_out(pairs, group_of)
    tune = [pair for pair in pairs if group_of[pair[0]] in held]
    train = shuffled([pair for pair in pairs if group_of[pair[0]] not in held], seed=1)
    held_texts = {text for pair in tune for text in pair}
    rows = [row.split("\t") for row in zh.read_lines(data / "sort" / "train_labeled.tsv")[1:]]
    judged = [
        {"query": query, "document": document, "score": int(label)}
        for query, document, label in rows
        if query not in held_texts and document not in held_texts
    ]
    relevant = list(dict.fromkeys(document for _, document in tune))
    others = dict.fromkeys(zh.read_lines(data / "recall" / "train_unsupervised.txt"))
    drawn = shuffled([text for text in others if text not in held_texts])[: _TUNE_ROWS - len(relevant)]
    lines = [json.dumps(row, ensure_ascii=False) for row in judged]
    put(work / "train.tsv", ["\t".join(pair) for pair in train])
    put(work / "judged.jsonl", lines)
    put(work / "texts.txt", list(dict.fromkeys(text for pair in train for text in pair)))
    put(work / "tune.tsv", ["\t".join(pair) for pair in tune])
    put(work / "tune_corpus.txt", [*relevant, *drawn])
    put(work / "dev.tsv", zh.read_lines(data / "recall" / "dev.tsv"))
    put(work / "dev_labeled.tsv", zh.read_lines(data / "sort" / "dev_labeled.tsv"))
    put_for_kinds(work, data, lines, held_texts)


def put_for_kinds(work: Path, data: Path, judged: Sequence[str], held_texts: set[str]) -> None:
    """All triples, and the files of rerankers.yaml: as many (query, document) pairs for each kind."""
    header, *rows = zh.read_lines(data / "sort" / "train_pairwise.tsv")
    triples = [
        row for row in rows if not held_texts.intersection(texts := row.split("\t")) and texts[1] != texts[2]
    ]
    dev: dict[str, list[str]] = {}
    for row in zh.read_lines(work / "dev.tsv"):
        dev.setdefault(pair_of(row)[0], []).append(row)
    put(work / "judged_20k.jsonl", shuffled(judged)[:_KINDS_PAIRS])
    put(work / "triples.tsv", [header, *triples])
    put(work / "triples_10k.tsv", [header, *triples[: _KINDS_PAIRS // 2]])
    # Two of three get negatives, two each.
    put(work / "train_10k.tsv", zh.read_lines(work / "train.tsv")[: _KINDS_PAIRS // 2])
    put(work / "dev_1k.tsv", [row for query in shuffled(list(dev))[:_KINDS_QUERIES] for row in dev[query]])


def put_corpus(arguments: argparse.Namespace) -> None:
    if arguments.corpus_rows is None:
        texts = list(dict.fromkeys(zh.read_lines(arguments.data / "zh_questions" / "recall" / "corpus.tsv")))
    else:
        texts = zh.dev_sample(arguments.data, arguments.corpus_rows).corpus
    put(arguments.work / "corpus.txt", texts)


def put(path: Path, lines: Sequence[str]) -> None:
    """Write where it changes something: the pipeline runs anew what reads a file that is newer."""
    text = "".join(f"{line}\n" for line in lines)
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        zh.write_atomically(path, text)


def shuffled(rows: Sequence[Row], seed: int = zh.SAMPLE_SEED) -> list[Row]:
    found = list(rows)
    random.Random(seed).shuffle(found)
    return found


def pair_of(row: str) -> tuple[str, str]:
    left, right = row.split("\t")
    return left, right


def groups(pairs: zh.Pairs) -> dict[str, str]:
    """The group of each text: texts that a chain of pairs connects are one group (union-find)."""
    parent: dict[str, str] = {}

    def root(text: str) -> str:
        while parent.setdefault(text, text) != text:
            parent[text] = text = parent[parent[text]]
        return text

    for left, right in pairs:
        parent[root(left)] = root(right)
    return {text: root(text) for text in list(parent)}


def held_out(pairs: zh.Pairs, group_of: dict[str, str]) -> set[str]:
    """Groups drawn until they hold `HELD_OUT` pairs, none of them large."""
    sizes: dict[str, int] = {}
    for left, _ in pairs:
        sizes[group_of[left]] = sizes.get(group_of[left], 0) + 1
    held: set[str] = set()
    count = 0
    for name in shuffled(sorted(sizes), seed=7):
        if count >= HELD_OUT:
            break
        if sizes[name] <= _LARGEST_GROUP:
            held.add(name)
            count += sizes[name]
    return held


def table(runs: Path) -> list[str]:
    """A row for each step that was measured: its metrics, and its gain with paired intervals over queries."""
    found = {
        name: read_values(runs / name) for _, name, _ in ROWS if (runs / name / "per_query.jsonl").is_file()
    }
    lines = [
        "| step | " + " | ".join(METRICS) + " | gain in recall@1 | recall@10 | mrr@10 | ndcg@10 |",
        "|---" * (len(METRICS) + 5) + "|",
    ]
    for title, name, base in ROWS:
        if name not in found:
            continue
        cells = [title, *(f"{found[name][metric].mean():.4f}" for metric in METRICS)]
        for metric in ("recall@1", "recall@10", "mrr@10", "ndcg@10"):
            has_base = base is not None and base in found
            cells.append(
                zh.difference_with_interval(found[name][metric], found[str(base)][metric]) if has_base else ""
            )
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def table_of_rerankers(runs: Path) -> list[str]:
    """A row for each reranker: its AUC, and nDCG@10 and MRR@10 of 20 and 100 candidates beside recall alone."""
    lines = [
        "| reranker | training, s | AUC | weight | candidates | ms a query | ndcg@10 | gain | mrr@10 | gain |",
        "|---" * 10 + "|",
    ]
    every = read_queries(runs / "trained")
    for name in RERANKERS:
        card = json.loads((runs / name / "raytower.json").read_text(encoding="utf-8"))
        for depth in (20, 100):
            output = runs / f"{name}_{depth}"
            report = json.loads((output / "report.json").read_text(encoding="utf-8"))
            found = read_queries(output)
            cells = [name, f"{card['figures']['seconds']:.0f}", f"{card['figures']['best']:.4f}"]
            cells += [
                f"{card['fusion']['weight']:.2f}",
                str(depth),
                f"{report['milliseconds']['rerank'] / len(found):.0f}",
            ]
            for metric in ("ndcg@10", "mrr@10"):
                values = np.array([row[metric] for row in found.values()])
                base = np.array([every[query][metric] for query in found])
                cells += [f"{values.mean():.4f}", zh.difference_with_interval(values, base)]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def read_queries(output: Path) -> dict[str, dict[str, float]]:
    """The metrics of each query of an evaluation, in the order of its file."""
    rows = [json.loads(line) for line in zh.read_lines(output / "per_query.jsonl")]
    return {row["query"]: row["metrics"] for row in rows}


def read_values(output: Path) -> dict[str, NDArray[np.float64]]:
    """Each metric of an evaluation by query (Q,)."""
    rows = read_queries(output).values()
    return {metric: np.array([row[metric] for row in rows]) for metric in METRICS}


if __name__ == "__main__":
    main()
