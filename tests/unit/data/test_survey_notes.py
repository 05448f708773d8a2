"""Surveys that are remembered: the same as those made anew, and never those of other content."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raytower.data import pieces, survey_notes
from raytower.data.config import InputConfig
from raytower.data.pieces import Survey, read_piece, survey
from raytower.data.records import RecordKind
from raytower.data.rejects import quarantine_of
from raytower.data.survey_notes import counted, remembered
from raytower.errors import InputError
from raytower.training.dev_split import set_dev_aside
from tests.support.data_files import write, write_jsonl


@pytest.fixture
def scans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The inputs whose rows were read to survey them; every size is worth a note."""
    scanned: list[str] = []
    plain = pieces._survey_sources

    def counted(sources: Any, *arguments: Any) -> Survey:
        scanned.append(sources[0].file.location.name)
        return plain(sources, *arguments)

    monkeypatch.setenv("RAYTOWER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(survey_notes, "_NOTED_BYTES", 1)
    monkeypatch.setattr(pieces, "_survey_sources", counted)
    return scanned


def surveyed(path: Path, kind: RecordKind, **settings: Any) -> Survey:
    return survey(InputConfig(path=str(path)), kind, 3, remember=remembered, **settings)


def pairs(path: Path) -> Path:
    return write(path, "".join(f"question {i}\tanswer {i}\n" for i in range(10)))


def zipped_pairs(path: Path) -> Path:
    return write(path.with_suffix(".tsv.gz"), gzip.compress(pairs(path).read_bytes()))


def parquet_corpus(path: Path) -> Path:
    """A column with the name of one of the index's own, and another that passes through."""
    table = pa.table(
        {"text": [f"t{i}" for i in range(10)], "vector": range(10), "n": [{"m": i} for i in range(10)]}
    )
    pq.write_table(table, path.with_suffix(".parquet"), row_group_size=4)
    return path.with_suffix(".parquet")


def repeating_candidates(path: Path) -> Path:
    """A key that nothing reads, and a document that stands twice."""
    rows = [
        {"query": f"q{i}", "documents": ["a", "b", "a"], "scores": [2, 1, 0], "source": "x"}
        for i in range(10)
    ]
    return write_jsonl(path.with_suffix(".jsonl"), rows)


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (pairs, "pairs"),
        (zipped_pairs, "pairs"),
        (parquet_corpus, "corpus"),
        (repeating_candidates, "candidates"),
    ],
)
def test_a_remembered_survey_is_the_one_that_was_made(
    tmp_path: Path, scans: list[str], make: Callable[[Path], Path], kind: RecordKind
) -> None:
    path = make(tmp_path / "rows.tsv")
    made = surveyed(path, kind)
    again = surveyed(path, kind)
    assert scans == [path.name]
    assert again == made
    assert replace(made, content=None) == survey(InputConfig(path=str(path)), kind, 3)
    assert len(made.pieces) >= 4
    assert pa.concat_tables(map(read_piece, again.pieces)).num_rows == 10


def test_other_content_another_kind_and_other_pieces_are_surveyed(tmp_path: Path, scans: list[str]) -> None:
    path = pairs(tmp_path / "rows.tsv")
    surveyed(path, "pairs")
    surveyed(path, "labelled")
    survey(InputConfig(path=str(path)), "pairs", 4, remember=remembered)
    path.write_text(path.read_text().replace("answer 3", "answer 8"))
    surveyed(path, "pairs")
    assert len(scans) == 4
    # The same content elsewhere is the same survey, of the other file.
    (tmp_path / "other").mkdir()
    moved = path.rename(tmp_path / "other" / "rows.tsv")
    assert surveyed(moved, "pairs").files == (str(moved),)
    assert len(scans) == 4


def test_a_file_that_changes_while_it_is_surveyed_leaves_no_note(
    tmp_path: Path, scans: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = pairs(tmp_path / "rows.tsv")
    plain = pieces._survey_sources

    def changed_after(*arguments: Any) -> Survey:
        made = plain(*arguments)
        path.write_text(path.read_text().replace("answer 3", "answer 8"))
        return made

    with monkeypatch.context() as patch:
        patch.setattr(pieces, "_survey_sources", changed_after)
        surveyed(path, "pairs")
    assert not list((tmp_path / "cache").rglob("*.arrow"))


def test_rejected_rows_are_listed_each_time_and_the_list_goes_when_they_are_mended(
    tmp_path: Path, scans: list[str]
) -> None:
    path = pairs(tmp_path / "rows.tsv")
    good = path.read_text()
    surveyed(path, "pairs")
    path.write_text(good + "no tab\n")
    settings: dict[str, Any] = {"on_error": "quarantine", "quarantine": quarantine_of(str(tmp_path / "out"))}
    for _ in range(2):
        found = surveyed(path, "pairs", **settings)
        assert found.quarantine_file is not None
        assert json.loads(Path(found.quarantine_file).read_text())["line"] == 11
    with pytest.raises(InputError, match=r"rows\.tsv:11"):
        surveyed(path, "pairs")
    path.write_text(good)
    assert surveyed(path, "pairs", **settings).num_rejected == 0
    assert not Path(found.quarantine_file).exists()


def test_a_damaged_note_and_a_cache_that_cannot_be_written_cost_a_survey(
    tmp_path: Path, scans: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = pairs(tmp_path / "rows.tsv")
    made = surveyed(path, "pairs")
    (note,) = (tmp_path / "cache" / "surveys").iterdir()
    for damage in (b"", b"ARROW1", note.read_bytes()[:-40]):
        note.write_bytes(damage)
        assert surveyed(path, "pairs") == made
    assert len(scans) == 4
    monkeypatch.setenv("RAYTOWER_CACHE", str(write(tmp_path / "no folder", b"")))
    assert surveyed(path, "pairs") == made


def test_what_is_counted_in_all_rows_is_counted_once_for_a_content(tmp_path: Path, scans: list[str]) -> None:
    path = pairs(tmp_path / "rows.tsv")
    counts: list[str] = []

    def count(name: str, surveyed: Survey) -> Any:
        def look() -> list[Any]:
            counts.append(name)
            return [name, surveyed.num_rows]

        return counted(surveyed, name, look)

    for _ in range(2):
        found = surveyed(path, "pairs")
        assert count("a", found) == ["a", 10]
        assert count("b", found) == ["b", 10]
    assert counts == ["a", "b"]
    # Of rows that are not remembered nothing is.
    for _ in range(2):
        count("a", replace(found, content=None))
    # What a share is taken from are other rows.
    rest = set_dev_aside(found, 0.3, seed=1)
    assert count("a", rest) == ["a", rest.num_rows]
    assert counts == ["a", "b", "a", "a", "a"]
    path.write_text(path.read_text() + "another\trow\n")
    assert count("a", surveyed(path, "pairs")) == ["a", 11]
