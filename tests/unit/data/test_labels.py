"""Labels: what users take for one label is one, in every format, and classes stand in the order of their numbers."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raytower.data.plain_labels import in_order, plain_label
from raytower.errors import InputError
from tests.support.data_files import read, survey_of, write


@pytest.mark.parametrize(
    ("label", "text"),
    [
        (1, "1"),
        (1.0, "1"),
        ("1.0", "1"),
        (" 1 ", "1"),
        ("-0.0", "0"),
        (1e16, "10000000000000000"),
        (0.5, "0.5"),
        ("1.10", "1.10"),
        ("01", "01"),
        ("\u3000还款 ", "还款"),
        ("a b", "a b"),
        (1e3, "1000"),
        ("1e3", "1000"),
        ("+1.5E+3", "1500"),
        ("1.50e-3", "0.0015"),
        (1e-05, "0.00001"),
        ("-0e2", "0"),
        ("01e3", "01e3"),
        ("1e9999", "1e9999"),
    ],
)
def test_the_normal_form(label: str | float, text: str) -> None:
    assert plain_label(label) == text


def test_one_label_in_every_format(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": 1.0}, {"text": "b", "label": 0.0}]
    write(tmp_path / "x.jsonl", '{"text": "a", "label": 1.0}\n{"text": "b", "label": 0}\n')
    write(tmp_path / "x.tsv", "a\t1.0 \nb\t0\n")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    for name in ("x.jsonl", "x.tsv", "x.parquet"):
        assert [row["label"] for row in read(tmp_path / name, "labelled")] == ["1", "0"]


def test_a_number_with_an_exponent_is_one_label_with_the_number(tmp_path: Path) -> None:
    lines = (f'{{"text": "a", "label": {label}}}\n' for label in ("1e3", '"1e3"', "1000", "1000.0", '"1E+3"'))
    write(tmp_path / "x.jsonl", "".join(lines))
    write(tmp_path / "x.tsv", "a\t1e3\nb\tzero\nc\t 1e+03 \n")
    pq.write_table(pa.table({"text": ["a", "b"], "label": [1e3, 1e20]}), tmp_path / "x.parquet")
    labels = {
        name: [row["label"] for row in read(tmp_path / name, "labelled")]
        for name in ("x.jsonl", "x.tsv", "x.parquet")
    }
    assert labels["x.jsonl"] == ["1000"] * 5
    assert labels["x.tsv"] == ["1000", "zero", "1000"]
    assert labels["x.parquet"] == ["1000", "1" + "0" * 20]


def test_labels_that_are_booleans_are_refused_with_what_to_write(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"], "label": [True]}), tmp_path / "x.parquet")
    with pytest.raises(InputError, match=r"column 'label' is bool, .*; write true as 1 and false as 0"):
        survey_of(tmp_path / "x.parquet", "labelled")
    line = '{"text": "a", "label": true}\n'
    with pytest.raises(
        InputError, match=r"'label' is of JSON type boolean, .*; write true as 1 and false as 0"
    ):
        survey_of(write(tmp_path / "x.jsonl", line), "labelled")


def test_a_label_that_is_no_number_is_no_class(tmp_path: Path) -> None:
    line = '{"text": "a", "label": NaN}\n'
    with pytest.raises(InputError, match=r"x\.jsonl:1: 'label' is nan"):
        survey_of(write(tmp_path / "x.jsonl", line), "labelled")
    pq.write_table(pa.table({"text": ["a"], "label": [float("nan")]}), tmp_path / "x.parquet")
    with pytest.raises(InputError, match=r"x\.parquet:1: 'label' is null"):
        survey_of(tmp_path / "x.parquet", "labelled")


def test_numbers_stand_in_the_order_of_their_values() -> None:
    assert in_order(["10", "2", "0", "-1"]) == ["-1", "0", "2", "10"]
    assert in_order(["10", "2", "b"]) == ["10", "2", "b"]
    assert in_order(["1.5", "0.25", "10"]) == ["0.25", "1.5", "10"]
