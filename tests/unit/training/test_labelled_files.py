"""A label by file or by folder: what is trained is what rows with labels of their own would train."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from raytower.config import make_config
from raytower.data.pieces import read_piece
from raytower.errors import InputError
from raytower.training.classifier import ClassifierTask, plan_train_classifier
from raytower.training.config import TrainClassifierConfig
from raytower.training.labelled_files import survey_by_label, survey_paths
from raytower.training.row_stream import StreamPlan, stream_batches
from raytower.training.runner import run_identity

ROWS = [("moon", "a"), ("sun", "a"), ("茶", "b"), ("杯", "b"), ("水", "b"), ("1984", "7")]


def write(path: Path, texts: list[str], as_json: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join((json.dumps({"text": text}) if as_json else text) + "\n" for text in texts)
    path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())


def write_files(folder: Path) -> Path:
    write(folder / "a.txt", ["moon", "sun"])
    write(folder / "b.jsonl.gz", ["茶", "杯", "水"], as_json=True)
    write(folder / "7.0.txt", ["1984"])
    return folder


def write_folders(folder: Path) -> Path:
    write(folder / "a" / "x.txt", ["moon"])
    write(folder / "a" / "y.txt", ["sun"])
    write(folder / "b" / "x.txt", ["茶", "杯", "水"])
    write(folder / "7" / "deep.txt", ["1984"])
    return folder


def rows_of(survey: Any) -> list[tuple[str, str]]:
    table = pa.concat_tables(read_piece(piece) for piece in survey.pieces)
    assert table.schema.equals(survey.schema)
    return list(zip(table["text"].to_pylist(), table["label"].to_pylist(), strict=True))


def config_of(path: Path, start: Path, **changes: Any) -> TrainClassifierConfig:
    train = {"path": str(path), **changes.pop("train", {})}
    values = {
        "model": str(start),
        "train": train,
        "output": str(path.parent / "out"),
        "batch_size": 2,
        "max_length": 32,
    }
    return make_config(TrainClassifierConfig, {**values, "workers": {"num": 1}, **changes})


def test_files_and_folders_give_the_rows_of_a_labelled_file(tmp_path: Path) -> None:
    by_file = survey_by_label(str(write_files(tmp_path / "files")), "file", "fail", None, "train.label_by")
    by_folder = survey_by_label(
        str(write_folders(tmp_path / "folders")), "folder", "fail", None, "train.label_by"
    )
    for surveyed in (by_file, by_folder):
        assert sorted(rows_of(surveyed)) == sorted(ROWS)
        assert (surveyed.num_rows, surveyed.num_rejected) == (6, 0)
        assert [piece.index for piece in surveyed.pieces] == list(range(len(surveyed.pieces)))
        assert [piece.first_row for piece in surveyed.pieces][:2] == [0, surveyed.pieces[0].num_rows]
    plan = StreamPlan(pieces=by_file.pieces, batch_size=6, num_batches=1, seed=1, window_rows=100)
    (shuffled,) = stream_batches(plan)
    assert sorted(zip(shuffled["text"], shuffled["label"], strict=True)) == sorted(ROWS)


def test_a_plan_counts_them_and_dev_share_takes_of_each_label(still_encoder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "files"
    for label in "ab":
        write(folder / f"{label}.txt", [f"{label}{number}" for number in range(20)])
    config = config_of(folder, still_encoder, train={"label_by": "file"}, dev={"share": 0.25})
    assert plan_train_classifier(config)["rows"] == 30
    surveyed = ClassifierTask.survey(config)
    task = ClassifierTask.prepare(config, surveyed)
    assert task.labels == ("a", "b")
    assert sorted(task.dev_labels) == ["a"] * 5 + ["b"] * 5
    assert all(text[0] == label for text, label in zip(task.dev_texts, task.dev_labels, strict=True))


def test_dev_texts_by_folder(still_encoder: Path, tmp_path: Path) -> None:
    train, dev = write_files(tmp_path / "files"), write_folders(tmp_path / "folders")
    config = config_of(
        train, still_encoder, train={"label_by": "file"}, dev={"path": str(dev), "label_by": "folder"}
    )
    task = ClassifierTask.prepare(config, ClassifierTask.survey(config))
    assert sorted(zip(task.dev_texts, task.dev_labels, strict=True)) == sorted(ROWS)


def test_bad_rows_are_put_aside_file_by_file(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "files")
    (folder / "a.txt").write_bytes(b"moon\n\xff\nsun\n")
    with pytest.raises(InputError, match=r"a\.txt:2: not UTF-8"):
        survey_by_label(str(folder), "file", "fail", None, "train.label_by")
    surveyed = survey_by_label(str(folder), "file", "quarantine", str(tmp_path / "aside"), "train.label_by")
    assert sorted(rows_of(surveyed)) == sorted(ROWS)
    assert surveyed.num_rejected == 1
    assert surveyed.quarantine_file is not None
    assert json.loads(Path(surveyed.quarantine_file).read_text())["line"] == 2


def test_a_file_outside_all_folders_has_no_label(tmp_path: Path) -> None:
    folder = write_folders(tmp_path / "folders")
    write(folder / "stray.txt", ["x"])
    with pytest.raises(InputError, match=r"train\.label_by is folder, and .*stray\.txt lies at the top"):
        survey_by_label(str(folder), "folder", "fail", None, "train.label_by")


def test_dev_share_has_its_labels_by_the_training_rows(still_encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"dev\.label_by is 'file', and dev\.share"):
        config_of(tmp_path, still_encoder, dev={"share": 0.5, "label_by": "file"})


def test_paths_name_the_texts_of_each_label(still_encoder: Path, tmp_path: Path) -> None:
    """A file, a folder and a glob, whose names say nothing of the labels."""
    write(tmp_path / "one.txt", ["moon", "sun"])
    write(tmp_path / "folder" / "x.txt", ["茶"])
    write(tmp_path / "folder" / "y.jsonl", ["杯", "水"], as_json=True)
    write(tmp_path / "seven-1.txt", ["1984"])
    paths = {"a": tmp_path / "one.txt", "b": tmp_path / "folder", "7.0": tmp_path / "seven-*.txt"}
    given = {"train": {"paths": {label: str(path) for label, path in paths.items()}}, "dev": None}
    values = {"model": str(still_encoder), "output": str(tmp_path / "out"), "batch_size": 2, "max_length": 32}
    config = make_config(TrainClassifierConfig, {**values, **given, "workers": {"num": 1}})
    surveyed = ClassifierTask.survey(config)
    assert sorted(rows_of(surveyed)) == sorted(ROWS)
    given["dev"] = given["train"]
    config = make_config(TrainClassifierConfig, {**values, **given, "workers": {"num": 1}})
    task = ClassifierTask.prepare(config, surveyed)
    assert sorted(zip(task.dev_texts, task.dev_labels, strict=True)) == sorted(ROWS)
    before = run_identity(config, surveyed)
    write(tmp_path / "folder" / "x.txt", ["水"])
    after = run_identity(config, surveyed)
    assert {key for key in after if after[key] != before[key]} == {"content of train", "content of dev"}


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ({}, "train.path is required and not given; name labelled rows, or texts by train.paths"),
        (
            {"path": "x", "paths": {"a": "y"}},
            "train.path is 'x', and train.paths names the texts of each label",
        ),
        ({"label_by": "file", "paths": {"a": "y"}}, "train.label_by is 'file', and train.paths names"),
        ({"paths": {"1": "x", "1.0": "y"}}, "it names the label '1' twice"),
        ({"paths": {}}, "train.paths"),
    ],
)
def test_paths_beside_another_source_are_refused(train: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as caught:
        make_config(TrainClassifierConfig, {"model": "m", "output": "o", "train": train})
    assert words in str(caught.value)


def test_a_file_of_two_labels_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "x.txt", ["moon"])
    paths = {"a": str(tmp_path / "x.txt"), "b": str(tmp_path / "*.txt")}
    with pytest.raises(InputError, match=r"train\.paths has .*x\.txt under 'a' and under 'b'"):
        survey_paths(paths, "fail", None, "train.paths")


def test_extensions_may_be_in_capitals(tmp_path: Path) -> None:
    folder = tmp_path / "files"
    write(folder / "Moon.TXT", ["a"])
    write(folder / "Moon.txt.GZ", ["b"])
    (folder / "Moon.txt.GZ").write_bytes(gzip.compress(b"b\n"))
    surveyed = survey_by_label(str(folder), "file", "fail", None, "train.label_by")
    assert sorted(rows_of(surveyed)) == [("a", "Moon"), ("b", "Moon")]


def test_what_is_not_read_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "files"
    write(folder / "a.txt", ["x"])
    write(folder / "b.jsonl", ["y"], as_json=True)
    (folder / "b.jsonl").write_text('{"text": "y", "label": "z"}\n')
    (folder / "c.txt").write_text("")
    write(folder / "d.text", ["w"])
    surveyed = survey_by_label(str(folder), "file", "fail", None, "train.label_by")
    assert sorted(rows_of(surveyed)) == [("x", "a"), ("y", "b")]
    said = capsys.readouterr().err
    assert "passed over" in said
    assert "d.text" in said
    assert "no row in" in said
    assert "c.txt" in said
    assert "'label' are no part of them" in said


def test_files_without_a_row_are_refused_and_counted(tmp_path: Path) -> None:
    folder = tmp_path / "files"
    for name in ("a.txt", "b.txt"):
        folder.mkdir(exist_ok=True)
        (folder / name).write_text("")
    with pytest.raises(InputError, match="holds no file with a row"):
        survey_by_label(str(folder), "file", "fail", None, "train.label_by")
    (folder / "a.txt").write_bytes(b"\xff\n")
    write(folder / "b.txt", ["x"])
    surveyed = survey_by_label(str(folder), "file", "quarantine", str(tmp_path / "aside"), "train.label_by")
    assert rows_of(surveyed) == [("x", "b")]
    assert surveyed.num_rejected == 1


def test_a_renamed_folder_is_another_training(still_encoder: Path, tmp_path: Path) -> None:
    folder = write_folders(tmp_path / "folders")
    config = config_of(folder, still_encoder, train={"label_by": "folder"})
    before = run_identity(config, ClassifierTask.survey(config))
    (folder / "b").rename(folder / "c")
    assert run_identity(config, ClassifierTask.survey(config)) != before
