"""Labels that would be classes which nobody means: refused, unless a list of labels says that they are meant."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from raytower.config import make_config
from raytower.errors import InputError
from raytower.models.text_classifier import TextClassifier
from raytower.training.classifier import ClassifierTask, plan_train_classifier
from raytower.training.config import TrainClassifierConfig
from tests.support.data_files import read, write


def config_of(encoder: Path | None, rows: str, tmp_path: Path, **changes: Any) -> TrainClassifierConfig:
    path = write(tmp_path / "rows.tsv", rows)
    values = {
        "model": str(encoder),
        "train": {"path": str(path)},
        "output": str(tmp_path / "out"),
        "batch_size": 2,
        "max_length": 32,
        "workers": {"num": 1},
    }
    return make_config(TrainClassifierConfig, {**values, **changes})


def plan(encoder: Path, rows: str, tmp_path: Path, **changes: Any) -> dict[str, Any]:
    return plan_train_classifier(config_of(encoder, rows, tmp_path, **changes))


@pytest.mark.parametrize(
    ("label", "same"),
    [
        (unicodedata.normalize("NFC", "café"), unicodedata.normalize("NFD", "café")),
        ("sports", "sports\u200b"),
        ("sports", "\ufeffsports"),
        ("real estate", "real\u00a0estate"),
        ("real estate", "real  estate"),
        ("保 险", "保\u3000险"),
        ("1", "+1"),
        ("-2", "-2.0"),
    ],
)
def test_one_label_to_the_eye_is_one_class(label: str, same: str, tmp_path: Path) -> None:
    write(tmp_path / "x.tsv", f"a\t{label}\nb\t{same}\n")
    write(
        tmp_path / "x.jsonl",
        "".join(json.dumps({"text": "a", "label": text}) + "\n" for text in (label, same)),
    )
    for name in ("x.tsv", "x.jsonl"):
        assert [row["label"] for row in read(tmp_path / name, "labelled")] == [label, label]


@pytest.mark.parametrize(
    ("label", "other"), [("True", "TRUE"), ("Ａ", "a"), ("１", "1"), ("straße", "STRASSE")]
)
def test_labels_that_differ_in_case_or_width_are_refused_with_both(
    label: str, other: str, still_encoder: Path, tmp_path: Path
) -> None:
    rows = f"one\t{label}\ntwo\t{other}\nthree\t{label}\nfour\tz\n"
    with pytest.raises(
        InputError, match=rf"labels '{label}' \(2 rows\) and '{other}' \(1\) differ in case or"
    ):
        plan(still_encoder, rows, tmp_path)
    names = write(tmp_path / "names.txt", f"{label}\n{other}\nz\n")
    assert plan(still_encoder, rows, tmp_path, labels=str(names))["labels"] == 3


@pytest.mark.parametrize(
    ("labels", "missing"),
    [
        (["sports", "art", "nan"], "nan"),
        (["1", "0", "NaN"], "NaN"),
        (["1", "0", "None"], "None"),
        (["0.5", "2", "<NA>"], "<NA>"),
    ],
)
def test_a_missing_value_that_is_written_out_is_no_class(
    labels: list[str], missing: str, still_encoder: Path, tmp_path: Path
) -> None:
    rows = "".join(f"text {number}\t{label}\n" for number, label in enumerate([*labels, *labels[:2]]))
    with pytest.raises(InputError, match=f"1 rows have the label '{missing}'"):
        plan(still_encoder, rows, tmp_path)


def test_none_among_words_is_a_class(still_encoder: Path, tmp_path: Path) -> None:
    assert plan(still_encoder, "one\tnone\ntwo\tgreeting\n", tmp_path)["labels"] == 2


def test_columns_that_are_swapped_are_refused(still_encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"4 labels for 2 different texts; columns are text, then label"):
        plan(still_encoder, "1\tgood product\n0\tbad product\n1\tfine\n0\tawful\n", tmp_path)


def test_scores_are_refused_as_classes(still_encoder: Path, tmp_path: Path) -> None:
    rows = "".join(f"text {number}\t0.{number + 1}7\n" for number in range(8))
    with pytest.raises(InputError, match=r"numbers such as '0\.17', 8 of them in 8 rows: scores"):
        plan(still_encoder, rows, tmp_path)
    # Four versions, each of several rows, are classes.
    rows = "".join(f"text {number}\t{number % 4}.5\n" for number in range(20))
    assert plan(still_encoder, rows, tmp_path)["labels"] == 4


def test_classes_of_one_row_are_said(
    still_encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = "".join(f"question {number}\tanswer {number}\n" for number in range(8))
    assert plan(still_encoder, rows, tmp_path)["labels"] == 8
    assert "8 labels in 8 rows: most classes have one row" in capsys.readouterr().err


def test_a_finished_classifier_keeps_its_order_unless_a_list_asks_for_another(
    still_encoder: Path, tmp_path: Path
) -> None:
    """Its classes are 1.0 and 0.0, in this order: rows labelled 0 and 1 train on in it."""
    finished = TextClassifier.start_from(still_encoder, ["1.0", "0.0"])
    finished.save(tmp_path / "finished")
    rows = "one\t0\ntwo\t1\nthree\t1\n"
    started: dict[str, Any] = {"model": None, "init_from": str(tmp_path / "finished")}
    assert task_of(started, rows, tmp_path).labels == ("1", "0")
    names = write(tmp_path / "names.txt", "0\n1\n")
    with pytest.raises(InputError, match="in another order"):
        task_of({**started, "labels": str(names)}, rows, tmp_path)


def task_of(changes: dict[str, Any], rows: str, tmp_path: Path) -> ClassifierTask:
    config = config_of(None, rows, tmp_path, **changes)
    return ClassifierTask.prepare(config, ClassifierTask.survey(config))


def test_a_lone_word_before_numbers_is_a_header(still_encoder: Path, tmp_path: Path) -> None:
    rows = "Review Text\tStar Rating\none\t1\ntwo\t0\nthree\t1\n"
    with pytest.raises(InputError, match=r"rows\.tsv:1: 'Star Rating' is the only label that is no number"):
        plan(still_encoder, rows, tmp_path)


def test_the_header_once_more_is_no_row(tmp_path: Path) -> None:
    for name, rows in (
        ("labelled", "text\tlabel\na\tx\ntext\tlabel\nb\ty\n"),
        ("pairs", "query\tdocument\na\tx\n" * 2),
    ):
        path = write(tmp_path / f"{name}.tsv", rows)
        with pytest.raises(InputError, match=r":3: the header once more"):
            read(path, name)  # type: ignore[arg-type]
