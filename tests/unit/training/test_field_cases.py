"""What users' files brought to light: rows of another kind, labels in two spellings, values that are no numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from raytower.annotation.cosines import cosines
from raytower.cli.arguments import read_arguments
from raytower.config import load_config, make_config
from raytower.errors import InputError
from raytower.evaluation.judgements import Judgements
from raytower.metrics import ranking_metrics, spearman
from raytower.models.block_engine import refuse_no_numbers
from raytower.models.forward import ForwardEngine
from raytower.training.batches import count_unused
from raytower.training.classifier import _labels
from raytower.training.config import RetrieverDevConfig, TrainClassifierConfig, TrainRetrieverConfig
from raytower.training.dev_recall import DevSet, evaluate_recall, load_dev_set
from raytower.training.inputs import check_labels, survey_training
from tests.support.data_files import beir_folder, survey_of, write, write_jsonl

CANDIDATES = [{"query": f"q{i}", "documents": [f"a{i}", "other"], "scores": [1, 0]} for i in range(9)]
PAIRS = [{"query": "p", "document": "d"}, {"query": "r", "document": "e"}]


def _config(tmp_path: Path, train: Path, **changes: Any) -> TrainRetrieverConfig:
    values = {"model": "m", "train": str(train), "output": str(tmp_path / "out"), "workers": {"num": 1}}
    return make_config(TrainRetrieverConfig, {**values, **changes})


@pytest.mark.parametrize(("rows", "rejected"), [(CANDIDATES, 0), ([*PAIRS, *CANDIDATES], 2)])
def test_quarantine_takes_the_kind_that_most_rows_are(
    tmp_path: Path, rows: list[dict[str, Any]], rejected: int
) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", rows)
    config = _config(tmp_path, path, on_error="quarantine")
    surveyed = survey_training(config, str(path), "auto", config.objective.formats, "in_batch_negatives")
    assert (surveyed.num_rows, surveyed.num_rejected) == (9, rejected)
    listed = [line for file in tmp_path.glob("out.quarantine/*") for line in file.read_text().splitlines()]
    assert [json.loads(line)["line"] for line in listed] == [1, 2][:rejected]


def test_columns_that_train_nothing_are_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", [{"query": "q", "document": "d", "weight": 2}])
    config = _config(tmp_path, path)
    survey_training(config, str(path), "pairs", config.objective.formats, "in_batch_negatives")
    assert "'weight'" in capfd.readouterr().err


@pytest.mark.parametrize("second", ["sentence2", "similar_text"])
def test_pairs_with_a_score_are_no_labelled_texts(tmp_path: Path, second: str) -> None:
    """Read as labelled, the scores would be classes and the second texts nothing."""
    rows = [{"text": f"question {i}", second: f"answer {i}", "label": i % 6} for i in range(40)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match=f"the file has '{second}' beside text and label"):
        survey_of(path, "labelled")


def test_one_class_alone_trains_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "train.tsv", "query\ttitle\tlabel\na\tb\t1\nc\td\t1\n")
    with pytest.raises(InputError, match=r"train\.tsv: every label is 1"):
        check_labels(survey_of(path, "scored"), lambda _: None)


def test_dev_reads_the_dev_split(tmp_path: Path) -> None:
    folder = beir_folder(tmp_path / "set")
    with pytest.raises(InputError, match=r"qrels/dev\.tsv.*dev\.split may be one of: test, train"):
        load_dev_set(RetrieverDevConfig(path=str(folder)))
    header = "query-id\tcorpus-id\tscore\n"
    write(folder / "qrels" / "dev.tsv", header + "q2\td2\t1\n")
    assert load_dev_set(RetrieverDevConfig(path=str(folder))).queries == ["问题"]
    assert load_dev_set(RetrieverDevConfig(path=str(folder), split="test")).queries == ["what is tea"]
    pairs = write(tmp_path / "dev.tsv", "a\tb\n")
    with pytest.raises(InputError, match=r"dev\.split is 'dev', and .* is no BEIR folder"):
        load_dev_set(RetrieverDevConfig(path=str(pairs), split="dev"))
    config = make_config(
        TrainRetrieverConfig,
        {
            "model": "m",
            "train": {"path": str(folder), "split": "valid"},
            "output": "o",
            "workers": {"num": 1},
        },
    )
    with pytest.raises(InputError, match=r"train\.split may be one of: dev, test, train"):
        survey_training(config, str(folder), "pairs", config.objective.formats, "o", config.train.split)


def test_a_folder_of_train_dev_and_test_is_refused_as_training_and_dev_rows(tmp_path: Path) -> None:
    for name in ("train", "dev", "test"):
        write(tmp_path / "data" / f"{name}.tsv", f"{name} query\t{name} document\n")
    folder = str(tmp_path / "data")
    values = {"model": "m", "train": folder, "output": "o", "workers": {"num": 1}}
    config = make_config(TrainRetrieverConfig, values)
    with pytest.raises(InputError, match=r"more than one split .*test\.tsv.* such as '.*/data/train\.tsv'"):
        survey_training(config, folder, "pairs", config.objective.formats, "o")
    with pytest.raises(InputError, match="more than one split"):
        load_dev_set(RetrieverDevConfig(path=folder))
    assert survey_training(config, f"{folder}/*", "pairs", config.objective.formats, "o").num_rows == 3


class _Fixed:
    """Vectors by text."""

    def __init__(self, **vectors: list[float]) -> None:
        self.vectors = vectors

    def encode(self, texts: list[str], prefix: str = "") -> np.ndarray:
        return np.array([self.vectors[text] for text in texts], dtype=np.float32)


def test_a_query_in_the_corpus_is_no_answer_to_itself(tmp_path: Path) -> None:
    """q is nearest to itself, a next: recall@1 is 1 by hand. b asks and is its own answer."""
    pairs = write(tmp_path / "dev.tsv", "q\ta\nb\tb\n")
    corpus = write(tmp_path / "corpus.txt", "q\nb\na\n")
    dev = load_dev_set(RetrieverDevConfig(path=str(pairs), corpus=str(corpus)))
    assert [place if place < 0 else dev.corpus[place] for place in dev.own] == ["q", -1]
    engine = cast(ForwardEngine, _Fixed(q=[1, 0], a=[0.9, 0.1], b=[0, 1]))
    assert evaluate_recall(engine, dev, "recall@1", ("", ""))["recall@1"] == 1
    known = DevSet(dev.queries, dev.corpus, dev.relevant, own=[-1, -1])
    assert evaluate_recall(engine, known, "recall@1", ("", ""))["recall@1"] == 0.5


def test_copies_of_a_text_count_once() -> None:
    """By hand: of the texts a (twice) and b, one is found at rank 1, then its copy, which adds nothing, then b."""
    judged = {"a1": 1.0, "a2": 1.0, "b": 1.0}
    judgements = Judgements(["q"], ["q"], [judged], 0, 0, {"a1": "a1", "a2": "a1"})
    ids, once = judgements.counted_once(["a2", "a1", "b"], judged)
    found = ranking_metrics([ids], [once], [1, 2, 3])
    assert [float(found[f"recall@{k}"][0]) for k in (1, 2, 3)] == [0.5, 0.5, 1.0]


def _classes(tmp_path: Path, content: str, **changes: Any) -> list[str]:
    path = write(tmp_path / "train.jsonl", content)
    values = {"model": "m", "train": str(path), "output": "o", "workers": {"num": 1}, **changes}
    return _labels(make_config(TrainClassifierConfig, values), survey_of(path, "labelled"))[0]


def test_classes_of_numbers(tmp_path: Path) -> None:
    rows = [{"text": f"t{i}", "label": i} for i in range(12)]
    assert _classes(tmp_path, "".join(json.dumps(row) + "\n" for row in rows)) == [str(i) for i in range(12)]
    mixed = '{"text": "a", "label": 1.0}\n{"text": "b", "label": 0}\n{"text": "c", "label": "1 "}\n'
    assert _classes(tmp_path, mixed) == ["0", "1"]
    labels = write(tmp_path / "labels.txt", "1.0\n0.0\n")
    assert _classes(tmp_path, mixed, labels=str(labels)) == ["1", "0"]


def test_a_class_without_another_is_refused(tmp_path: Path) -> None:
    labels = write(tmp_path / "labels.txt", "a\nb\n")
    with pytest.raises(InputError, match="the only label is 'a'"):
        _classes(tmp_path, '{"text": "t", "label": "a"}\n', labels=str(labels))


def test_class_weights_are_keyed_by_labels(tmp_path: Path) -> None:
    base = {"model": "m", "train": "t", "output": "o", "workers": {"num": 1}}

    def weights(values: Any) -> Any:
        return make_config(TrainClassifierConfig, {**base, "objective": {"class_weights": values}}).objective

    assert weights({0: 1.0, 1.0: 5}).class_weights == {"0": 1.0, "1": 5.0}
    with pytest.raises(InputError, match=r"the key true, a boolean.*write it in quotes"):
        weights({True: 1})
    with pytest.raises(InputError, match="names the label '1' twice"):
        weights({1: 1, "1": 2})
    for text, expected in (
        ("{0: 1.0, 1: 5}", {"0": 1.0, "1": 5.0}),
        ("{yes: 1, no: 5}", {"yes": 1.0, "no": 5.0}),
        ("{on: 1, ~: 2, 2020-01-01: 3}", {"on": 1.0, "~": 2.0, "2020-01-01": 3.0}),
    ):
        file = write(tmp_path / "c.yaml", f"objective: {{class_weights: {text}}}\n")
        config = load_config(TrainClassifierConfig, file, base)
        assert config.objective.class_weights == expected
        said = read_arguments(TrainClassifierConfig, (), ["--objective.class_weights", text]).overrides
        assert load_config(TrainClassifierConfig, None, {**base, **said}).objective.class_weights == expected


def test_rows_that_fill_no_step_are_counted() -> None:
    assert count_unused(127, 64, 1) == 63
    assert count_unused(128, 64, 1) == 0
    assert count_unused(127, 64, 2) == 254 - 192
    assert count_unused(128, 64, 0.5) == 0


def test_what_is_no_number_makes_no_score() -> None:
    broken = np.array([[1.0, 0.0], [np.nan, 1.0]], np.float32)
    with pytest.raises(InputError, match="pair number 1 holds NaN"):
        cosines(np.ones((2, 2), np.float32), broken)
    with pytest.raises(InputError, match="the encoder gives text number 1 the values"):
        refuse_no_numbers(broken, "encoder", "text")
    with pytest.raises(InputError, match="1 scores are not finite"):
        spearman([1.0, float("nan"), 2.0], [0.0, 0.5, 1.0])
