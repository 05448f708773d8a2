"""Pieces add up to the file, none is empty, none runs past it, and reading by pieces is reading the whole."""

from __future__ import annotations

import gzip
import itertools
import json
import pickle
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from raytower.data import slices
from raytower.data.config import InputConfig
from raytower.data.pieces import Survey, read_piece, read_pieces, survey
from raytower.data.sources import find_files
from raytower.errors import InputError
from tests.support.data_files import rows_of, survey_of, write, write_jsonl

hypothesis_settings.register_profile("files", deadline=None, max_examples=60)
_FILES = hypothesis_settings(hypothesis_settings.get_profile("files"))

# Whatever a text may hold, and in every text something that is no whitespace.
_ODD = st.sampled_from("\"'\u2028\x85\x0b\x0c\x1e\r 🙂汉\u3000\\,\ufeff")
_CHARACTERS = st.one_of(_ODD, st.characters(exclude_categories=["Cs"], exclude_characters="\n\t"))
_TEXT = st.builds(
    lambda a, b: a + "x" + b + "y", st.text(_CHARACTERS, max_size=8), st.text(_CHARACTERS, max_size=8)
)
_ANY_TEXT = st.builds(
    lambda text: text + "x", st.text(st.one_of(_ODD, st.sampled_from("\n\t"), _CHARACTERS), max_size=8)
)
_SIZES = st.integers(1, 12)


@contextmanager
def _file(name: str, content: bytes) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield write(Path(folder) / name, content)


def _check_pieces(surveyed: Survey, rows_per_piece: int, num_rows: int) -> None:
    pieces = surveyed.pieces
    assert [piece.index for piece in pieces] == list(range(len(pieces)))
    assert all(1 <= piece.num_rows <= rows_per_piece for piece in pieces)
    starts = [sum(piece.num_rows for piece in pieces[:number]) for number in range(len(pieces))]
    assert [piece.first_row for piece in pieces] == starts
    assert surveyed.num_rows == sum(piece.num_rows for piece in pieces) == num_rows


def _check_extents(surveyed: Survey, body_start: int, body_end: int) -> None:
    """Every byte of the rows is in exactly one piece."""
    edges = [(piece.extent.start, piece.extent.end) for piece in surveyed.pieces]
    assert edges[0][0] == body_start
    assert edges[-1][1] == body_end
    assert all(end == start for (_, end), (start, _) in itertools.pairwise(edges))


@_FILES
@given(
    texts=st.lists(_TEXT, min_size=1, max_size=30),
    rows_per_piece=_SIZES,
    newline=st.sampled_from(["\n", "\r\n"]),
)
@example(texts=["x\ry"], rows_per_piece=1, newline="\n")
@example(texts=["xy\r"], rows_per_piece=1, newline="\r\n")
def test_lines(texts: list[str], rows_per_piece: int, newline: str) -> None:
    # One carriage return before a newline belongs to the newline, so a text that ends with one needs the long newline.
    texts = [text if newline == "\r\n" else text.rstrip("\r") for text in texts]
    content = "".join(text + newline for text in texts).encode()
    bom = len(b"\xef\xbb\xbf") if content.startswith(b"\xef\xbb\xbf") else 0
    expected = [texts[0][1:] if bom else texts[0], *texts[1:]]
    with _file("c.txt", content) as path:
        surveyed = survey_of(path, "corpus", rows_per_piece)
        rows = rows_of(surveyed)
    assert rows == [{"id": f"c:{number}", "text": text} for number, text in enumerate(expected, start=1)]
    _check_pieces(surveyed, rows_per_piece, len(texts))
    _check_extents(surveyed, bom, len(content))
    assert len(surveyed.pieces) == -(-len(texts) // rows_per_piece)


@_FILES
@given(
    rows=st.lists(st.tuples(_TEXT, _TEXT), min_size=1, max_size=30),
    rows_per_piece=_SIZES,
    compress=st.booleans(),
    ends_with_newline=st.booleans(),
)
def test_tsv_pairs(
    rows: list[tuple[str, str]], rows_per_piece: int, compress: bool, ends_with_newline: bool
) -> None:
    # A file with carriage returns and no newline at all is refused, as one of an old Mac.
    newline = b"\n" * (ends_with_newline or len(rows) == 1)
    content = "\n".join("\t".join(row) for row in rows).encode() + newline
    content = b"\xef\xbb\xbf" + content
    with _file("p.tsv.gz" if compress else "p.tsv", gzip.compress(content) if compress else content) as path:
        surveyed = survey_of(path, "pairs", rows_per_piece)
        backwards = [read_piece(piece).to_pylist() for piece in reversed(surveyed.pieces)]
        forwards = [table.to_pylist() for table in read_pieces(surveyed.pieces)]
    assert forwards == backwards[::-1]
    assert [(row["query"], row["document"]) for table in forwards for row in table] == rows
    _check_pieces(surveyed, rows_per_piece, len(rows))
    _check_extents(surveyed, 3, len(content))


_WHOLE = st.integers(-(2**53), 2**53)
_FLOAT = st.floats(allow_nan=False, allow_infinity=False)
# Each gives values of one type.
_JSON_SCALARS = [st.booleans(), st.integers(-(2**63), 2**63 - 1), _WHOLE | _FLOAT, _ANY_TEXT]
_JSON_VALUES = [
    *_JSON_SCALARS,
    *(st.lists(st.none() | values, max_size=3) for values in _JSON_SCALARS),
    st.fixed_dictionaries({}, optional={"x.y": st.none() | _WHOLE, "名": st.lists(_ANY_TEXT, max_size=2)}),
    st.lists(st.fixed_dictionaries({}, optional={"x": _WHOLE | _FLOAT}), max_size=2),
]


def _json_rows(values: st.SearchStrategy[Any]) -> st.SearchStrategy[list[dict[str, Any]]]:
    row = st.fixed_dictionaries(
        {"text": _ANY_TEXT}, optional={"a": st.none() | values, "b": st.integers(-3, 3)}
    )
    return st.lists(row, min_size=1, max_size=20)


def _without_nulls(value: Any) -> Any:
    """JSON without the members that are null, which a column of objects gives to those that lack them."""
    if isinstance(value, dict):
        members = {key: _without_nulls(inner) for key, inner in value.items()}
        return {key: inner for key, inner in members.items() if inner is not None} or None
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


@_FILES
@given(
    rows=st.sampled_from(_JSON_VALUES).flatmap(_json_rows), rows_per_piece=_SIZES, ensure_ascii=st.booleans()
)
def test_jsonl_corpus(rows: list[dict[str, Any]], rows_per_piece: int, ensure_ascii: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = write_jsonl(Path(folder) / "c.jsonl", rows, ensure_ascii)
        surveyed = survey_of(path, "corpus", rows_per_piece)
        by_pieces = rows_of(surveyed)
        whole = rows_of(survey_of(path, "corpus", 1000))
    assert by_pieces == whole
    assert [row["text"] for row in by_pieces] == [row["text"] for row in rows]
    assert [row.get("b") for row in by_pieces] == [row.get("b") for row in rows]
    _check_pieces(surveyed, rows_per_piece, len(rows))
    for row, source in zip(by_pieces, rows, strict=True):
        assert _without_nulls(row.get("a")) == _without_nulls(source.get("a"))


_ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["x", "y"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("xyz"), inner, max_size=3),
    max_leaves=3,
)


@_FILES
@given(rows=st.lists(_ANY_JSON.map(lambda value: {"text": "t", "a": value}), min_size=1, max_size=5))
def test_what_passes_does_not_depend_on_the_cut(rows: list[dict[str, Any]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = write_jsonl(Path(folder) / "c.jsonl", rows)
        try:
            whole = rows_of(survey_of(path, "corpus"))
        except InputError:
            with pytest.raises(InputError):
                survey_of(path, "corpus", 1)
            return
        assert rows_of(survey_of(path, "corpus", 1)) == whole


@_FILES
@given(
    rows=st.lists(_ANY_TEXT, min_size=1, max_size=40),
    rows_per_piece=_SIZES,
    row_group_size=st.integers(1, 15),
    data=st.data(),
)
def test_parquet(rows: list[str], rows_per_piece: int, row_group_size: int, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "c.parquet"
        pq.write_table(pa.table({"text": rows, "n": range(len(rows))}), path, row_group_size=row_group_size)
        surveyed = survey_of(path, "corpus", rows_per_piece)
        order = data.draw(st.permutations(range(len(surveyed.pieces))))
        tables = {number: read_piece(surveyed.pieces[number]).to_pylist() for number in order}
    found = [row for number in sorted(tables) for row in tables[number]]
    assert found == [{"id": f"c:{n + 1}", "text": text, "n": n} for n, text in enumerate(rows)]
    _check_pieces(surveyed, rows_per_piece, len(rows))


@_FILES
@given(
    lines=st.lists(
        st.sampled_from([b"k\tt", b"\xff\tt", b"", b"k", b"\tt", b"a\tb\tc", b"i\xe6\xb1\x89\tt"]),
        max_size=25,
    ),
    rows_per_piece=_SIZES,
)
def test_bad_rows_are_the_same_however_the_file_is_cut(lines: list[bytes], rows_per_piece: int) -> None:
    content = b"first\tt\n" + b"".join(line + b"\n" for line in lines) + b"last\tt\n"

    def run(path: Path, size: int) -> tuple[Survey, list[dict[str, Any]], list[dict[str, Any]]]:
        surveyed = survey(InputConfig(path=str(path)), "corpus", size, "quarantine", str(path.parent / "q"))
        file = surveyed.quarantine_file
        entries = [] if file is None else [json.loads(line) for line in Path(file).read_bytes().splitlines()]
        return surveyed, rows_of(surveyed), entries

    with _file("c.tsv", content) as path:
        by_pieces, rows, entries = run(path, rows_per_piece)
        _, whole_rows, whole_entries = run(path, 1000)
    assert rows == whole_rows
    assert sorted(entries, key=lambda e: e["line"]) == sorted(whole_entries, key=lambda e: e["line"])
    assert by_pieces.num_rejected == len(entries)
    assert len(rows) + len(entries) == len(lines) + 2
    assert sum(row["id"] == "k" for row in rows) == min(1, lines.count(b"k\tt"))
    _check_pieces(by_pieces, rows_per_piece, len(rows))


@_FILES
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30),
    rows_per_slice=_SIZES,
    read_bytes=st.integers(1, 50),
    limit=st.integers(1, 60),
)
def test_slices_do_not_depend_on_how_the_stream_is_read(
    lengths: list[int], rows_per_slice: int, read_bytes: int, limit: int
) -> None:
    content = b"".join(b"x" * length + b"\n" for length in lengths)
    with _file("c.txt", content) as path, pytest.MonkeyPatch.context() as patch:
        (file,) = find_files(str(path)).files
        patch.setattr(slices, "MAX_SLICE_BYTES", limit)
        whole = list(slices.iter_slices(file, 0, 1, rows_per_slice))
        patch.setattr(slices, "_READ_BYTES", read_bytes)
        found = list(slices.iter_slices(file, 0, 1, rows_per_slice))
    assert found == whole
    assert b"".join(piece.data for piece in found) == content
    for piece in found:
        assert piece.data.endswith(b"\n")
        num_lines = piece.data.count(b"\n")
        assert num_lines <= rows_per_slice
        assert len(piece.data) <= limit or num_lines == 1
        assert piece.first_line == content[: piece.start].count(b"\n") + 1


def test_a_line_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices, "MAX_LINE_BYTES", 100)
    monkeypatch.setattr(slices, "MAX_SLICE_BYTES", 50)
    monkeypatch.setattr(slices, "_READ_BYTES", 64)
    path = write(tmp_path / "x.txt", b"a\n" + b"b" * 1000)
    with pytest.raises(ValueError, match=r"x\.txt:2: a line of more than 100 bytes; is it a text file"):
        survey_of(path, "lines")


def test_pieces_survive_pickling(tmp_path: Path) -> None:
    surveyed = survey_of(write(tmp_path / "x.tsv", "a\tb\nc\td\n"), "corpus", 1)
    copies = pickle.loads(pickle.dumps(surveyed.pieces))
    assert copies == surveyed.pieces
    assert [read_piece(piece).to_pylist() for piece in copies] == [
        [{"id": "a", "text": "b"}],
        [{"id": "c", "text": "d"}],
    ]


def test_a_rewritten_file_is_read_anew(tmp_path: Path) -> None:
    """The reader that is kept for the next piece of a Parquet file must not outlive the file's content."""
    path = tmp_path / "p.parquet"
    for text in ("old", "new"):
        pq.write_table(pa.table({"text": [text]}), path)
        (piece,) = survey_of(path, "lines").pieces
        assert read_piece(piece)["text"].to_pylist() == [text]


def test_survey_reports_files_and_bytes(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a.txt", "xx\n"), write(tmp_path / "b.txt", "y")
    surveyed = survey_of(tmp_path, "corpus")
    assert surveyed.files == (str(first), str(second))
    assert (surveyed.bytes, surveyed.num_rows, surveyed.num_rejected) == (4, 2, 0)


def test_the_survey_says_whether_ids_are_places(tmp_path: Path) -> None:
    (tmp_path / "some.jsonl").write_text('{"id": "a", "text": "x"}\n{"text": "y"}\n')
    (tmp_path / "all.jsonl").write_text('{"id": "a", "text": "x"}\n')
    (tmp_path / "none.txt").write_text("x\ny\n")
    found = {
        name: survey_of(tmp_path / name, "corpus").derived_ids
        for name in ("some.jsonl", "all.jsonl", "none.txt")
    }
    assert found == {"some.jsonl": True, "all.jsonl": False, "none.txt": True}
