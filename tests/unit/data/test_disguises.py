"""Files that are not what their names say, links, dialects, folder columns: read as what they are, or refused."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raytower.data.config import InputConfig, NamedInput
from raytower.data.pieces import read_piece, survey
from raytower.data.sources import _split_options, find_files, refuse_output_inside
from raytower.encoding.plan import join_pieces
from raytower.errors import InputError
from raytower.models.tokenising import CHARACTERS_PER_TOKEN, _encode_beginnings
from tests.support.data_files import beir_folder, read, survey_of, write, write_jsonl

_ROWS = [{"id": "1", "text": 'He said "hi", twice\nand left'}, {"id": "2", "text": "bank account"}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS pointer"),
        ("x.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
        ("x.txt", "train\nbank\n".encode("utf-16"), "UTF-16 text"),
        ("x.jsonl", '{"text": "a"}\n'.encode("utf-16-le"), "are NUL"),
        ("x.txt", "train\n".encode("utf-32"), "UTF-32 text"),
        ("x.txt", "银行\n火车票\n狗粮\n".encode("gb18030"), "GB18030"),
        ("x.txt", b"bank\rtrain\r", "carriage returns alone"),
        ("x.csv", b"PK\x03\x04....", "zip archive"),
        ("x.txt", gzip.compress(b"a\n", mtime=0), "compressed with gzip"),
        ("x.txt.gz", gzip.compress(b"a.txt".ljust(257, b"\0") + b"ustar\0" + b"a\n", mtime=0), "tar archive"),
        ("x.txt", b"<!DOCTYPE html>\n<html>\n", "HTML page"),
        ("x.json", b"PAR1....", "is parquet, not jsonl"),
        ("x.json", b"\xff\xff\xff\xff\x10\x00\x00\x00....", "is arrow, not jsonl"),
        ("x.txt", b"a text\tlabel\nother\tlabel\n", "every line has one tab"),
        ("x.tsv", b"id\tcontent\n1\ta\n", "As a header .* as a row its id is 'id'"),
        ("x.tsv", b"year\ttext\n1999\ta\n", "As a header .* as a row its id is 'year'"),
        ("x.tsv", b"".join(b"a text %d\tbank\n" % n for n in range(8)), "as labels do"),
        ("x.json", b'[{"text": "a"}, {"text": "b"}', "no whole JSON array"),
        ("x.json", b"[" * 100_000, "no whole JSON array"),
        ("x.csv", b'id,text\n1,5" disk\n2,6" disk\n', "a quote is neither closed nor doubled"),
    ],
)
def test_what_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        survey(InputConfig(path=str(write(tmp_path / name, content))), "corpus", quarantine=tmp_path / "q")


def test_words_that_begin_like_other_files_are_text(tmp_path: Path) -> None:
    path = write(tmp_path / "x.txt", "ORC armour\nBZh\n")
    assert [row["text"] for row in read(path, "corpus")] == ["ORC armour", "BZh"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.csv", 'id,text\n1,"He said ""hi"", twice\nand left"\n2,bank account\n'),
        ("x.csv", 'id,text\r\n1,"He said ""hi"", twice\nand left"\r\n2,bank account\r\n'),
        ("x.tsv", 'id\ttext\n1\t"He said ""hi"", twice\nand left"\n2\tbank account\n'),
        ("x.tsv", '"id"\t"text"\n"1"\t"He said ""hi"", twice\nand left"\n"2"\t"bank account"\n'),
        ("x.json", json.dumps(_ROWS)),
        ("x.json", json.dumps(_ROWS, indent=2)),
        ("x.jsonl", "[\n" + ",\n".join(map(json.dumps, _ROWS)) + "\n]\n"),
    ],
)
@pytest.mark.parametrize("rows_per_piece", [1, 100])
def test_quoted_tables_and_json_arrays(tmp_path: Path, name: str, content: str, rows_per_piece: int) -> None:
    pieces = survey_of(write(tmp_path / name, content), "corpus", rows_per_piece).pieces
    backwards = [row for piece in reversed(pieces) for row in reversed(read_piece(piece).to_pylist())]
    assert backwards[::-1] == _ROWS


@pytest.mark.parametrize("rows_per_piece", [1, 100])
def test_elements_of_an_array_that_are_no_objects_are_bad_rows(tmp_path: Path, rows_per_piece: int) -> None:
    path = write(
        tmp_path / "x.json", '[["a", "b"], {"text": "银行"}, 1, [], [{"text": "c"}],\n{"text": "d"}]'
    )
    found = survey(InputConfig(path=str(path)), "corpus", rows_per_piece, "quarantine", tmp_path / "q")
    rows = [row for piece in found.pieces for row in read_piece(piece).to_pylist()]
    assert rows == [{"id": "x:2", "text": "银行"}, {"id": "x:6", "text": "d"}]
    rejected = [json.loads(line) for line in Path(str(found.quarantine_file)).read_text().splitlines()]
    assert [(entry["line"], entry["raw"]) for entry in rejected] == [
        (1, '["a", "b"]'), (3, "1"), (4, "[]"), (5, '[{"text": "c"}]')
    ]  # fmt: skip


def test_csv_separated_by_tabs_keeps_its_quotes(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", 'a "b"\tc\n"d" e\tf\n')
    assert [(row["query"], row["document"]) for row in read(path, "pairs")] == [
        ('a "b"', "c"),
        ('"d" e', "f"),
    ]


@pytest.mark.parametrize("rows_per_piece", [2, 100])
def test_saved_dataset_folder(tmp_path: Path, rows_per_piece: int) -> None:
    table = pa.table({"text": list("abcde"), "n": range(5)})
    for name in ("data-0.arrow", "cache-1.arrow"):
        with pa.ipc.new_stream(tmp_path / name, table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
    write(tmp_path / "state.json", json.dumps({"_data_files": [{"filename": "data-0.arrow"}]}))
    write(tmp_path / "dataset_info.json", "{}")
    pieces = survey_of(tmp_path, "corpus", rows_per_piece).pieces
    rows = [row for piece in pieces for row in read_piece(piece).to_pylist()]
    assert [(row["text"], row["n"]) for row in rows] == list(zip("abcde", range(5), strict=True))
    write(tmp_path / "up" / "dataset_dict.json", '{"splits": ["train", "test"]}')
    with pytest.raises(InputError, match="splits train, test"):
        find_files(str(tmp_path / "up"))


def test_links_are_followed_once_and_dead_ones_refused(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.txt", "a\n")
    write(tmp_path / "store" / "b.txt", "b\n")
    (tmp_path / "in" / "again.txt").symlink_to("a.txt")
    (tmp_path / "in" / "far").symlink_to("../store")
    (tmp_path / "in" / "loop").symlink_to(".")
    assert [row["text"] for row in read(tmp_path / "in", "corpus")] == ["a", "b"]
    (tmp_path / "in" / "gone.txt").symlink_to("../nowhere.txt")
    for path in (tmp_path / "in", tmp_path / "in" / "*.txt"):
        with pytest.raises(InputError, match=r"gone\.txt is a link to '\.\./nowhere\.txt'"):
            find_files(str(path))


def test_a_name_that_is_not_utf8_is_refused_and_named(tmp_path: Path) -> None:
    write(tmp_path / "ok.txt", "a\n")
    name = os.path.join(os.fsencode(tmp_path), "中文.txt".encode("gbk"))
    with open(name, "wb") as stream:
        stream.write(b"b\n")
    for path in (str(tmp_path), f"{tmp_path}/*.txt", os.fsdecode(name)):
        with pytest.raises(InputError, match=r"\\xd6\\xd0\\xce\\xc4\.txt is not UTF-8"):
            find_files(path)


def test_parts_of_a_glob_that_exist_are_taken_as_written(tmp_path: Path) -> None:
    write(tmp_path / "data [v2]" / "a.txt", "a\n")
    assert [row["text"] for row in read(f"{tmp_path}/data [v2]/*.txt", "corpus")] == ["a"]


@pytest.mark.parametrize(
    ("uri", "parts"),
    [
        (
            "s3://b/c?endpoint_override=minio:9000&scheme=http",
            ("s3://b/c", "?endpoint_override=minio:9000&scheme=http"),
        ),
        ("s3://b/*.txt?region=x", ("s3://b/*.txt", "?region=x")),
        ("s3://b/part-?.txt", ("s3://b/part-?.txt", "")),
        ("data/x?y=z", ("data/x?y=z", "")),
    ],
)
def test_options_of_a_uri_are_no_wildcards(uri: str, parts: tuple[str, str]) -> None:
    assert _split_options(uri) == parts


def test_partition_folders_are_columns(tmp_path: Path) -> None:
    folders = ("lang=zh/city=S%C3%A3o", "lang=en/city=__HIVE_DEFAULT_PARTITION__")
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
        pq.write_table(pa.table({"id": [folder[5:7]], "text": ["a"]}), tmp_path / folder / "p.parquet")
    expected = [("en", None), ("zh", "São")]
    for path in (tmp_path, f"{tmp_path}/lang=*/**/*.parquet"):
        assert [(row["lang"], row["city"]) for row in read(path, "corpus")] == expected
    for folder in folders:
        (tmp_path / folder / "p.parquet").unlink()
        write_jsonl(tmp_path / folder / "p.jsonl", [{"text": "a"}])
    assert [(row["lang"], row["city"]) for row in read(tmp_path, "corpus")] == expected


def test_outputs_of_our_own_are_no_input(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    write(tmp_path / "emb" / "job.json", '{"fingerprint": "x"}')
    write(tmp_path / "emb" / "old" / "x.jsonl", '{"text": "no"}\n')
    write(tmp_path / "emb.quarantine" / "y.jsonl", '{"file": "a.jsonl", "line": 1}\n')
    for path in (tmp_path, f"{tmp_path}/**/*.jsonl"):
        assert [row["text"] for row in read(path, "corpus")] == ["a"]
        passed_over = capfd.readouterr().err
        assert "emb/old/x.jsonl (it lies in an output of a raytower job)" in passed_over
        assert "emb.quarantine/y.jsonl (it lists rows that a raytower job rejected)" in passed_over
    assert [file.location.name for file in find_files(f"{tmp_path}/emb.quarantine/*").files] == ["y.jsonl"]
    with pytest.raises(InputError, match="lies inside the input"):
        refuse_output_inside(str(tmp_path / "new"), str(tmp_path))
    refuse_output_inside(str(tmp_path / "new"), str(tmp_path / "a.jsonl"))


def test_an_empty_shard_is_named_and_passed_over(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    header = "query\ttitle\tlabel\n"
    for name, content in (("a.tsv", header + "q\tt\t1\n"), ("b.tsv", header), ("c.tsv", "")):
        write(tmp_path / name, content)
    assert len(read(tmp_path, "scored")) == 1
    assert f"no row in {tmp_path}/b.tsv, {tmp_path}/c.tsv" in capfd.readouterr().err


def test_equal_judgements_count_once_and_remedies_are_the_commands_own(tmp_path: Path) -> None:
    folder = beir_folder(tmp_path / "beir")
    with open(folder / "qrels" / "train.tsv", "a") as stream:
        stream.write("q2\td3\t2\n")
    assert len(read(folder, "pairs")) == 3
    bad = write(tmp_path / "x.jsonl", '{"text": ""}\n')
    for on_error, says in ((None, False), ("fail", True)):
        with pytest.raises(InputError) as raised:
            survey(NamedInput(path=str(bad)), "corpus", on_error=on_error)
        assert ("on_error" in str(raised.value)) is says
    for config, says in ((NamedInput, False), (InputConfig, True)):
        with pytest.raises(InputError) as raised:
            survey(config(path=str(write(tmp_path / "x.dat", "a\n"))), "corpus")
        assert ("input.format" in str(raised.value)) is says


def test_many_small_files_make_one_piece(tmp_path: Path) -> None:
    for number in range(20):
        write(tmp_path / f"{number:02}.txt", f"text {number}\n")
    pieces = join_pieces(survey_of(tmp_path, "corpus").pieces, 8)
    assert [(piece.index, piece.num_rows) for piece in pieces] == [(0, 8), (1, 8), (2, 4)]
    texts = [text for piece in pieces for text in read_piece(piece)["text"].to_pylist()]
    assert texts == [f"text {number}" for number in range(20)]


class _WordTokenizer:
    """A token a word, cut to 3; counts the characters that it is given."""

    def __init__(self) -> None:
        self.characters = 0

    def encode_batch_fast(self, texts: list[str]) -> list[object]:
        self.characters += sum(map(len, texts))
        return [type("Encoding", (), {"ids": text.split()[:3]})() for text in texts]


@pytest.mark.parametrize(
    "text", ["one two three four " * 50_000, "one " + " " * 1_000_000 + "two three", "w" * 1_000]
)
def test_a_long_text_is_tokenised_as_far_as_it_counts(text: str) -> None:
    tokenizer = _WordTokenizer()
    _, (encoding,) = _encode_beginnings(tokenizer.encode_batch_fast, [text], 3 * CHARACTERS_PER_TOKEN, 3)
    assert encoding.ids == text.split()[:3]
    assert tokenizer.characters <= (200 if text.startswith("one two") else 2 * len(text))


@pytest.mark.parametrize(
    ("name", "content", "rows"),
    [
        ("x.csv", "text\na\nb\n", [{"id": "x:2", "text": "a"}, {"id": "x:3", "text": "b"}]),
        ("x.tsv", "text\na\n", [{"id": "x:2", "text": "a"}]),
        ("x.csv", 'id;text\n1;"a; b"\n', [{"id": "1", "text": "a; b"}]),
        (
            "x.csv",
            "bank; river\ntrain\n",
            [{"id": "x:1", "text": "bank; river"}, {"id": "x:2", "text": "train"}],
        ),
    ],
)
def test_headers_of_one_column_and_of_spreadsheets(
    tmp_path: Path, name: str, content: str, rows: list[dict[str, str]]
) -> None:
    assert read(write(tmp_path / name, content), "corpus") == rows


def _write_arrow(path: Path, texts: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"text": texts})
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table)


def test_a_saved_dataset_below_the_input_gives_what_it_lists(tmp_path: Path) -> None:
    _write_arrow(tmp_path / "in" / "train" / "data-0.arrow", ["a"])
    _write_arrow(tmp_path / "in" / "train" / "cache-1.arrow", ["cached"])
    state = write(tmp_path / "in" / "train" / "state.json", '{"_data_files": [{"filename": "data-0.arrow"}]}')
    for path in (tmp_path / "in", tmp_path / "in" / "train", f"{tmp_path}/in/*/*.arrow"):
        assert [row["text"] for row in read(path, "corpus")] == ["a"]
    _write_arrow(tmp_path / "data-9.arrow", ["elsewhere"])
    for name in ('"../../data-9.arrow"', f'"{tmp_path}/data-9.arrow"', "null"):
        state.write_text(f'{{"_data_files": [{{"filename": {name}}}]}}')
        with pytest.raises(InputError, match="no file of its folder"):
            find_files(str(tmp_path / "in" / "train"))


def test_an_index_below_the_input_is_no_input(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    write_jsonl(tmp_path / "versions" / "000002.json", [{"text": "b"}])
    write(tmp_path / "index" / "versions" / "000001.json", '{"format_version": 3, "fingerprint": "f"}')
    assert [row["text"] for row in read(tmp_path, "corpus")] == ["a", "b"]


@pytest.mark.parametrize("is_stream", [True, False])
def test_a_damaged_arrow_file_is_refused_by_name(tmp_path: Path, is_stream: bool) -> None:
    path = tmp_path / "docs.arrow"
    table = pa.table({"text": [f"text {i}" for i in range(40)]})
    with (pa.ipc.new_stream if is_stream else pa.ipc.new_file)(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=10)
    whole = path.read_bytes()
    # The schema stays whole: only reading the batches behind it tells.
    middle = len(whole) // 2
    path.write_bytes(whole[:-100] if is_stream else whole[:300] + b"\xff" * (middle - 300) + whole[middle:])
    with pytest.raises(InputError, match=r"docs\.arrow is no readable Arrow file"):
        read(path, "corpus")
