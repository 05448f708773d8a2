"""Columns that a corpus passes through: what comes out of the gate, what it refuses, and one type for each."""

from __future__ import annotations

import datetime
import decimal
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from raytower.data import parquet
from raytower.data.pieces import read_piece
from raytower.errors import InputError
from tests.support.data_files import quarantined, read, rows_of, survey_of, write, write_jsonl

_MOMENT = datetime.datetime(2024, 1, 31, 12, 30, 0, 123456)
_UTC = datetime.UTC


def _parquet(path: Path, **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = len(next(iter(columns.values())))
    pq.write_table(pa.table({"text": [f"t{row}" for row in range(rows)], **columns}), path)
    return path


def _column(path: Path, name: str = "c") -> tuple[pa.DataType, list[Any]]:
    """The type that a column passes through with, and its values."""
    surveyed = survey_of(path, "corpus")
    return surveyed.schema.field(name).type, [row[name] for row in rows_of(surveyed)]


def _broken_text(values: Sequence[bytes]) -> pa.Array:
    """An array of strings of any bytes."""
    raw = pa.array(values, pa.binary())
    return pa.Array.from_buffers(pa.string(), len(raw), raw.buffers())


@pytest.mark.parametrize(
    ("written", "kind", "values"),
    [
        (pa.array(["a", None, "a"]).dictionary_encode(), pa.string(), ["a", None, "a"]),
        (pa.array([["a"], None, ["a", "b"]], pa.list_(pa.dictionary(pa.int32(), pa.string()))),
         pa.list_(pa.string()), [["a"], None, ["a", "b"]]),
        (pa.array(["a", None], pa.large_string()), pa.string(), ["a", None]),
        (pa.array(["a", None], pa.string_view()), pa.string(), ["a", None]),
        (pa.array([1, None], pa.int8()), pa.int64(), [1, None]),
        (pa.array([2**63 - 1, 0], pa.uint64()), pa.int64(), [2**63 - 1, 0]),
        (pa.array([2**64 - 1, 0], pa.uint64()), pa.uint64(), [2**64 - 1, 0]),
        (pa.array([0.5, None], pa.float16()), pa.float32(), [0.5, None]),
        (pa.array([0.1, math.nan], pa.float32()), pa.float32(), [float(np.float32(0.1)), None]),
        (pa.array([0.1, math.nan]), pa.float64(), [0.1, None]),
        (pa.array([[1.5, math.nan], None], pa.list_(pa.float32(), 2)), pa.list_(pa.float32()), [[1.5, None], None]),
        (pa.array([[1], None], pa.large_list(pa.int32())), pa.list_(pa.int64()), [[1], None]),
        (pa.array([decimal.Decimal("1.50"), None], pa.decimal128(5, 2)), pa.decimal128(5, 2),
         [decimal.Decimal("1.50"), None]),
        (pa.array([datetime.date(1, 1, 1), datetime.date(9999, 12, 31)]), pa.date32(),
         [datetime.date(1, 1, 1), datetime.date(9999, 12, 31)]),
        (pa.array([_MOMENT, None], pa.timestamp("ns")), pa.timestamp("us"), [_MOMENT, None]),
        (pa.array([_MOMENT.replace(microsecond=0)], pa.timestamp("s")), pa.timestamp("us"),
         [_MOMENT.replace(microsecond=0)]),
        (pa.array([0], pa.timestamp("ms", "Asia/Shanghai")), pa.timestamp("us", "UTC"),
         [datetime.datetime(1970, 1, 1, tzinfo=_UTC)]),
        (pa.array([{"a": ["x"], "b": math.nan}, None]), pa.struct([("a", pa.list_(pa.string())), ("b", pa.float64())]),
         [{"a": ["x"], "b": None}, None]),
        (pa.array([True, None], pa.bool_()).cast(pa.bool8()), pa.int64(), [1, None]),
        (pa.array([None, None], pa.int32()), pa.int64(), [None, None]),
        (pa.array([None, None], pa.timestamp("s")), pa.timestamp("us"), [None, None]),
        (pa.array([None, None]), pa.null(), [None, None]),
        (pa.array([[], None], pa.list_(pa.int32())), pa.list_(pa.int64()), [[], None]),
    ],
)  # fmt: skip
def test_parquet_columns_are_decoded(
    tmp_path: Path, written: pa.Array, kind: pa.DataType, values: list[Any]
) -> None:
    assert _column(_parquet(tmp_path / "x.parquet", c=written)) == (kind, values)


def test_nanoseconds_stay_where_a_value_has_them(tmp_path: Path) -> None:
    ticks = pa.array([1_000_000_001, None], pa.int64()).cast(pa.timestamp("ns"))
    surveyed = survey_of(_parquet(tmp_path / "x.parquet", c=ticks), "corpus")
    (piece,) = surveyed.pieces
    assert read_piece(piece)["c"].combine_chunks() == ticks


def test_tensors_become_lists(tmp_path: Path) -> None:
    tensors = pa.FixedShapeTensorArray.from_numpy_ndarray(np.arange(8, dtype=np.float32).reshape(2, 2, 2))
    assert _column(_parquet(tmp_path / "x.parquet", c=tensors)) == (
        pa.list_(pa.float32()), [[0, 1, 2, 3], [4, 5, 6, 7]],
    )  # fmt: skip


@pytest.mark.parametrize(
    "written",
    [
        pa.array([b"x"]),
        pa.array([datetime.time(1)]),
        pa.array([datetime.timedelta(1)]),
        pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int64())),
        pa.array([[{"a": b"x"}]]),
        pa.array([{"": 1}]),
        pa.array([b"x" * 16], pa.uuid()),
        pa.array([decimal.Decimal(1)], pa.decimal256(50, 2)),
        pa.array([json.loads("[" * 18 + "1" + "]" * 18)]),
    ],
)  # fmt: skip
def test_parquet_columns_that_cannot_pass_are_refused(tmp_path: Path, written: pa.Array) -> None:
    path = _parquet(tmp_path / "x.parquet", c=written)
    with pytest.raises(InputError, match=r"x\.parquet: column 'c' is .*; write it as another type"):
        survey_of(path, "corpus")
    assert len(read(path, "lines")) == 1


_BROKEN = [b"ok", b"caf\xe9"]


@pytest.mark.parametrize(
    ("written", "fault"),
    [
        (_broken_text(_BROKEN), "is not UTF-8"),
        (pa.ListArray.from_arrays(pa.array([0, 1, 2]), _broken_text(_BROKEN)), "is not UTF-8"),
        (pa.StructArray.from_arrays([_broken_text(_BROKEN)], ["a"]), "is not UTF-8"),
        (pa.array([0.5, math.inf]), "is infinite, which JSON cannot say"),
        (pa.array([[0.5], [1, -math.inf]]), "is infinite, which JSON cannot say"),
        (
            pa.array([0, 2_932_897]).cast(pa.int32()).cast(pa.date32()),
            "is a date outside of the years 1 to 9999",
        ),
        (
            pa.array([0, -719_163]).cast(pa.int32()).cast(pa.date32()),
            "is a date outside of the years 1 to 9999",
        ),
        (pa.array([0, 253_402_300_800]).cast(pa.timestamp("s")), "is a date outside of the years 1 to 9999"),
        (
            pa.array([[0], [-(2**62)]]).cast(pa.list_(pa.timestamp("us"))),
            "is a date outside of the years 1 to 9999",
        ),
    ],
)
def test_parquet_rows_with_values_that_cannot_pass(tmp_path: Path, written: pa.Array, fault: str) -> None:
    """With fail the message names file, row and column; with quarantine the row is listed and the others stay."""
    path = _parquet(tmp_path / "x.parquet", c=written)
    with pytest.raises(InputError) as raised:
        survey_of(path, "corpus")
    assert str(raised.value).startswith(f"{path}:2: column 'c' {fault}. The row is ")
    surveyed, entries = quarantined(path, "corpus", tmp_path / "q")
    assert [(entry["line"], entry["reason"]) for entry in entries] == [(2, f"column 'c' {fault}")]
    assert [row["text"] for row in rows_of(surveyed)] == ["t0"]


def test_a_category_that_is_no_utf8_names_its_column(tmp_path: Path) -> None:
    """Arrow itself cannot read such a file."""
    column = pa.DictionaryArray.from_arrays(pa.array([0, 1]), _broken_text(_BROKEN))
    path = _parquet(tmp_path / "x.parquet", c=column)
    with pytest.raises(
        InputError, match=r"x\.parquet cannot be read in row group 0, column 'c': Invalid UTF8"
    ):
        survey_of(path, "corpus")


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        ("18446744073709551616", "is an integer of more than 64 bits; write it as a string"),
        ("[-9223372036854775809]", "is an integer of more than 64 bits; write it as a string"),
        ("1e999", "is infinite, which JSON cannot say"),
        ('{"a": -Infinity}', "is infinite, which JSON cannot say"),
        ('{"": 1}', "has an object with a key that is empty or holds a NUL character"),
        ("[" * 17 + "]" * 17, "is nested more than 16 deep"),
        ("[" * 5000 + "]" * 5000, None),
    ],
)
def test_json_rows_with_values_that_cannot_pass(tmp_path: Path, value: str, fault: str | None) -> None:
    path = write(tmp_path / "x.jsonl", f'{{"text": "a", "c": 1}}\n{{"text": "b", "c": {value}}}\n')
    surveyed, entries = quarantined(path, "corpus", tmp_path / "q")
    (entry,) = entries
    assert entry["line"] == 2
    assert entry["reason"] == f"column 'c' {fault}" if fault else entry["reason"].startswith("not valid JSON")
    assert rows_of(surveyed) == [{"id": "x:1", "text": "a", "c": 1}]


def test_a_key_that_stands_twice_is_a_bad_row(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", '{"text": "a"}\n{"text": "b", "m": {"k": 1, "k": 2}}\n')
    with pytest.raises(InputError, match=r"x\.jsonl:2: the key 'k' stands twice in one object"):
        survey_of(path, "corpus")


def test_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    tsv = write(tmp_path / "x.tsv", "id\ttext\tyear\tyear\n1\ta\t2000\t2001\n")
    pq.write_table(
        pa.Table.from_arrays([pa.array(["a"]), pa.array([1]), pa.array([2])], ["text", "year", "year"]),
        tmp_path / "x.parquet",
    )
    for path in (tsv, tmp_path / "x.parquet"):
        with pytest.raises(InputError, match="two columns are named 'year'"):
            survey_of(path, "corpus")


_NONE = object()


@pytest.mark.parametrize(
    ("first", "second", "kind", "values"),
    [
        (1, 0.5, pa.float64(), [1.0, 0.5]),
        (2**53, 0.5, pa.float64(), [2.0**53, 0.5]),
        (2**53 + 1, 2.0, pa.int64(), [2**53 + 1, 2]),
        (-1, 2**62, pa.int64(), [-1, 2**62]),
        (1, 2**63, pa.uint64(), [1, 2**63]),
        (2**64 - 1, 3.0, pa.uint64(), [2**64 - 1, 3]),
        (None, 5, pa.int64(), [None, 5]),
        (None, ["x"], pa.list_(pa.string()), [None, ["x"]]),
        ([], ["x", None], pa.list_(pa.string()), [[], ["x", None]]),
        ([1], [0.5], pa.list_(pa.float64()), [[1.0], [0.5]]),
        ({"a": 1}, {"b": [True]}, pa.struct([("a", pa.int64()), ("b", pa.list_(pa.bool_()))]),
         [{"a": 1, "b": None}, {"a": None, "b": [True]}]),
        ([{"a": 1}], [{"a": 0.5}, None], pa.list_(pa.struct([("a", pa.float64())])), 
         [[{"a": 1.0}], [{"a": 0.5}, None]]),
        ({}, None, pa.null(), [None, None]),
        ({"a": {}}, {"a": 2**60, "b": {}}, pa.struct([("a", pa.int64()), ("b", pa.null())]),
         [{"a": None, "b": None}, {"a": 2**60, "b": None}]),
        (math.nan, 2**53 + 1, pa.int64(), [None, 2**53 + 1]),
        (math.nan, math.nan, pa.null(), [None, None]),
        (_NONE, "x", pa.string(), [None, "x"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize(("files", "rows_per_piece"), [(1, 1), (1, 10), (2, 10)])
def test_json_values_find_their_type(
    tmp_path: Path,
    first: Any,
    second: Any,
    kind: pa.DataType,
    values: list[Any],
    rows_per_piece: int,
    files: int,
) -> None:
    rows = [{"text": "t"} if value is _NONE else {"text": "t", "c": value} for value in (first, second)]
    if files == 1:
        write_jsonl(tmp_path / "in" / "a.jsonl", rows)
    else:
        write_jsonl(tmp_path / "in" / "a.jsonl", rows[:1])
        write_jsonl(tmp_path / "in" / "b.jsonl", rows[1:])
    surveyed = survey_of(tmp_path / "in", "corpus", rows_per_piece)
    found = [row["c"] for row in rows_of(surveyed)]
    assert (surveyed.schema.field("c").type, found) == (kind, values)
    assert [type(value) for value in found] == [type(value) for value in values]


@pytest.mark.parametrize(
    ("first", "second", "path", "said"),
    [
        (1, "x", "c", ("string", "int64")),
        (True, 1, "c", ("int64", "bool")),
        (2**53 + 1, 0.5, "c", ("numbers with a fraction", "integers beyond 2^53")),
        (0.5, -(2**53) - 1, "c", ("integers beyond 2^53", "numbers with a fraction")),
        (2**53 + 1, 1e300, "c", ("numbers with a fraction", "integers beyond 2^53")),
        (-1, 2**63, "c", ("integers beyond 2^63", "numbers below zero")),
        (["x"], "x", "c", ("string", "list")),
        ({"a": 1}, ["a"], "c", ("list", "struct")),
        (["x"], [1], "c[]", ("int64", "string")),
        ({"a": {"b": 1}}, {"a": {"b": "x"}}, "c.a.b", ("string", "int64")),
    ],
)
@pytest.mark.parametrize("rows_per_piece", [1, 10])
def test_json_values_without_a_common_type_name_both_places(
    tmp_path: Path, first: Any, second: Any, path: str, said: tuple[str, str], rows_per_piece: int
) -> None:
    rows = [{"text": "t", "c": value} for value in (None, first, first, second)]
    file = write_jsonl(tmp_path / "x.jsonl", rows)
    with pytest.raises(InputError) as raised:
        survey_of(file, "corpus", rows_per_piece)
    assert str(raised.value) == (
        f"{file}:4: column {path!r} holds {said[0]}, but {said[1]} at {file}:2; "
        "give it one type in all rows of all files"
    )


def _decimals(*digits: str, precision: int, scale: int) -> pa.Array:
    return pa.array([decimal.Decimal(number) for number in digits], pa.decimal128(precision, scale))


_SHANGHAI = datetime.timezone(datetime.timedelta(hours=8))


@pytest.mark.parametrize(
    ("first", "second", "kind", "values"),
    [
        (pa.array([2**53 + 1]), pa.array([math.nan]), pa.int64(), [2**53 + 1, None]),
        (pa.array([2**53 + 1]), pa.array([4.0]), pa.int64(), [2**53 + 1, 4]),
        (pa.array([1]), pa.array([0.5], pa.float32()), pa.float64(), [1.0, 0.5]),
        (pa.array([0.5], pa.float32()), pa.array([None], pa.int8()), pa.float32(), [0.5, None]),
        (pa.array([2**64 - 1], pa.uint64()), pa.array([1]), pa.uint64(), [2**64 - 1, 1]),
        (pa.array(["a"]).dictionary_encode(), pa.array(["b"], pa.large_string()), pa.string(), ["a", "b"]),
        (pa.array(["a"]), pa.array([None], pa.float64()), pa.string(), ["a", None]),
        (pa.array([_MOMENT], pa.timestamp("ns")), pa.array([datetime.datetime(9999, 12, 31)]), pa.timestamp("us"),
         [_MOMENT, datetime.datetime(9999, 12, 31)]),
        (pa.array([_MOMENT], pa.timestamp("us", "UTC")), pa.array([_MOMENT], pa.timestamp("us", "Asia/Shanghai")),
         pa.timestamp("us", "UTC"), [_MOMENT.replace(tzinfo=_UTC)] * 2),
        (pa.array([datetime.date(2000, 1, 1)]), pa.array([datetime.date(1, 1, 1)], pa.date64()), pa.date32(),
         [datetime.date(2000, 1, 1), datetime.date(1, 1, 1)]),
        (_decimals("1.5", precision=3, scale=1), _decimals("100.25", precision=5, scale=2), pa.decimal128(5, 2),
         [decimal.Decimal("1.50"), decimal.Decimal("100.25")]),
        (_decimals("1.5", precision=3, scale=1), pa.array([2]), pa.decimal128(17, 1),
         [decimal.Decimal("1.5"), decimal.Decimal("2.0")]),
        (pa.array([[1, 2]], pa.list_(pa.int32(), 2)), pa.array([[], ], pa.list_(pa.string())), pa.list_(pa.int64()),
         [[1, 2], []]),
        (pa.array([{"a": 1}]), pa.array([{"b": "x", "a": 0.5}]), pa.struct([("a", pa.float64()), ("b", pa.string())]),
         [{"a": 1.0, "b": None}, {"a": 0.5, "b": "x"}]),
        (pa.array([None], pa.struct([("a", pa.int64())])), pa.array(["x"]), pa.string(), [None, "x"]),
        (pa.array([None], pa.int64()), pa.array([None], pa.string()), pa.null(), [None, None]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("turned", [False, True])
def test_parquet_files_find_one_type(
    tmp_path: Path, first: pa.Array, second: pa.Array, kind: pa.DataType, values: list[Any], turned: bool
) -> None:
    _parquet(tmp_path / ("b.parquet" if turned else "a.parquet"), c=first)
    _parquet(tmp_path / ("a.parquet" if turned else "b.parquet"), c=second)
    found_kind, found = _column(tmp_path)
    assert found == (values[::-1] if turned else values)
    if pa.types.is_struct(kind):  # members come in the order in which they were seen
        assert {(member.name, member.type) for member in found_kind} == {(m.name, m.type) for m in kind}
    else:
        assert found_kind == kind


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        (pa.array([2**53 + 1]), pa.array([0.5]), "numbers with a fraction, but integers beyond 2^53"),
        (pa.array([-1]), pa.array([2**63], pa.uint64()), "integers beyond 2^63, but numbers below zero"),
        (pa.array([2**63], pa.uint64()), pa.array([-1.0]), "numbers below zero, but integers beyond 2^63"),
        (pa.array([1]).cast(pa.timestamp("ns")), pa.array([datetime.datetime(9999, 12, 31)]),
         "times before 1678 or after 2261, but times to the nanosecond"),
        (pa.array([_MOMENT]), pa.array([_MOMENT], pa.timestamp("us", "UTC")),
         "timestamp with a time zone, but timestamp"),
        (pa.array([datetime.date(2000, 1, 1)]), pa.array([_MOMENT]), "timestamp, but date"),
        (pa.array(["a"]).dictionary_encode(), pa.array([1]).dictionary_encode(), "int64, but string"),
        (_decimals("1", precision=38, scale=0), _decimals("1", precision=38, scale=10),
         "decimal128(38, 10), but decimal128(38, 0)"),
        (_decimals("1", precision=5, scale=1), pa.array([0.5]), "float64, but decimal128(5, 1)"),
    ],
)  # fmt: skip
def test_parquet_files_without_a_common_type_name_both(
    tmp_path: Path, first: pa.Array, second: pa.Array, said: str
) -> None:
    one, two = (
        _parquet(tmp_path / f"{name}.parquet", c=array) for name, array in (("a", first), ("b", second))
    )
    with pytest.raises(InputError) as raised:
        survey_of(tmp_path, "corpus")
    assert str(raised.value) == (
        f"{two}:1: column 'c' holds {said} at {one}:1; give it one type in all rows of all files"
    )


def test_int96_times_do_not_wrap_around(tmp_path: Path) -> None:
    times = [datetime.datetime(9999, 12, 31), datetime.datetime(1, 1, 1), _MOMENT]
    table = pa.table({"text": list("abc"), "c": pa.array(times, pa.timestamp("us"))})
    # Arrow writes INT96 from nanoseconds, which cannot hold two of these; so the file's bytes are made by hand below.
    path = tmp_path / "x.parquet"
    pq.write_table(
        table.slice(2), path, use_deprecated_int96_timestamps=True, compression="none", use_dictionary=False
    )
    raw = path.read_bytes()
    julian_unix = 2_440_588
    day = (_MOMENT - datetime.datetime(1970, 1, 1)).days
    nanoseconds = (_MOMENT - datetime.datetime(2024, 1, 31)) // datetime.timedelta(microseconds=1) * 1000
    old = nanoseconds.to_bytes(8, "little") + (day + julian_unix).to_bytes(4, "little")
    assert raw.count(old) >= 1
    for time in times[:2]:
        days = (time - datetime.datetime(1970, 1, 1)).days
        new = bytes(8) + (days + julian_unix).to_bytes(4, "little", signed=True)
        path.write_bytes(raw.replace(old, new))
        assert _column(path) == (pa.timestamp("us"), [time])


@pytest.mark.parametrize("suffix", ["tsv", "jsonl", "parquet"])
def test_columns_of_our_names_are_renamed(tmp_path: Path, suffix: str) -> None:
    row = {
        "key": "k",
        "text": "a",
        "id": "5",
        "embedding": "e",
        "row": "r",
        "vector": "v",
        "_rowid": "w",
        "a.b": "d",
        "ok": "o",
    }
    path = tmp_path / f"x.{suffix}"
    if suffix == "tsv":
        write(path, "\t".join(row) + "\n" + "\t".join(row.values()) + "\n")
    elif suffix == "jsonl":
        write_jsonl(path, [row])
    else:
        pq.write_table(pa.Table.from_pylist([row]), path)
    surveyed = survey_of(path, "corpus", id_field="key")
    renamed = {
        "id": "source_id", "embedding": "source_embedding", "row": "source_row", "vector": "source_vector",
        "_rowid": "source__rowid", "a.b": "a_b",
    }  # fmt: skip
    assert dict(surveyed.renamed_columns) == renamed
    rest = {renamed.get(name, name): value for name, value in row.items() if name not in ("key", "text")}
    assert rows_of(surveyed) == [{"id": row["key"], "text": row["text"], **rest}]


@pytest.mark.parametrize("files", [1, 2])
def test_two_columns_never_get_one_name(tmp_path: Path, files: int) -> None:
    rows = [{"key": "1", "text": "a", "id": 5}, {"key": "2", "text": "b", "source_id": "S9"}]
    if files == 1:
        write_jsonl(tmp_path / "a.jsonl", rows)
    else:
        write_jsonl(tmp_path / "a.jsonl", rows[:1])
        write_jsonl(tmp_path / "b.jsonl", rows[1:])
    with pytest.raises(
        InputError, match="'id' and 'source_id' would both pass through as 'source_id'; rename one"
    ):
        survey_of(tmp_path, "corpus", id_field="key")


def test_text_and_source_text_beside_another_text_field(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [{"body": "b", "text": "t", "source_text": "s"}])
    with pytest.raises(InputError, match="'text' and 'source_text' would both pass through as 'source_text'"):
        survey_of(path, "corpus", text_fields=["body"])


def test_the_text_alone_is_kept_once(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [{"text": "a", "source_text": "s"}, {"text": "b"}])
    assert read(path, "corpus") == [
        {"id": "x:1", "text": "a", "source_text": "s"},
        {"id": "x:2", "text": "b", "source_text": None},
    ]
    assert read(path, "corpus", text_fields=["text"]) == read(path, "corpus")
    other = write_jsonl(tmp_path / "y.jsonl", [{"page_content": "a", "metadata": {"lang": "zh"}}])
    assert read(other, "corpus", text_fields=["page_content"]) == [
        {"id": "y:1", "text": "a", "metadata": {"lang": "zh"}}
    ]


def test_keys_that_are_data_are_refused(tmp_path: Path) -> None:
    rows = [{"text": "t", "counts": {f"word{number}": 1}} for number in range(1001)]
    with pytest.raises(InputError, match="more than 1000 columns, members of objects counted"):
        survey_of(write_jsonl(tmp_path / "x.jsonl", rows), "corpus")
    with pytest.raises(InputError, match="more than 1000 columns"):
        survey_of(
            write_jsonl(tmp_path / "y.jsonl", [{"text": "t", **row["counts"]} for row in rows]), "corpus"
        )


def test_values_of_rejected_rows_decide_no_type(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [{"text": "a", "c": 1}, {"text": " ", "c": "x"}])
    surveyed, entries = quarantined(path, "corpus", tmp_path / "q")
    assert len(entries) == 1
    assert rows_of(surveyed) == [{"id": "x:1", "text": "a", "c": 1}]


def test_nothing_joins_chunks_of_a_parquet_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are checked and passed on batch by batch: joined, their texts might be too long for one array."""
    monkeypatch.setattr(parquet, "_BATCH_BYTES", 4000)
    rows = [
        {"id": str(n), "title": f"t{n}" if n % 7 else None, "text": "x" * 100, "tags": [str(n)] * (n % 3)}
        for n in range(500)
    ]
    pq.write_table(
        pa.Table.from_pylist(rows), tmp_path / "x.parquet", compression="none", use_dictionary=False
    )
    surveyed = survey_of(tmp_path / "x.parquet", "corpus", 500)
    (piece,) = surveyed.pieces
    table = read_piece(piece)
    assert all(table[name].num_chunks > 5 for name in ("id", "text", "title", "tags", "source_text"))
    assert table["title"].to_pylist() == [row["title"] for row in rows]
    assert table["text"].to_pylist() == [
        f"{row['title']} {row['text']}" if row["title"] else row["text"] for row in rows
    ]
    assert table["source_text"].to_pylist() == [row["text"] if row["title"] else None for row in rows]
    assert table["tags"].to_pylist() == [row["tags"] for row in rows]


def test_a_text_longer_than_a_line_may_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raytower.data.columns.MAX_LINE_BYTES", 10)
    pq.write_table(pa.table({"text": ["short", "x" * 11], "c": ["y" * 11, None]}), tmp_path / "x.parquet")
    _, entries = quarantined(tmp_path / "x.parquet", "lines", tmp_path / "q")
    assert [(entry["line"], entry["reason"]) for entry in entries] == [(2, "text is longer than 10 bytes")]
    with pytest.raises(InputError, match=r":1: column 'c' is longer than 10 bytes"):
        survey_of(tmp_path / "x.parquet", "corpus")


def test_what_passes_goes_through_json_and_back(tmp_path: Path) -> None:
    """A column written as JSON again has the type that it had, where JSON has the type at all."""
    row = {
        "text": "t",
        "i": 2**53 + 1,
        "u": 2**64 - 1,
        "f": 0.5,
        "b": True,
        "s": "x",
        "l": [1, 2],
        "o": {"k": ["v"]},
    }
    first = survey_of(write_jsonl(tmp_path / "a.jsonl", [row]), "corpus")
    (found,) = rows_of(first)
    again = survey_of(write(tmp_path / "b.jsonl", json.dumps(found)), "corpus")
    assert again.schema == first.schema
    assert rows_of(again) == [found]
    pq.write_table(pa.Table.from_pylist([found], first.schema), tmp_path / "c.parquet")
    assert survey_of(tmp_path / "c.parquet", "corpus").schema == first.schema
    assert pc.all(pc.equal(pa.array([found["i"]]), 2**53 + 1)).as_py()
