"""Every format of every record kind gives the rows that its text says."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import get_args

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raytower.data.records import RecordKind, canonical_schema
from raytower.errors import InputError
from tests.support.data_files import read, survey_of, write, write_jsonl


def _pair(query: str, document: str, query_id: str | None = None, document_id: str | None = None) -> dict:
    return {"query": query, "document": document, "query_id": query_id, "document_id": document_id}


def test_lines_keep_tabs_quotes_and_odd_separators(tmp_path: Path) -> None:
    texts = [
        'say "hi"\tthere',
        "一\u2028二\u2029",
        "a\x0bb\x0cc\x1ed",
        "lone\rreturn",
        " spaced ",
        "🙂\u0000",
    ]
    path = write(tmp_path / "notes.txt", "\n".join(texts) + "\n")
    expected = [{"id": f"notes:{number}", "text": text} for number, text in enumerate(texts, start=1)]
    assert read(path, "corpus") == expected
    assert read(path, "lines") == expected


def test_corpus_tsv_without_tabs_is_one_text_a_line(tmp_path: Path) -> None:
    path = write(tmp_path / "corpus.tsv", "一\n二")
    assert read(path, "corpus") == [{"id": "corpus:1", "text": "一"}, {"id": "corpus:2", "text": "二"}]


def test_corpus_tsv_with_one_tab_is_id_and_text(tmp_path: Path) -> None:
    path = write(tmp_path / "corpus.tsv", '007\t"quoted\n x 1\ttext\n')
    assert read(path, "corpus") == [{"id": "007", "text": '"quoted'}, {"id": " x 1", "text": "text"}]


def test_corpus_tsv_with_a_header_passes_columns_through(tmp_path: Path) -> None:
    path = write(
        tmp_path / "corpus.tsv", "year\tdoi\ttitle\ttext\tid\n1999\tA\tT\tbody\t5\n2000\tB\t\tx\t6\n"
    )
    assert read(path, "corpus", id_field="doi") == [
        {"id": "A", "text": "T body", "year": "1999", "title": "T", "source_text": "body", "source_id": "5"},
        {"id": "B", "text": "x", "year": "2000", "title": "", "source_text": None, "source_id": "6"},
    ]
    assert read(path, "lines") == [{"id": "5", "text": "T body"}, {"id": "6", "text": "x"}]


def test_corpus_jsonl_joins_fields_and_types_its_other_keys(tmp_path: Path) -> None:
    rows = [
        {
            "_id": 1,
            "title": "T",
            "text": "x",
            "n": 1,
            "f": 1,
            "b": True,
            "m": {"lang": "zh", "tags": []},
            "l": ["一", None],
            "big": 2**63,
        },
        {
            "_id": "b",
            "title": None,
            "text": "y\tz",
            "n": -2,
            "f": 0.5,
            "b": None,
            "m": {"page": 3},
            "new": "late",
        },
        {"title": " ", "text": "w"},
    ]
    path = write_jsonl(tmp_path / "docs.jsonl", rows)
    surveyed = survey_of(path, "corpus", rows_per_piece=1)
    assert surveyed.schema == pa.schema(
        [
            ("id", pa.string()),
            ("text", pa.string()),
            ("n", pa.int64()),
            ("f", pa.float64()),
            ("b", pa.bool_()),
            ("m", pa.struct([("lang", pa.string()), ("tags", pa.list_(pa.null())), ("page", pa.int64())])),
            ("l", pa.list_(pa.string())),
            ("big", pa.uint64()),
            ("title", pa.string()),
            ("source_text", pa.string()),
            ("new", pa.string()),
        ]
    )
    none = dict.fromkeys(["n", "f", "b", "m", "l", "big", "title", "source_text", "new"])
    first = {"n": 1, "f": 1.0, "b": True, "l": ["一", None], "big": 2**63, "title": "T", "source_text": "x"}
    assert read(path, "corpus") == [
        {**none, "id": "1", "text": "T x", **first, "m": {"lang": "zh", "tags": [], "page": None}},
        {
            **none, "id": "b", "text": "y\tz", "n": -2, "f": 0.5, "new": "late",
            "m": {"lang": None, "tags": None, "page": 3},
        },
        {**none, "id": "docs:3", "text": "w", "title": " "},
    ]  # fmt: skip
    assert read(path, "lines")[0] == {"id": "1", "text": "T x"}


def test_corpus_text_fields_and_id_field_choose_keys(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "docs.jsonl", [{"key": "k", "q": "问", "a": "答", "id": 9, "text": "t"}])
    (row,) = read(path, "corpus", text_fields=["q", "a"], id_field="key")
    assert row == {"id": "k", "text": "问 答", "q": "问", "a": "答", "source_id": 9, "source_text": "t"}


def test_three_text_fields_join_what_is_there(tmp_path: Path) -> None:
    rows = [
        ("a", "b", "c"),
        (None, "b", "c"),
        ("a", "", "c"),
        (None, None, "c"),
        (" ", None, " c "),
        ("a", "b ", "c"),
    ]
    path = write_jsonl(tmp_path / "x.jsonl", [dict(zip("pqr", row, strict=True)) for row in rows])
    texts = [row["text"] for row in read(path, "lines", text_fields=["p", "q", "r"])]
    assert texts == ["a b c", "b c", "a c", "c", " c ", "a b  c"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("pairs.tsv", "a\tb\n一\t二\n"),
        ("pairs.txt", "a\tb\n一\t二"),
        ("pairs.tsv", "\ufeffa\tb\r\n一\t二\r\n\r\n"),
        ("pairs.tsv", "query\tdocument\na\tb\n一\t二\n"),
        ("pairs.tsv", "similar_text\ttext\nb\ta\n二\t一\n"),
        ("pairs.jsonl", '{"text": "a", "similar_text": "b"}\n{"sentence1": "一", "sentence2": "二"}\n'),
        ("pairs.json", '\ufeff{"query": "a", "title": "b"}\n{"query": "一", "document": "二"}\n'),
        ("pairs", "a\tb\n一\t二\n"),
    ],
)
def test_pairs(tmp_path: Path, name: str, content: str) -> None:
    assert read(write(tmp_path / name, content), "pairs") == [_pair("a", "b"), _pair("一", "二")]


def test_pairs_carry_ids_where_the_source_has_them(tmp_path: Path) -> None:
    tsv = write(tmp_path / "p.tsv", "query_id\tquery\tdocument_id\tdocument\n1\ta\t2\tb\n")
    jsonl = write_jsonl(
        tmp_path / "p.jsonl", [{"query": "a", "query_id": 1, "document": "b", "document_id": "2"}]
    )
    assert read(tsv, "pairs") == read(jsonl, "pairs") == [_pair("a", "b", "1", "2")]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.tsv", 'query\ttitle\tneg_title\nq"\tt\tn\n'),
        ("t.tsv", 'neg_title\tnote\tquery\ttitle\nn\t-\tq"\tt\n'),
        ("t.jsonl", '{"query": "q\\"", "title": "t", "neg_title": "n"}'),
        ("t.jsonl", '{"query": "q\\"", "document": "t", "negative": "n"}'),
    ],
)
def test_triples(tmp_path: Path, name: str, content: str) -> None:
    assert read(write(tmp_path / name, content), "triples") == [
        {"query": 'q"', "document": "t", "negative": "n"}
    ]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("s.tsv", "query\ttitle\tlabel\na\tb\t1\nc\td\t-0.25\ne\tf\t 2e1 \n"),
        ("headerless.csv", "a\tb\t1\nc\td\t-0.25\ne\tf\t 2e1 \n"),
        (
            "s.jsonl",
            '{"sentence1": "a", "sentence2": "b", "label": "1"}\n'
            '{"query": "c", "title": "d", "label": -0.25}\n'
            '{"query": "e", "document": "f", "label": 20}\n',
        ),
    ],
)
def test_scored(tmp_path: Path, name: str, content: str) -> None:
    assert read(write(tmp_path / name, content), "scored") == [
        {"query": "a", "document": "b", "label": 1.0},
        {"query": "c", "document": "d", "label": -0.25},
        {"query": "e", "document": "f", "label": 20.0},
    ]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("l.txt", "文\t医学##药学\nx\t3\n"),
        ("l.tsv", "text\tlabel\n文\t医学##药学\nx\t3\n"),
        ("l.jsonl", '{"text": "文", "label": "医学##药学"}\n{"text": "x", "label": 3}\n'),
    ],
)
def test_labelled(tmp_path: Path, name: str, content: str) -> None:
    expected = [{"text": "文", "label": "医学##药学"}, {"text": "x", "label": "3"}]
    assert read(write(tmp_path / name, content), "labelled") == expected


def test_parquet_of_every_kind(tmp_path: Path) -> None:
    columns = {
        "id": [7, 8, 9],
        "text": pa.array(["a", "b", "a"]).dictionary_encode(),
        "query": pa.array(["q1", "q2", "q3"], pa.large_string()),
        "document": ["d1", "d2", "d3"],
        "negative": ["n1", "n2", "n3"],
    }
    path = tmp_path / "all.parquet"
    pq.write_table(
        pa.table({**columns, "label": [1, 0, 2], "tags": [["x"], [], None]}), path, row_group_size=2
    )
    assert read(path, "triples")[2] == {"query": "q3", "document": "d3", "negative": "n3"}
    assert read(path, "scored")[2] == {"query": "q3", "document": "d3", "label": 2.0}
    assert read(path, "labelled")[0] == {"text": "a", "label": "1"}
    assert read(path, "lines") == [{"id": i, "text": t} for i, t in zip("789", "aba", strict=True)]
    corpus = read(path, "corpus")
    assert [row["tags"] for row in corpus] == [["x"], [], None]
    assert corpus[1] == {
        "id": "8", "text": "b", "query": "q2", "document": "d2", "negative": "n2", "label": 0, "tags": []
    }  # fmt: skip
    pq.write_table(pa.table(columns).drop_columns(["negative", "text"]), path)
    assert read(path, "pairs")[1] == _pair("q2", "d2")


def test_parquet_without_ids_counts_rows_over_row_groups(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    pq.write_table(pa.table({"text": list("abcde")}), path, row_group_size=2)
    surveyed = survey_of(path, "lines", rows_per_piece=4)
    assert [piece.num_rows for piece in surveyed.pieces] == [2, 2, 1]
    assert [row["id"] for row in read(path, "lines")] == [f"p:{row}" for row in range(1, 6)]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_text(tmp_path: Path, suffix: str) -> None:
    content = b"".join(f"第{number}行\n".encode() for number in range(1, 101))
    path = tmp_path / f"corpus.txt{suffix}"
    if suffix == ".gz":
        # Two members one after the other, as `cat a.gz b.gz` makes them.
        path.write_bytes(gzip.compress(content[:500]) + gzip.compress(content[500:]))
    else:
        with pa.CompressedOutputStream(str(path), "zstd") as stream:
            stream.write(content)
    expected = [{"id": f"corpus:{number}", "text": f"第{number}行"} for number in range(1, 101)]
    for rows_per_piece in (7, 1000):
        assert read(path, "corpus", rows_per_piece=rows_per_piece) == expected


@pytest.mark.parametrize("kind", get_args(RecordKind))
def test_tables_have_the_canonical_columns(tmp_path: Path, kind: RecordKind) -> None:
    row = {"text": "t", "query": "q", "document": "d"}
    row |= {"negative": "n"} if kind == "triples" else {}
    row |= {"documents": ["d", "e"], "scores": [1, 0]} if kind == "candidates" else {}
    row |= {"label": "1"} if kind in ("scored", "labelled") else {}
    surveyed = survey_of(write_jsonl(tmp_path / "r.jsonl", [row]), kind)
    names = canonical_schema(kind).names
    assert surveyed.schema.names[: len(names)] == names
    if kind != "corpus":
        assert surveyed.schema == canonical_schema(kind)


def _ranked(query: str, document: str, score: float | None = None, **ids: str) -> dict:
    return {
        "query": query,
        "document": document,
        "score": score,
        "query_id": None,
        "document_id": None,
        "title": None,
        **ids,
    }


def test_candidates_a_row_each(tmp_path: Path) -> None:
    """The files of a recall stage: two columns or three, with and without a header."""
    assert read(write(tmp_path / "a.tsv", "q\tx\nq\ty\n"), "ranked") == [_ranked("q", "x"), _ranked("q", "y")]
    scored = write(tmp_path / "b.txt", "q\tx\t0.5\nq\ty\t-1e-3\n")
    assert read(scored, "ranked") == [_ranked("q", "x", 0.5), _ranked("q", "y", -0.001)]
    named = write(tmp_path / "c.tsv", "score\ttitle\tquery\n0.5\tx\tq\n")
    assert read(named, "ranked") == [_ranked("q", "x", 0.5, title="x")]
    rows = [{"query_id": "7", "query": "q", "rank": 1, "id": "d", "score": 2, "text": "x"}]
    expected = [_ranked("q", "x", 2.0, query_id="7", document_id="d")]
    assert read(write_jsonl(tmp_path / "d.jsonl", rows), "ranked") == expected
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "e.parquet")
    assert read(tmp_path / "e.parquet", "ranked") == expected
    # Of a list that was reranked the recall score is read.
    reranked = [{**rows[0], "recall_score": 0.25}, {**rows[0], "recall_score": None}]
    assert [row["score"] for row in read(write_jsonl(tmp_path / "f.jsonl", reranked), "ranked")] == [
        0.25,
        None,
    ]


def test_explicit_format_overrides_the_extension(tmp_path: Path) -> None:
    path = write(tmp_path / "corpus.tsv", "a\tb\n")
    assert read(path, "corpus", format="lines") == [{"id": "corpus:1", "text": "a\tb"}]
    assert read(write(tmp_path / "x.dat", "a\tb\n"), "corpus", format="tsv") == [{"id": "a", "text": "b"}]
    with pytest.raises(InputError, match=r"extension '\.dat' tells no format .* or set input\.format"):
        read(tmp_path / "x.dat", "corpus")
    with pytest.raises(InputError, match=r"format lines holds one text a row, and pairs records need more"):
        read(path, "pairs", format="lines")
