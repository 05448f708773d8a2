"""Candidate lists: what a row may hold, what is refused, and that the best-scored document comes first."""

from __future__ import annotations

import gzip
import json
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raytower.data.normalised import normalised
from raytower.data.pieces import read_piece, read_pieces
from raytower.data.plain_texts import plain_text
from raytower.data.records import canonical_schema
from raytower.errors import InputError
from tests.support.data_files import Row, quarantined, read, rows_of, survey_of, write, write_jsonl

GOOD = {"query": "q", "documents": ["a", "b"], "scores": [1, 0]}


def _record(query: str, documents: list[str], scores: list[float]) -> Row:
    return {"query": query, "documents": documents, "scores": scores}


def test_documents_and_scores_are_read_best_first(tmp_path: Path) -> None:
    rows = [
        _record("已排序", ["甲", "乙"], [2, -1.5]),
        _record("q", ["low", "tie 1", "best", "tie 2", "tie 3"], [-7, 0.5, 1e3, 0.5, 0.5]),
        _record("all equal", ["x", "y", "x"], [0, 0.0, -0.0]),
    ]
    path = write_jsonl(tmp_path / "c.jsonl", rows)
    assert read(path, "candidates") == [
        _record("已排序", ["甲", "乙"], [2.0, -1.5]),
        _record("q", ["best", "tie 1", "tie 2", "tie 3", "low"], [1e3, 0.5, 0.5, 0.5, -7.0]),
        _record("all equal", ["x", "y"], [0.0, 0.0]),
    ]
    assert survey_of(path, "candidates").schema == canonical_schema("candidates")


def test_a_document_counts_once_in_its_row(tmp_path: Path) -> None:
    """A positive among its own negatives would be trained as relevant and as irrelevant."""
    rows = [
        {"query": "one", "positive": "p", "negatives": ["p ", "n", "n"]},
        {"query": "two", "positive": ["p1", "p2", "p1"], "negatives": ["n", "p2"]},
        {"query": "given", "documents": ["a", "b", "a"], "scores": [0, 1, 2]},
    ]
    path = write_jsonl(tmp_path / "c.jsonl", rows)
    assert read(path, "candidates") == [
        _record("one", ["p", "n"], [1.0, 0.0]),
        _record("two", ["p1", "n"], [1.0, 0.0]),
        _record("two", ["p2", "n"], [1.0, 0.0]),
        _record("given", ["a", "b"], [2.0, 1.0]),
    ]
    assert survey_of(path, "candidates").num_repeated == 5


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"positive": "p", "negatives": ["p"]}, "every negative is one of its positives"),
        ({"documents": ["a", " a"], "scores": [1, 0]}, "hold one text alone"),
        ({"documents": ["a", "b"], "scores": [1, 0], "negatives": ["c"]}, "'negatives' stands beside"),
    ],
)
def test_rows_without_another_document_are_refused(tmp_path: Path, row: Row, reason: str) -> None:
    path = write_jsonl(tmp_path / "c.jsonl", [{"query": "q", **row}])
    with pytest.raises(InputError, match=f"c.jsonl:1: .*{reason}"):
        survey_of(path, "candidates")


def test_each_positive_makes_a_record_with_all_negatives(tmp_path: Path) -> None:
    rows = [
        {"query": "one", "positive": "p", "negatives": ["n1", "n2"], "note": "other keys are passed over"},
        {"query": "two", "positive": ["p1", "p2", "p3"], "negatives": ["n"]},
        {"query": "given", "documents": ["a", "b"], "scores": [0, 1]},
        {"query": "list of one", "positive": ["p"], "negatives": ["n1", "n2"]},
    ]
    path = write_jsonl(tmp_path / "c.jsonl", rows)
    expected = [
        _record("one", ["p", "n1", "n2"], [1.0, 0.0, 0.0]),
        _record("two", ["p1", "n"], [1.0, 0.0]),
        _record("two", ["p2", "n"], [1.0, 0.0]),
        _record("two", ["p3", "n"], [1.0, 0.0]),
        _record("given", ["b", "a"], [1.0, 0.0]),
        _record("list of one", ["p", "n1", "n2"], [1.0, 0.0, 0.0]),
    ]
    assert read(path, "candidates") == expected
    surveyed = survey_of(path, "candidates", rows_per_piece=2)
    assert [(piece.first_row, piece.num_rows) for piece in surveyed.pieces] == [(0, 4), (4, 2)]
    assert rows_of(surveyed) == expected


LISTS = [
    (pa.list_(pa.string()), pa.list_(pa.float64())),
    (pa.large_list(pa.large_string()), pa.list_(pa.float32())),
    (pa.list_(pa.dictionary(pa.int32(), pa.string())), pa.large_list(pa.int64())),
    (pa.list_(pa.string(), 2), pa.list_(pa.int8(), 2)),
]


@pytest.mark.parametrize(("texts", "numbers"), LISTS)
def test_parquet_lists(tmp_path: Path, texts: pa.DataType, numbers: pa.DataType) -> None:
    documents = [["a", "b"], ["文", "c\td"], ["e", "f"], ["g", "h"], ["i", "j"]]
    scores = [[1, 2], [4, 3], [5, 5], [-1, 0], [0, -1]]
    columns = {"scores": pa.array(scores, numbers), "documents": pa.array(documents, texts), "more": range(5)}
    path = tmp_path / "c.parquet"
    pq.write_table(pa.table({**columns, "query": list("qrstu")}), path, row_group_size=3)
    expected = [
        _record("q", ["b", "a"], [2.0, 1.0]),
        _record("r", ["文", "c\td"], [4.0, 3.0]),
        _record("s", ["e", "f"], [5.0, 5.0]),
        _record("t", ["h", "g"], [0.0, -1.0]),
        _record("u", ["i", "j"], [0.0, -1.0]),
    ]
    for rows_per_piece in (1, 2, 100):
        assert read(path, "candidates", rows_per_piece=rows_per_piece) == expected


def test_whole_numbers_too_long_for_a_float_are_rounded(tmp_path: Path) -> None:
    path = tmp_path / "c.parquet"
    columns = {"query": ["q"], "documents": [["a", "b"]], "scores": [[2**53 + 1, 2**62]]}
    pq.write_table(pa.table(columns), path)
    assert read(path, "candidates") == [_record("q", ["b", "a"], [2.0**62, 2.0**53])]


def test_compressed(tmp_path: Path) -> None:
    rows = [{**GOOD, "query": f"问 {number}"} for number in range(50)]
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path = write(tmp_path / "c.jsonl.gz", gzip.compress(content))
    for rows_per_piece in (7, 1000):
        assert read(path, "candidates", rows_per_piece=rows_per_piece) == [
            _record(row["query"], ["a", "b"], [1.0, 0.0]) for row in rows
        ]


UNSEEN = "holds only invisible characters"
BAD_ROWS: list[tuple[Any, str]] = [
    ({"documents": ["a", "b"], "scores": [1, 0]}, "missing key 'query'"),
    ({**GOOD, "query": None}, "'query' is null, must be a string"),
    ({**GOOD, "query": ["q"]}, "'query' is of JSON type array, must be a string"),
    ({**GOOD, "query": " "}, "empty query"),
    ({**GOOD, "query": "\u200b"}, f"the query {UNSEEN}"),
    ({"query": "q", "document": "a"}, "missing key 'documents' (with 'scores'), or 'positive' with 'negatives'"),
    ({"query": "q", "documents": ["a", "b"]}, "missing key 'scores'"),
    ({**GOOD, "documents": None}, "'documents' is null, must be an array of strings"),
    ({**GOOD, "documents": "a"}, "'documents' is of JSON type string, must be an array of strings"),
    ({**GOOD, "documents": ["a", 2]}, "element 2 of 'documents' is of JSON type number, must be a string"),
    ({**GOOD, "documents": ["a", None]}, "element 2 of 'documents' is null, must be a string"),
    ({**GOOD, "documents": []}, "documents holds 0 texts, must hold at least 2"),
    ({**GOOD, "documents": ["a"], "scores": [1]}, "documents holds 1 text, must hold at least 2"),
    ({**GOOD, "documents": ["a", "b", ""], "scores": [1, 0, 0]}, "empty document 3"),
    ({**GOOD, "documents": ["\u3000\t", ""]}, "empty document 1"),
    ({**GOOD, "documents": ["a", "\ufeff \u2060"]}, f"document 2 {UNSEEN}"),
    ({**GOOD, "scores": {}}, "'scores' is of JSON type object, must be an array of numbers"),
    ({**GOOD, "scores": [1]}, "2 documents and 1 score; each document has one score"),
    ({**GOOD, "scores": [1, 0, 0]}, "2 documents and 3 scores; each document has one score"),
    ({**GOOD, "scores": ["1", 0]}, "element 1 of 'scores' is of JSON type string, must be a number"),
    ({**GOOD, "scores": [1, True]}, "element 2 of 'scores' is of JSON type boolean, must be a number"),
    ({**GOOD, "scores": [1, None]}, "element 2 of 'scores' is null, must be a number"),
    ({**GOOD, "scores": [1, float("nan")]}, "score 2 'nan' is not a finite number"),
    ({**GOOD, "scores": [float("-inf"), 0]}, "score 1 '-inf' is not a finite number"),
    ({**GOOD, "scores": [0, 10**400]}, "score 2 'inf' is not a finite number"),
    ({"query": "q", "positive": "a"}, "missing key 'negatives'"),
    ({"query": "q", "negatives": ["a"]}, "missing key 'positive'"),
    ({"query": "q", "positive": 1, "negatives": ["a"]},
     "'positive' is of JSON type number, must be a string or an array of strings"),
    ({"query": "q", "positive": [1], "negatives": ["a"]},
     "element 1 of 'positive' is of JSON type number, must be a string"),
    ({"query": "q", "positive": "a", "negatives": "b"},
     "'negatives' is of JSON type string, must be an array of strings"),
    ({"query": "q", "positive": [], "negatives": ["a"]}, "'positive' is an empty array, must hold at least 1 text"),
    ({"query": "q", "positive": "a", "negatives": []}, "'negatives' is an empty array, must hold at least 1 text"),
    ({"query": " ", "positive": ["a", "b", "c"], "negatives": ["d"]}, "empty query"),
    ({"query": "q", "positive": ["a", " ", "c"], "negatives": ["d", ""]}, "empty positive 2"),
    ({"query": "q", "positive": ["a", "b"], "negatives": ["d", "\u200d"]}, f"negative 2 {UNSEEN}"),
    ({"query": "q", "positive": "a", "negatives": ["b"], "scores": [1, 0]},
     "'scores' goes with 'documents'; 'positive' and 'negatives' stand for the scores 1 and 0"),
    ([GOOD], "JSON array, must be an object with one record a line"),
]  # fmt: skip


@pytest.mark.parametrize(("bad", "reason"), BAD_ROWS)
def test_bad_rows(tmp_path: Path, bad: Any, reason: str) -> None:
    """Under fail the message names file, line and rule; under quarantine the row is listed once, whole."""
    several = {"query": "r", "positive": ["a", "b"], "negatives": ["c"]}
    path = write_jsonl(tmp_path / "c.jsonl", [several, bad, GOOD])
    with pytest.raises(InputError) as raised:
        survey_of(path, "candidates")
    assert str(raised.value).startswith(f"{path}:2: {reason}. The row is ")
    surveyed, entries = quarantined(path, "candidates", tmp_path / "q")
    assert [(entry["line"], entry["reason"]) for entry in entries] == [(2, reason)]
    assert json.dumps(json.loads(entries[0]["raw"])) == json.dumps(bad)
    assert (surveyed.num_rows, surveyed.num_rejected) == (3, 1)
    assert [row["query"] for row in rows_of(surveyed)] == ["r", "r", "q"]


def _bad_table() -> pa.Table:
    """Rows of which the first, the 13th and the last are good."""
    broken = pa.array([b"a", b"\xff"]).view(pa.string())
    good = ["a", "b"]
    documents = [
        good,
        None,
        [],
        ["a"],
        ["a", None],
        [" ", "b"],
        good,
        good,
        good,
        good,
        good,
        ["a", "\x00"],
        good,
    ]
    scores = [
        [0, 1],
        [1, 0],
        [],
        [1],
        [1, 0],
        [1, 0],
        None,
        [1],
        [1, None],
        [1, float("nan")],
        [0, 1],
        [0, 1],
        [0, 1],
    ]
    query: list[str | None] = ["q"] * 13
    query[10] = None
    table = pa.table({"query": query, "documents": documents, "scores": scores})
    return pa.concat_tables(
        [table, pa.table({
            "query": ["q", "q"],
            "documents": pa.ListArray.from_arrays(pa.array([0, 2, 4], pa.int32()),
                                                  pa.concat_arrays([broken, pa.array(good)])),
            "scores": [[0.0, 1.0], [0.0, 1.0]],
        })]
    )  # fmt: skip


def test_bad_parquet_rows(tmp_path: Path) -> None:
    path = tmp_path / "c.parquet"
    pq.write_table(_bad_table(), path, row_group_size=4)
    surveyed, entries = quarantined(path, "candidates", tmp_path / "q")
    assert [(entry["line"], entry["reason"]) for entry in entries] == [
        (2, "'documents' is null, must be a list of strings"),
        (3, "documents holds 0 texts, must hold at least 2"),
        (4, "documents holds 1 text, must hold at least 2"),
        (5, "document 2 is null, must be a string"),
        (6, "empty document 1"),
        (7, "'scores' is null, must be a list of numbers"),
        (8, "2 documents and 1 score; each document has one score"),
        (9, "score 2 is null, must be a number"),
        (10, "score 2 'nan' is not a finite number"),
        (11, "'query' is null, must be a string"),
        (12, f"document 2 {UNSEEN}"),
        (14, "documents is not UTF-8"),
    ]
    assert json.loads(entries[-1]["raw"]) == _record("q", ["a", "\\xff"], [0.0, 1.0])
    assert rows_of(surveyed) == [_record("q", ["b", "a"], [1.0, 0.0])] * 3
    with pytest.raises(
        InputError, match=r"c\.parquet:2: 'documents' is null, must be a list of strings\. The row"
    ):
        survey_of(path, "candidates")


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("documents", ["a"], "column 'documents' is string, which is no list of texts"),
        ("documents", [[1, 2]], "column 'documents' is list<element: int64>, which is no list of texts"),
        ("scores", [["1", "2"]], "column 'scores' is list<element: string>, which is no list of numbers"),
        ("scores", [1.0], "column 'scores' is double, which is no list of numbers"),
        ("query", [["q"]], "column 'query' is list<element: string>, which is no text"),
        ("scores", None, "no column 'scores'; candidates records need one. The file has: query, documents"),
    ],
)
def test_parquet_columns_of_other_types(tmp_path: Path, column: str, values: Any, message: str) -> None:
    columns = {"query": ["q"], "documents": [["a", "b"]], "scores": [[1.0, 0.0]], column: values}
    path = tmp_path / "c.parquet"
    pq.write_table(pa.table({name: values for name, values in columns.items() if values is not None}), path)
    with pytest.raises(InputError) as raised:
        survey_of(path, "candidates")
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("name", "settings", "file_format"),
    [
        ("c.tsv", {}, "tsv"),
        ("c.txt", {}, "tsv"),
        ("c", {}, "tsv"),
        ("c.jsonl", {"format": "lines"}, "lines"),
        ("c.jsonl", {"format": "tsv"}, "tsv"),
    ],
)
def test_formats_without_lists_are_refused(
    tmp_path: Path, name: str, settings: dict[str, str], file_format: str
) -> None:
    path = write(tmp_path / name, "query\tdocuments\tscores\nq\ta\t1\n")
    with pytest.raises(InputError) as raised:
        survey_of(path, "candidates", **settings)
    expected = (
        f"{path}: candidates records hold lists, which format {file_format} cannot carry; give JSON lines"
    )
    assert str(raised.value).startswith(expected)


def _spaced(text: str) -> str:
    return " ".join(text.split())


_TEXTS = st.builds(lambda text: text + "x", st.text(st.sampled_from("a汉\n\t\u2028🙂 "), max_size=4))
_SCORES = st.integers(-2, 2) | st.floats(allow_nan=False, allow_infinity=False)
_CANDIDATES = st.lists(st.tuples(_TEXTS, _SCORES), min_size=2, max_size=6).filter(
    lambda items: len({_spaced(text) for text, _ in items}) > 1
)


def _once(texts: list[str]) -> list[str]:
    """The first of texts that are equal but for space."""
    first: dict[str, str] = {}
    for text in texts:
        first.setdefault(_spaced(text), text)
    return list(first.values())


@settings(deadline=None, max_examples=60)
@given(
    lists=st.lists(
        st.one_of(_CANDIDATES, st.tuples(st.lists(_TEXTS, min_size=1, max_size=3), _TEXTS)), min_size=1
    ),
    bad=st.lists(st.integers(0, 20), max_size=3),
    rows_per_piece=st.integers(1, 7),
)
def test_reading_by_pieces_is_reading_the_whole(
    lists: list[Any], bad: list[int], rows_per_piece: int
) -> None:
    rows: list[Row] = []
    expected: list[Row] = []
    for number, item in enumerate(lists):
        query = f"q{number}"
        if isinstance(item, tuple):
            positives, negative = item
            rows.append({"query": query, "positive": positives, "negatives": [negative, "y"]})
            relevant = _once(positives)
            others = [
                text
                for text in (negative, "y")
                if _spaced(text) not in [_spaced(known) for known in positives]
            ]
            zeros = [0.0] * len(others)
            expected += [_record(query, [text, *others], [1.0, *zeros]) for text in relevant]
        else:
            rows.append(_record(query, [text for text, _ in item], [score for _, score in item]))
            best = sorted(item, key=lambda pair: pair[1], reverse=True)  # keeps the order of equals
            kept = [
                (text, float(score))
                for place, (text, score) in enumerate(best)
                if _spaced(text) not in [_spaced(other) for other, _ in best[:place]]
            ]
            expected.append(_record(query, [text for text, _ in kept], [score for _, score in kept]))
    good = list(rows)
    for place in bad:
        rows.insert(min(place, len(rows)), _record("bad", ["a", ""], [1, 0]))
    with tempfile.TemporaryDirectory() as folder:
        path = write_jsonl(Path(folder) / "good.jsonl", good)
        surveyed = survey_of(path, "candidates", rows_per_piece)
        backwards = [read_piece(piece).to_pylist() for piece in reversed(surveyed.pieces)]
        forwards = [table.to_pylist() for table in read_pieces(surveyed.pieces)]
        mixed, entries = quarantined(
            write_jsonl(Path(folder) / "mixed.jsonl", rows), "candidates", Path(folder) / "q"
        )
        assert rows_of(mixed) == expected
    assert forwards == backwards[::-1]
    assert [row for table in forwards for row in table] == expected
    assert len(surveyed.pieces) == -(-len(lists) // rows_per_piece)
    firsts = [piece.first_row for piece in surveyed.pieces]
    assert firsts == [sum(map(len, forwards[:number])) for number in range(len(forwards))]
    assert (mixed.num_rows, mixed.num_rejected) == (len(expected), len(bad))
    assert [entry["reason"] for entry in entries] == ["empty document 2"] * len(bad)


@given(st.text(st.sampled_from("aAｂB汉字ﬁé \t\u2028\u3000\x1c\x85"), max_size=8))
def test_a_column_and_a_text_have_one_plain_form(text: str) -> None:
    assert normalised(pa.array([text])).to_pylist() == [plain_text(text)]
