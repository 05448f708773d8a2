"""Rows that teach the opposite of other rows are counted, and the first is named."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from raytower.data.records import RecordKind
from raytower.training.contradictions import say_contradictions
from tests.support.data_files import survey_of, write


@pytest.mark.parametrize(
    ("kind", "lines", "said"),
    [
        (
            "triples",
            [("q", "a", "b"), ("q", "b", "a"), ("r", "b", "a")],
            "2 judgements differ from those of an earlier row, the first that of 'q' and 'b'",
        ),
        ("scored", [("q", "a", 1), ("Q ", "a", 0), ("q", "b", 0)], "1 judgements differ .* 'Q ' and 'a'"),
        ("labelled", [("one", "x"), ("one", "y"), ("two", "x")], "1 judgements differ .* 'one'"),
    ],
)
def test_rows_that_contradict_each_other(
    kind: RecordKind,
    lines: list[tuple[object, ...]],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = {
        "triples": ("query", "document", "negative"),
        "scored": ("query", "document", "label"),
        "labelled": ("text", "label"),
    }[kind]
    rows = [json.dumps(dict(zip(names, line, strict=True))) + "\n" for line in lines]
    say_contradictions(survey_of(write(tmp_path / "x.jsonl", "".join(rows)), kind))
    error = capsys.readouterr().err
    assert re.search(said, error), error
    say_contradictions(survey_of(write(tmp_path / "y.jsonl", rows[0] + rows[-1]), kind))
    assert capsys.readouterr().err == ""


def test_candidates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"query": "q", "positive": "a", "negatives": ["b"]},
        {"query": "q", "positive": "b", "negatives": ["a", "c"]},
        {"query": "q", "positive": ["a", "d"], "negatives": ["c"]},
    ]
    path = write(tmp_path / "x.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    say_contradictions(survey_of(path, "candidates"))
    assert (
        "2 judgements differ from those of an earlier row, the first that of 'q' and 'b'"
        in capsys.readouterr().err
    )
