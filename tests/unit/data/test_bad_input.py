"""Every way in which a row or a file can be wrong: fail names file, line and rule; quarantine lists the row."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raytower.annotation.config import MineConfig
from raytower.annotation.rows_in import survey_rows
from raytower.config import make_config
from raytower.data.config import InputConfig
from raytower.data.pieces import read_piece, survey
from raytower.data.queries import read_queries
from raytower.data.records import RecordKind
from raytower.errors import InputError
from raytower.training.config import RetrieverDevConfig
from raytower.training.dev_recall import load_dev_set
from tests.support.data_files import quarantined, read, rows_of, survey_of, write, write_jsonl

_SCORED = b"query\ttitle\tlabel\nq\tt\t1\n"
_TRIPLES = b"query\ttitle\tneg_title\nq\tt\tn\n"

# kind, file name, good first lines, the bad line, the whole reason
BAD_ROWS: list[tuple[RecordKind, str, bytes, bytes, str]] = [
    ("lines", "x.txt", b"a\n", b"\xe4\xb8", "not UTF-8: byte 0xe4 at byte 1 of the line"),
    ("corpus", "x.tsv", b"i\tt\n", b"j\tb\xff", "not UTF-8: byte 0xff at byte 4 of the line"),
    ("scored", "x.jsonl", b'{"query":"q","title":"t","label":1}\n', b"\xc0",
     "not UTF-8: byte 0xc0 at byte 1 of the line"),
    ("lines", "x.txt", b"a\n", b"", "empty text: the line is blank"),
    ("lines", "x.txt", b"a\n", b" \xe3\x80\x80\t", "empty text: the line is blank"),
    ("pairs", "x.tsv", b"a\tb\n", b"", "empty text: the line is blank"),
    ("lines", "x.jsonl", b'{"text": "a"}\n', b"", "empty text: the line is blank"),
    ("corpus", "x.tsv", b"a\n", b"b\tc", "2 columns, expected 1 (text) separated by tabs; if tabs belong to the texts, "
     "give the file the extension .txt"),
    ("corpus", "x.tsv", b"i\tt\n", b"t", "1 column, expected 2 (id, text) separated by tabs"),
    ("pairs", "x.tsv", b"a\tb\n", b"a\tb\tc", "3 columns, expected 2 (query, document) separated by tabs; "
     "if the others are to be left out, name all columns in a first line, query and document among them"),
    ("triples", "x.tsv", _TRIPLES, b"q\tt", "2 columns, expected 3 (query, title, neg_title) separated by tabs"),
    ("labelled", "x.txt", b"t\tA\n", b"t", "1 column, expected 2 (text, label) separated by tabs"),
    ("pairs", "x.tsv", b"a\tb\n", b"\tb", "empty query"),
    ("pairs", "x.tsv", b"a\tb\n", b"a\t  ", "empty document"),
    ("triples", "x.tsv", _TRIPLES, b"q\tt\t", "empty negative"),
    ("labelled", "x.tsv", b"t\tA\n", b"t\t ", "empty label"),
    ("corpus", "x.tsv", b"i\tt\n", b" \tt", "empty id"),
    ("corpus", "x.tsv", b"i\tt\n", b"j\x00\tt", "id holds a NUL character"),
    ("scored", "x.tsv", _SCORED, b"q\tt\t", "empty label"),
    ("scored", "x.tsv", _SCORED, b"q\tt\tyes", "label 'yes' is not a finite number"),
    ("scored", "x.tsv", _SCORED, b"q\tt\tnan", "label 'nan' is not a finite number"),
    ("scored", "x.tsv", _SCORED, b"q\tt\t-inf", "label '-inf' is not a finite number"),
    ("scored", "x.tsv", _SCORED, b"q\tt\t1_0", "label '1_0' is not a finite number"),
    ("scored", "x.tsv", _SCORED, b"q\tt\t1e999", "label '1e999' is not a finite number"),
    ("scored", "x.jsonl", b'{"query":"q","title":"t","label":1}\n', b'{"query":"q","title":"t","label":NaN}',
     "label 'nan' is not a finite number"),
    ("scored", "x.jsonl", b'{"query":"q","title":"t","label":1}\n', b'{"query":"q","title":"t","label":true}',
     "'label' is of JSON type boolean, must be a number; write true as 1 and false as 0"),
    ("scored", "x.jsonl", b'{"query":"q","title":"t","label":1}\n', b'{"query":"q","title":"t"}',
     "missing key 'label' or 'score'"),
    ("scored", "x.jsonl", b'{"query":"q","title":"t","label":1}\n', b'{"query":"q","label":1}',
     "missing key 'document' or 'title' or 'sentence2'"),
    ("ranked", "x.tsv", b"q\tt\n", b"q\tt\t1", "3 columns, expected 2 (query, document) separated by tabs; "
     "if the others are to be left out, name all columns in a first line, query and document among them"),
    ("ranked", "x.tsv", b"q\tt\t1\n", b"q\tt", "2 columns, expected 3 (query, document, score) separated by tabs"),
    ("ranked", "x.tsv", b"q\tt\t1\n", b"q\tt\tnan", "recall_score 'nan' is not a finite number"),
    ("lines", "x.jsonl", b'{"text": "a"}\n', b'{"title": "a"}', "missing key 'text'"),
    ("lines", "x.jsonl", b'{"text": "a"}\n', b'{"text": null}', "'text' is null, must be a string"),
    ("lines", "x.jsonl", b'{"text": "a"}\n', b'{"text": ["a"]}', "'text' is of JSON type array, must be a string"),
    ("lines", "x.jsonl", b'{"text": "a"}\n', b'{"text": 1}', "'text' is of JSON type number, must be a string"),
    ("lines", "x.jsonl", b'{"text": "a"}\n', b'{"text": "b", "title": {}}',
     "'title' is of JSON type object, must be a string"),
    ("lines", "x.jsonl", b'{"text": "a"}\n', b'{"text": "b", "id": 1.5}',
     "'id' is of JSON type number, must be a string or an integer"),
    ("lines", "x.jsonl", b'{"text": "a"}\n', b'{"text": " "}', "empty text"),
    ("lines", "x.jsonl", b'{"text": "a"}\n', b'{"text": "", "title": "t"}', "empty text"),
    # Zero-width space, joiners, word joiner, byte order mark, control characters; among spaces too.
    ("lines", "x.txt", b"a\n", "\u200b\u200c\u200d\u2060\ufeff".encode(), "the text holds only invisible characters"),
    ("lines", "x.txt", b"a\n", b"\x00\x01\x7f", "the text holds only invisible characters"),
    ("corpus", "x.tsv", b"i\tt\n", "j\t \u200b\u3000".encode(), "the text holds only invisible characters"),
    ("pairs", "x.tsv", b"a\tb\n", "\ufeff\tb".encode(), "the query holds only invisible characters"),
    ("triples", "x.tsv", _TRIPLES, "q\tt\t\u00ad\u200e".encode(), "the negative holds only invisible characters"),
    ("labelled", "x.tsv", b"t\tA\n", "t\t\u2060".encode(), "the label holds only invisible characters"),
    ("scored", "x.jsonl", b'{"query":"q","title":"t","label":1}\n', b'{"query":"q","title":"\\u200d","label":1}',
     "the document holds only invisible characters"),
    ("lines", "x.jsonl", b'{"text": "a"}\n', b'{"text": " \\u0000 \\ufeff"}',
     "the text holds only invisible characters"),
    ("lines", "x.jsonl", b'{"text": "a"}\n', '{"text": "\u200b", "title": "t"}'.encode(),
     "the text holds only invisible characters"),
    ("lines", "x.jsonl", b'{"text": "a"}\n', b'["a"]', "JSON array, must be an object with one record a line"),
    ("lines", "x.jsonl", b'{"text": "a"}\n', b"null", "JSON null, must be an object with one record a line"),
    ("lines", "x.jsonl", b'{"text": "a"}\n', b'{"text": "a"',
     "not valid JSON: Expecting ',' delimiter at character 13"),
    ("lines", "x.jsonl", b'{"text": "a"}\n', b'{"text": "\\ud83d"}',
     "half of a surrogate pair (\\ud800 to \\udfff) stands alone; it is no character"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "name", "good", "bad", "reason"), BAD_ROWS)
def test_fail_names_file_line_and_rule(
    tmp_path: Path, kind: RecordKind, name: str, good: bytes, bad: bytes, reason: str
) -> None:
    path = write(tmp_path / name, good + bad + b"\n" + good.splitlines()[-1])
    with pytest.raises(InputError) as raised:
        survey_of(path, kind)
    line = good.count(b"\n") + 1
    assert str(raised.value).startswith(f"{path}:{line}: {reason}. The row is ")
    assert "on_error: quarantine" in str(raised.value)


@pytest.mark.parametrize(("kind", "name", "good", "bad", "reason"), BAD_ROWS)
def test_quarantine_lists_the_row_and_keeps_the_rest(
    tmp_path: Path, kind: RecordKind, name: str, good: bytes, bad: bytes, reason: str
) -> None:
    last = good.splitlines()[-1].replace(b"i\t", b"k\t")
    clean = read(write(tmp_path / "clean" / name, good + last), kind)
    path = write(tmp_path / name, good + bad + b"\n" + last)
    surveyed, entries = quarantined(path, kind, tmp_path / "quarantine")
    line = good.count(b"\n") + 1
    expected = {
        "file": str(path),
        "line": line,
        "reason": reason,
        "raw": bad.decode("utf-8", "backslashreplace"),
    }
    if "UTF-8" in reason:
        expected["raw_base64"] = base64.b64encode(bad).decode()
    assert entries == [expected]
    assert (surveyed.num_rows, surveyed.num_rejected) == (2, 1)
    rows = rows_of(surveyed)
    if "id" in clean[0] and clean[1]["id"] == f"x:{line}":
        clean[1]["id"] = f"x:{line + 1}"  # derived ids count the rejected line
    assert rows == clean


def test_deeply_nested_json_is_a_bad_row(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", b'{"text": "a"}\n{"text": ' + b"[" * 100_000 + b"\n")
    with pytest.raises(InputError, match=r"x\.jsonl:2: not valid JSON"):
        survey_of(path, "lines")


def test_one_blank_line_at_the_end_is_no_row(tmp_path: Path) -> None:
    for end in (b"", b"\n", b"\n\n", b"\n  ", b"\r\n\r\n", b"\n \n"):
        path = write(tmp_path / "x.txt", b"a\nb" + end)
        for rows_per_piece in (1, 2, 10):
            assert [row["text"] for row in rows_of(survey_of(path, "lines", rows_per_piece))] == ["a", "b"], (
                end
            )
    with pytest.raises(InputError, match=r"x\.txt:3: empty text"):
        survey_of(write(tmp_path / "x.txt", b"a\nb\n\n\n"), "lines")


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        ("triples", "q\tt\tn\n", "query<TAB>title<TAB>neg_title"),
        ("scored", "q\tt\tyes\n", "query<TAB>title<TAB>label"),
        ("scored", "q\tt\tnan\n", "query<TAB>title<TAB>label"),
        ("scored", "q\tt\t1\t2\n", "query<TAB>title<TAB>label"),
        ("scored", "query\ttitle\tneg_title\n", "query<TAB>title<TAB>label"),
    ],
)
def test_missing_header_names_the_expected_one(
    tmp_path: Path, kind: RecordKind, content: str, message: str
) -> None:
    with pytest.raises(InputError) as raised:
        quarantined(write(tmp_path / "x.tsv", content), kind, tmp_path / "q")
    assert f"x.tsv:1: no header; the first line of a {kind} file names its columns: {message}." in str(
        raised.value
    )


def test_scored_rows_without_a_header_are_all_numbers_in_their_third_column(tmp_path: Path) -> None:
    """A first row that ends in a number by chance makes no triples scored pairs."""
    path = write(tmp_path / "x.csv", "q\tt\t7\nq\tt\tn\n")
    with pytest.raises(InputError, match=r"x\.csv:2: label 'n' is not a finite number"):
        survey_of(path, "scored")


def test_lines_of_texts_with_commas_are_no_ids_and_texts(tmp_path: Path) -> None:
    """The text up to the first comma was taken for an id, and left out of the vector."""
    content = "半监督学习综述, 图像分类\n基于深度学习的方法, 检索\n"
    path = write(tmp_path / "corpus.csv", content)
    for kind in ("corpus", "lines"):
        with pytest.raises(
            InputError, match=r"without a header.*id '半监督学习综述'.*set input\.format to lines"
        ):
            survey_of(path, kind)
    whole = [row["text"] for row in rows_of(survey_of(path, "lines", format="lines"))]
    assert whole == content.splitlines()
    ids = write(tmp_path / "ids.csv", "d1,a text\nd2,another\n")
    assert [row["id"] for row in rows_of(survey_of(ids, "corpus"))] == ["d1", "d2"]


@pytest.mark.parametrize(
    ("name", "content", "other"),
    [
        ("x.tsv", "query\ttitle\tlabel\nq\tt\t0\n", "scored"),
        ("x.tsv", "query\ttitle\tneg_title\nq\tt\tn\n", "triples"),
        ("x.jsonl", '{"sentence1": "a", "sentence2": "b", "label": "0"}\n', "scored"),
        ("x.jsonl", '{"query": "a", "title": "b", "neg_title": "c"}\n', "triples"),
    ],
)
def test_judged_files_are_refused_as_pairs(tmp_path: Path, name: str, content: str, other: str) -> None:
    """Also under quarantine: the rows are good, the kind is wrong."""
    with pytest.raises(InputError, match=rf"{name}:1: .* read it as {other}"):
        quarantined(write(tmp_path / name, content), "pairs", tmp_path / "q")


@pytest.mark.parametrize(
    ("kind", "key", "value", "other"),
    [
        ("pairs", "score", 0.04, "scored"),
        ("pairs", "gold_label", "contradiction", "scored"),
        ("pairs", "similarity_score", 0, "scored"),
        ("pairs", "isDuplicate", 1, "scored"),
        ("pairs", "relevance", 2, "scored"),
        ("pairs", "相似度", 1, "scored"),
        ("pairs", "is_correct", 0, "scored"),
        ("pairs", "relevance_grade", 0, "scored"),
        ("pairs", "cos_sim", 0.1, "scored"),
        ("pairs", "是否匹配", 0, "scored"),
        ("pairs", "是否相关", "否", "scored"),
        ("pairs", "hard_negatives", ["n"], "triples"),
        ("triples", "negative_2", "n", "triples"),
    ],
)
def test_a_verdict_or_negatives_are_not_passed_over(
    tmp_path: Path, kind: RecordKind, key: str, value: object, other: str
) -> None:
    row = {"query": "a", "document": "b", **({"negative": "c"} if kind == "triples" else {}), key: value}
    files = [write(tmp_path / "x.jsonl", json.dumps(row) + "\n"), tmp_path / "x.parquet"]
    pq.write_table(pa.Table.from_pylist([row]), files[1])
    for file in files:
        with pytest.raises(InputError, match=rf"{file.name}.*{key}.* read it as {other}"):
            survey_of(file, kind)


def test_a_verdict_has_a_remedy_for_those_that_have_no_format(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [{"query": "a", "document": "b", "is_correct": 0}])
    with pytest.raises(InputError, match=r"to evaluate, mine or .* keep the rows that match.*BEIR folder"):
        read_queries(str(path))


@pytest.mark.parametrize("kind", ["pairs", "triples", "scored"])
@pytest.mark.parametrize("name", ["x.jsonl", "x.tsv", "x.parquet"])
def test_a_title_is_no_document_beside_its_text(tmp_path: Path, kind: RecordKind, name: str) -> None:
    """An index joins the two, so that mining found the whole document as a negative of its title."""
    row = {"query": "a", "title": "b", "text": "c"}
    row |= {"triples": {"negative": "d"}, "scored": {"label": "1"}}.get(kind, {})
    path = tmp_path / name
    if name == "x.parquet":
        pq.write_table(pa.Table.from_pylist([row]), path)
    else:
        line = "\t".join(row) + "\n" + "\t".join(row.values()) + "\n"
        write(path, json.dumps(row) + "\n" if name == "x.jsonl" else line)
    with pytest.raises(InputError, match=rf"{name}.* has 'title' and 'text', and {kind} would read 'title'"):
        survey_of(path, kind)


def test_columns_that_are_not_read_are_named_wherever_rows_are_read(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [{"query": "a", "document": "b", "quality": 0}])
    values = {"index": "i", "input": {"path": str(path)}, "output": str(tmp_path / "mined.tsv")}
    for read_rows in (
        lambda: read_queries(str(path)),
        lambda: load_dev_set(RetrieverDevConfig(path=str(path))),
        lambda: survey_rows(make_config(MineConfig, values), "pairs"),
    ):
        read_rows()
        assert f"{path}: read as pairs, of which 'quality' are no part" in capfd.readouterr().err


@pytest.mark.parametrize(
    "key",
    [
        "label_source",
        "match_id",
        "label_count",
        "neg_count",
        "negative_ids",
        "numNegatives",
        "query_score_url",
        "correct_spelling",
        "grade_level",
        "simple",
    ],
)
def test_a_part_of_a_name_is_no_verdict_and_no_negative(tmp_path: Path, key: str) -> None:
    row = {"query": "a", "document": "b", key: 1}
    path = write_jsonl(tmp_path / "x.jsonl", [row])
    assert survey_of(path, "pairs").unread_columns == (key,)
    path = write_jsonl(tmp_path / "x.jsonl", [{**row, "negative": "c"}])
    assert survey_of(path, "triples").unread_columns == (key,)


@pytest.mark.parametrize(
    ("kind", "names"), [("pairs", ("query", "document")), ("labelled", ("text", "label"))]
)
@pytest.mark.parametrize("name", ["x.tsv", "x.csv", "x.jsonl"])
def test_a_column_more_is_read_alike_in_every_form(
    tmp_path: Path, kind: RecordKind, names: tuple[str, str], name: str
) -> None:
    """A table says by its first line which of its columns are read, as JSON does by its keys."""
    row = {names[0]: "a b", "lang": "en", names[1]: "c d"}
    between = "\t" if name == "x.tsv" else ","
    table = "".join(between.join(cells) + "\n" for cells in (row.keys(), row.values()))
    path = write(tmp_path / name, json.dumps(row) + "\n" if name == "x.jsonl" else table)
    surveyed = survey_of(path, kind)
    assert surveyed.unread_columns == ("lang",)
    assert [[row[name] for name in names] for row in rows_of(surveyed)] == [["a b", "c d"]]


@pytest.mark.parametrize("first", ["a b\tc d\t1\n", "query\tdocument\tscore\n", "query\tdoc\tlang\n"])
def test_a_column_more_that_may_be_a_verdict_is_refused(tmp_path: Path, first: str) -> None:
    """Without names, under the name of a verdict, or beside names of which one is none that pairs have."""
    path = write(tmp_path / "x.tsv", first + "a b\tc d\t0\n")
    with pytest.raises(InputError, match=r"x\.tsv:1: "):
        survey_of(path, "pairs")


def test_columns_that_are_not_read_are_known(tmp_path: Path) -> None:
    row = {"query": "a", "document": "b", "title": "c", "lang": "en"}
    path = write(tmp_path / "x.jsonl", json.dumps(row) + "\n")
    assert survey_of(path, "pairs").unread_columns == ("lang", "title")
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "x.parquet")
    assert survey_of(tmp_path / "x.parquet", "pairs").unread_columns == ("lang", "title")
    tsv = write(tmp_path / "x.tsv", "query\ttitle\tlabel\tlang\na\tb\t1\ten\n")
    assert survey_of(tsv, "scored").unread_columns == ("lang",)


@pytest.mark.parametrize(
    ("kind", "header"),
    [
        ("labelled", "Sentence\tClass"),
        ("labelled", "text,labels"),
        ("pairs", "question\tanswer"),
        ("labelled", "文本\t标签"),
    ],
)
def test_a_header_of_other_names_is_no_row(tmp_path: Path, kind: RecordKind, header: str) -> None:
    comma = "," in header
    path = write(
        tmp_path / ("x.csv" if comma else "x.tsv"), header + ("\na b,c\n" if comma else "\na b\tc\n")
    )
    with pytest.raises(InputError, match=r"x\.[ct]sv:1: .*reads like a header"):
        survey_of(path, kind)


def test_a_triple_of_one_document_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "x.tsv", "query\ttitle\tneg_title\nq\ta\ta \n")
    with pytest.raises(InputError, match=r"x\.tsv:2: negative is the document itself, 'a'"):
        survey_of(path, "triples")


@pytest.mark.parametrize("name", ["x.txt", "x.tsv", "x.jsonl", "x"])
@pytest.mark.parametrize("content", [b"", b"\n", b"\xef\xbb\xbf", b"  \r\n"])
def test_empty_file(tmp_path: Path, name: str, content: bytes) -> None:
    with pytest.raises(InputError, match=rf"{name} holds no rows"):
        survey_of(write(tmp_path / name, content), "corpus")


def test_header_without_rows_and_empty_parquet(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no rows after its header"):
        survey_of(write(tmp_path / "x.tsv", _SCORED.splitlines()[0]), "scored")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "x.parquet")
    with pytest.raises(InputError, match=r"x\.parquet holds no rows"):
        survey_of(tmp_path / "x.parquet", "corpus")


def test_a_file_with_only_bad_rows_fails_but_leaves_its_quarantine_file(tmp_path: Path) -> None:
    bad = write(tmp_path / "in" / "b.txt", b"\xff\n\xfe\n")
    with pytest.raises(
        InputError, match=r"b\.txt holds no row that keeps the rules of corpus; .*\.jsonl lists"
    ):
        quarantined(tmp_path / "in", "corpus", tmp_path / "q")
    (file,) = (tmp_path / "q").iterdir()
    assert file.read_text().count(str(bad)) == 2


def test_quarantine_file_is_replaced_and_goes_when_the_input_is_corrected(tmp_path: Path) -> None:
    path = write(tmp_path / "x.txt", "a\n\nb\n")
    first, _ = quarantined(path, "lines", tmp_path / "q")
    content = Path(str(first.quarantine_file)).read_bytes()
    again, _ = quarantined(path, "lines", tmp_path / "q")
    assert again == first
    assert [file.read_bytes() for file in (tmp_path / "q").iterdir()] == [content]
    corrected, entries = quarantined(write(path, "a\nb\n"), "lines", tmp_path / "q")
    assert (corrected.num_rejected, corrected.quarantine_file, entries) == (0, None, [])
    assert list((tmp_path / "q").iterdir()) == []


def test_quarantine_needs_a_place(tmp_path: Path) -> None:
    path = write(tmp_path / "x.txt", "a\n")
    with pytest.raises(InputError, match="no quarantine location"):
        survey(InputConfig(path=str(path)), "lines", on_error="quarantine")


def test_duplicate_ids_within_and_across_files(tmp_path: Path) -> None:
    one = write(
        tmp_path / "one.tsv", "".join(f"id{number}\twords\n" for number in range(10)) + "id4\tagain\n"
    )
    with pytest.raises(InputError) as raised:
        survey_of(one, "corpus", rows_per_piece=3)
    assert str(raised.value).startswith(
        f"{one}:11: id 'id4' is already the id of {one}:5; ids must be unique."
    )
    write(one, "a\tx\nb\ty\n")
    two = write(tmp_path / "two.tsv", "c\tx\nb\tz\n")
    with pytest.raises(InputError) as raised:
        survey_of(tmp_path, "corpus")
    assert str(raised.value).startswith(f"{two}:2: id 'b' is already the id of {one}:2;")


def test_explicit_id_equal_to_a_derived_one(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [{"text": "a"}, {"text": "b", "id": "x:1"}])
    with pytest.raises(InputError, match=r"x\.jsonl:2: id 'x:1' is already the id of .*x\.jsonl:1"):
        survey_of(path, "corpus")


def test_later_duplicates_go_to_quarantine_for_every_reader(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.tsv", "i\tfirst\n\nj\tsecond\ni\tthird\nk\tfourth\n")
    write(tmp_path / "in" / "b.tsv", "i\tfifth\nl\tsixth\n")
    surveyed, entries = quarantined(tmp_path / "in", "corpus", tmp_path / "q")
    assert [(Path(e["file"]).name, e["line"], e["raw"]) for e in entries] == [
        ("a.tsv", 2, ""),
        ("a.tsv", 4, "i\tthird"),
        ("b.tsv", 1, "i\tfifth"),
    ]
    assert [row["text"] for row in rows_of(surveyed)] == ["first", "second", "fourth", "sixth"]
    assert (surveyed.num_rows, surveyed.num_rejected) == (4, 3)
    assert [piece.first_row for piece in surveyed.pieces] == [0, 2, 3]


def test_id_field_that_the_file_lacks(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"id_field is 'key', but the file has no such column \(columns: text\)"
    ):
        survey_of(write(tmp_path / "x.txt", "a\n"), "corpus", id_field="key")
    with pytest.raises(InputError, match=r"x\.jsonl:1: missing key 'key'"):
        survey_of(write_jsonl(tmp_path / "x.jsonl", [{"id": "1", "text": "a"}]), "corpus", id_field="key")


def _not_parquet(path: Path) -> None:
    path.write_bytes(b"PAR1 no more")


def _without_text(path: Path) -> None:
    pq.write_table(pa.table({"body": ["a"]}), path)


def _numeric_text(path: Path) -> None:
    pq.write_table(pa.table({"text": [1]}), path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_not_parquet, "is no readable Parquet file"),
        (_without_text, "no column 'text'; corpus records need one. The file has: body"),
        (_numeric_text, "column 'text' is int64, which is no text"),
    ],
)
def test_parquet_files_that_cannot_be_read(
    tmp_path: Path, make: Callable[[Path], None], message: str
) -> None:
    make(tmp_path / "x.parquet")
    with pytest.raises(InputError) as raised:
        survey_of(tmp_path / "x.parquet", "corpus")
    assert message in str(raised.value)


def test_bad_parquet_rows(tmp_path: Path) -> None:
    broken = pa.Array.from_buffers(
        pa.string(), 5, [None, pa.py_buffer(b"".join(n.to_bytes(4, "little") for n in (0, 1, 1, 2, 3, 4))),
                         pa.py_buffer(b"a\xffcd")]
    )  # fmt: skip
    table = pa.table({"id": ["1", "2", "3", None, "1"], "text": broken, "n": [1, 2, 3, 4, 5]})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=4)
    surveyed, entries = quarantined(tmp_path / "x.parquet", "corpus", tmp_path / "q")
    assert [(e["line"], e["reason"]) for e in entries] == [
        (2, "empty text"),
        (3, "text is not UTF-8"),
        (5, f"id '1' is already the id of {tmp_path}/x.parquet:1; ids must be unique"),
    ]
    assert rows_of(surveyed) == [{"id": "1", "text": "a", "n": 1}, {"id": "x:4", "text": "c", "n": 4}]


def test_bad_parquet_numbers(tmp_path: Path) -> None:
    table = pa.table({"query": ["q"] * 3, "title": ["t", None, "t"], "label": [0.5, 1, float("nan")]})
    pq.write_table(table, tmp_path / "x.parquet")
    surveyed, entries = quarantined(tmp_path / "x.parquet", "scored", tmp_path / "q")
    assert [(e["line"], e["reason"]) for e in entries] == [
        (2, "'document' is null, must be a string"),
        (3, "label 'nan' is not a finite number"),
    ]
    assert rows_of(surveyed) == [{"query": "q", "document": "t", "label": 0.5}]


def test_parquet_files_that_disagree_on_a_column(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"], "n": [1], "w": [1]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": ["b"], "n": [0.5]}), tmp_path / "b.parquet")
    assert read(tmp_path, "corpus")[1] == {"id": "b:1", "text": "b", "n": 0.5, "w": None}
    pq.write_table(pa.table({"text": ["c"], "n": [["x"]]}), tmp_path / "c.parquet")
    with pytest.raises(InputError, match=r"c\.parquet:1: column 'n' holds list, but int64 at .*a\.parquet:1"):
        survey_of(tmp_path, "corpus")


@pytest.mark.parametrize("content", [b"plain text", gzip.compress(b"some words " * 9999, mtime=0)[:-20]])
def test_broken_compression(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(
        InputError, match=r"x\.txt\.gz cannot be read at byte .*; is it really compressed, and whole"
    ):
        survey_of(write(tmp_path / "x.txt.gz", content), "corpus")


def test_a_file_that_changes_or_goes_after_the_survey(tmp_path: Path) -> None:
    path = write(tmp_path / "x.txt", "aa\nbb\n")
    (piece,) = survey_of(path, "corpus").pieces
    write(path, "aaaaa\n")
    with pytest.raises(
        InputError, match=r"has changed since it was surveyed: 1 good rows from line 1 on, expected 2"
    ):
        read_piece(piece)
    write(path, "aa\nbb\ncc\n")
    with pytest.raises(InputError, match="has changed since it was surveyed: 9 bytes, 6 before"):
        read_piece(piece)
    path.unlink()
    with pytest.raises(InputError, match=r"no file at .*x\.txt"):
        read_piece(piece)


def test_rows_per_piece_below_one(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="rows_per_piece is 0"):
        survey_of(write(tmp_path / "x.txt", "a\n"), "corpus", rows_per_piece=0)


def test_two_texts_a_line_are_no_ids_and_texts(tmp_path: Path) -> None:
    """The first of them would be an id, and never be read."""
    path = write(tmp_path / "x.tsv", "how to open an account\topen an account\nwhere to pay\tpay where\n")
    with pytest.raises(
        InputError, match=r"x\.tsv: read without a header, a row has the id 'how to open an account'"
    ):
        read(path, "corpus")
    assert len(read(write(tmp_path / "y.tsv", "doc-1\topen an account\ndoc-2\tpay\n"), "corpus")) == 2
