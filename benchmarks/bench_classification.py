"""Labels by label texts, by votes of labelled texts and by a linear classifier over the same vectors, on three sets.

    python benchmarks/bench_classification.py --data DIR --model DIR --work DIR [--texts 2000] [--engine onnx]

DIR of --data holds csl_disciplines and finance_questions; the 12 domains are those of the package insuranceqa-data (in
Chinese). The encoder is as its authors left it. Of each set `--texts` texts are the corpus (or train the linear
classifier), up to 1,000 tune votes and chances, up to 1,000 others are measured. Neighbours are found exactly. Vectors
are kept in --work. Then: 10 of the disciplines that no text is trained or voted with, labels that were changed by
chance and how many are found, and the time.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import json
import random
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from raytower.annotation.config import TuneClassifyConfig
from raytower.annotation.deciding import Decider
from raytower.annotation.label_figures import LabelTally
from raytower.annotation.labels import Prediction, count_votes, rank_labels
from raytower.annotation.suspecting import suspect
from raytower.annotation.tune_classify import choose_calibration, choose_cut, choose_votes
from raytower.models.compute import EngineChoice
from raytower.models.encoder import Encoder
from raytower.models.forward import ForwardEngine

MAX_LENGTH = 64
MAX_K = 50
NUM_HIDDEN, NUM_EXAMPLES = 10, 5
Rows = list[tuple[str, str]]
Vectors = NDArray[np.float32]
# Descriptions in the language of the texts; several a label.
DOMAINS = {
    "life-insurance": ["人寿保险", "寿险保单和受益人"],
    "medicare-insurance": ["联邦医疗保险", "老年人医疗保险"],
    "auto-insurance": ["汽车保险", "车险"],
    "health-insurance": ["健康保险", "医疗保险"],
    "home-insurance": ["房屋保险", "房主的家庭财产保险"],
    "renters-insurance": ["租客保险", "租房者的财产保险"],
    "disability-insurance": ["残疾保险", "伤残收入保险"],
    "annuities": ["年金", "年金险"],
    "retirement-plans": ["退休计划", "退休金账户"],
    "long-term-care-insurance": ["长期护理保险", "护理险"],
    "critical-illness-insurance": ["重疾险", "重大疾病保险"],
    "other-insurance": ["其他保险", "别的险种"],
}
FINANCE = {
    "finance": ["银行、贷款、信用卡的问题", "股票、基金、投资理财", "价格、优惠、支付、货币"],
    "general": ["日常生活的问题", "影视、游戏、软件、音乐", "学校、旅游、美食、健康"],
}


@dataclass(frozen=True)
class Data:
    """Rows of one set, and what describes each label."""

    name: str
    corpus: Rows
    dev: Rows
    test: Rows
    descriptions: dict[str, list[str]]
    positive: str | None = None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--engine", choices=["torch", "onnx"], default="torch")
    parser.add_argument("--texts", type=int, default=2_000)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    vectors = CachedVectors(arguments.model, arguments.engine, arguments.work)
    for data in (disciplines(arguments), finance(arguments), domains(arguments)):
        labels = np.unique([label for _, label in data.corpus])
        print(
            f"\n{data.name}: {len(labels)} labels; corpus {len(data.corpus)}, dev {len(data.dev)}, "
            f"test {len(data.test)}"
        )
        measure(data, vectors)
    hide_labels(disciplines(arguments), vectors)
    change_labels(disciplines(arguments), vectors)


class CachedVectors:
    """Vectors by role and text, kept in a file for each call's texts."""

    def __init__(self, model: str, engine: EngineChoice, work: Path) -> None:
        self._engine = ForwardEngine(Encoder.load(model), engine=engine, max_length=MAX_LENGTH)
        self._work = work

    def of(self, name: str, texts: Sequence[str]) -> Vectors:
        place = self._work / f"{name}-{len(texts)}.npy"
        if not place.exists():
            start = time.perf_counter()
            # A text is found by another text, and a label's words stand beside it: one prefix for all.
            np.save(place, self._engine.encode(list(texts), "query: "))
            print(f"{name}: {len(texts) / (time.perf_counter() - start):.0f} texts/s")
        found: Vectors = np.load(place)
        return found


def disciplines(arguments: argparse.Namespace) -> Data:
    folder = arguments.data / "csl_disciplines"
    train, dev = (
        [tuple(line.rstrip("\n").rsplit("\t", 1)) for line in (folder / name).open(encoding="utf-8")]
        for name in ("train.txt", "dev.txt")
    )
    labels = (folder / "label.txt").read_text(encoding="utf-8").split("\n")
    words = {label: [label.split("##")[-1], label.replace("##", " ")] for label in labels if label}
    random.Random(0).shuffle(train)
    return Data("csl_disciplines", train[: arguments.texts], dev[::2], dev[1::2], words)


def finance(arguments: argparse.Namespace) -> Data:
    folder = arguments.data / "finance_questions"
    train, dev = (
        [(row["text"], row["label"]) for row in map(json.loads, (folder / name).open(encoding="utf-8"))]
        for name in ("train.jsonl", "dev.jsonl")
    )
    random.Random(0).shuffle(train)
    return Data("finance_questions", train[: arguments.texts], dev[:1000], dev[1000:2000], FINANCE, "finance")


def domains(arguments: argparse.Namespace) -> Data:
    spec = importlib.util.find_spec("insuranceqa_data")
    assert spec is not None, "pip install insuranceqa-data==1.2"
    assert spec.origin is not None
    sets = []
    for name in ("train", "valid", "test"):
        with gzip.open(Path(spec.origin).parent / f"{name}.json.gz", "rt", encoding="utf-8") as file:
            sets.append([(row["zh"], row["domain"]) for row in json.load(file).values()])
        random.Random(0).shuffle(sets[-1])
    train, valid, test = sets
    return Data("InsuranceQA domains", train[: arguments.texts], valid[:1000], test[:1000], DOMAINS)


def measure(data: Data, vectors: CachedVectors) -> None:
    name = data.name.split()[0]
    corpus, dev, test = (
        vectors.of(f"{name}-{part}", [text for text, _ in rows])
        for part, rows in (("corpus", data.corpus), ("dev", data.dev), ("test", data.test))
    )
    described = [(text, label) for label, texts in data.descriptions.items() for text in texts]
    words = vectors.of(f"{name}-labels", [text for text, _ in described])
    report(
        data,
        "labels",
        "labels",
        [rank_labels(row) for row in nearest(dev, words, described, len(described))],
        [rank_labels(row) for row in nearest(test, words, described, len(described))],
    )
    found_dev, found_test = (nearest(each, corpus, data.corpus, MAX_K) for each in (dev, test))
    way, _ = choose_votes(found_dev, [label for _, label in data.dev], "accuracy", MAX_K)
    report(
        data,
        f"votes ({way.votes}, k {way.k}, T {way.temperature})",
        "votes",
        [way.count(row) for row in found_dev],
        [way.count(row) for row in found_test],
    )
    start = time.perf_counter()
    linear = LogisticRegression(C=100, max_iter=1000, random_state=0)
    linear.fit(corpus, [label for _, label in data.corpus])
    seconds = time.perf_counter() - start
    report(
        data,
        f"linear classifier over the vectors (C 100, {seconds:.1f} s)",
        "classifier",
        probabilities(linear, dev),
        probabilities(linear, test),
    )


def nearest(
    queries: Vectors, corpus: Vectors, rows: Rows, k: int, leave_out: bool = False
) -> list[list[tuple[str, float]]]:
    """Label and cosine of the k nearest rows of each query; `leave_out`: query i is row i, and copies do not count."""
    cosines = queries @ corpus.T
    found = []
    for number, scores in enumerate(cosines):
        order = np.argsort(-scores, kind="stable")
        if leave_out:
            order = np.array([place for place in order[: 4 * k] if rows[place][0] != rows[number][0]])
        found.append([(rows[place][1], float(scores[place])) for place in order[:k]])
    return found


def probabilities(linear: LogisticRegression, vectors: Vectors) -> list[list[Prediction]]:
    ranked = []
    for row in linear.predict_proba(vectors):
        order = np.argsort(-row, kind="stable")[:MAX_K]
        ranked.append([Prediction(str(linear.classes_[place]), float(row[place])) for place in order])
    return ranked


def report(
    data: Data, way: str, mode: Any, dev: list[list[Prediction]], test: list[list[Prediction]]
) -> None:
    """Tune chances and the cut on dev, measure on test."""
    expected = [label for _, label in data.dev]
    settings = {"classifier": "c"} if mode == "classifier" else {"encoder": "e", "index": "i"}
    config = TuneClassifyConfig.model_validate(
        {**settings, "mode": mode, "input": {"path": "dev"}, "output": "o", "positive": data.positive}
    )
    calibration, _ = choose_calibration(config, dev, expected)
    cut, _ = choose_cut(config, Decider(mode, calibration=calibration), dev, expected)
    figures = tally(Decider(mode, positive=data.positive), test, data.test)
    tuned = tally(Decider(mode, calibration=calibration, positive=data.positive, cut=cut), test, data.test)
    assert calibration is not None
    line = {
        "accuracy": figures["accuracy"],
        "interval": figures["intervals"]["accuracy"],
        "f1_macro": figures["f1_macro"],
        "hit@5": figures.get("hit@5"),
        "ece raw": figures.get("ece"),
        f"ece {calibration.kind}": tuned["ece"],
        "surest half": tuned["coverage"][min(4, len(tuned["coverage"]) - 1)],
    }
    if "levels" in figures:
        line["levels"] = [each["accuracy"] for each in figures["levels"]]
    if data.positive:
        line["positive"] = {
            key: tuned["positive"][key] for key in ("average_precision", "precision", "recall")
        }
        line["positive f1, first label"] = figures["positive"]["f1"]
        line["positive f1 at the cut"] = tuned["positive"]["f1"]
        line["accuracy at the cut"] = tuned["accuracy"]
    print(way, json.dumps(line, default=lambda value: round(float(value), 4), ensure_ascii=False))


def tally(decider: Decider, ranked: list[list[Prediction]], rows: Rows) -> dict[str, Any]:
    counts = LabelTally(decider, (5,), seed=0)
    for row, (_, label) in zip(ranked, rows, strict=True):
        counts.add(decider.decide(row), label)
    return counts.figures()


def hide_labels(data: Data, vectors: CachedVectors) -> None:
    """Ten leaves without a text; then their names, or five examples of each, are added, and nothing is trained."""
    labels = sorted({label for _, label in data.dev})
    hidden = set(random.Random(1).sample(labels, NUM_HIDDEN))
    corpus = vectors.of("csl_disciplines-corpus", [text for text, _ in data.corpus])
    test = np.concatenate(
        [
            vectors.of("csl_disciplines-dev", [text for text, _ in data.dev]),
            vectors.of("csl_disciplines-test", [text for text, _ in data.test]),
        ]
    )
    rows = data.dev + data.test
    asked = np.array([label in hidden for _, label in rows])
    described = [(text, label) for label, texts in data.descriptions.items() for text in texts]
    words = vectors.of("csl_disciplines-labels", [text for text, _ in described])
    known = np.array([label not in hidden for _, label in data.corpus])
    taken: defaultdict[str, list[int]] = defaultdict(list)
    for place, (_, label) in enumerate(data.corpus):
        if label in hidden and len(taken[label]) < NUM_EXAMPLES:
            taken[label].append(place)
    few = np.concatenate([np.flatnonzero(known), [p for places in taken.values() for p in places]]).astype(
        int
    )
    linear = LogisticRegression(C=100, max_iter=1000, random_state=0)
    linear.fit(
        corpus[known], [label for (_, label), is_known in zip(data.corpus, known, strict=True) if is_known]
    )

    def accuracy(predicted: list[str]) -> str:
        right = np.array([ours == label for ours, (_, label) in zip(predicted, rows, strict=True)])
        return f"hidden {right[asked].mean():.3f} ({asked.sum()} texts), others {right[~asked].mean():.3f}"

    print(f"\n{NUM_HIDDEN} of {len(labels)} leaves hidden")
    print("linear classifier of 57:", accuracy([str(each) for each in linear.predict(test)]))
    index = [described[place] for place in range(len(described)) if described[place][1] not in hidden]
    kept = [place for place in range(len(described)) if described[place][1] not in hidden]
    print("names, before:", accuracy([row[0][0] for row in nearest(test, words[kept], index, 1)]))
    print("names, their names added:", accuracy([row[0][0] for row in nearest(test, words, described, 1)]))
    for places, what in ((np.flatnonzero(known), "before"), (few, f"{NUM_EXAMPLES} examples of each added")):
        own = [data.corpus[place] for place in places]
        found = nearest(test, corpus[places], own, 10)
        print(f"votes (k 10, T 0.02), {what}:", accuracy([count_votes(row, 0.02)[0].label for row in found]))


def change_labels(data: Data, vectors: CachedVectors) -> None:
    """One label in twenty is changed by chance; how many of those are suspected, and how many suspected are they."""
    corpus = vectors.of("csl_disciplines-corpus", [text for text, _ in data.corpus])
    labels = sorted({label for _, label in data.corpus})
    draw = random.Random(2)
    changed = {place for place in range(len(data.corpus)) if draw.random() < 0.05}
    rows = [
        (text, draw.choice([each for each in labels if each != label]) if place in changed else label)
        for place, (text, label) in enumerate(data.corpus)
    ]
    found = nearest(corpus, corpus, rows, 20, leave_out=True)
    print(f"\n{len(changed)} of {len(rows)} labels changed")
    for share in (0.0, 0.02, 0.05, 0.1):
        suspected = {
            place
            for place, ((_, label), row) in enumerate(zip(rows, found, strict=True))
            if suspect(label, count_votes(row, 0.02), row, (), None, share)
        }
        hits = len(suspected & changed)
        print(
            f"suspect_share {share}: {len(suspected)} suspected, {hits / len(suspected):.2f} of them changed, "
            f"{hits / len(changed):.2f} of the changed found"
        )


if __name__ == "__main__":
    main()
