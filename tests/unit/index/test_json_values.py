"""Values as JSON, and that each finds its document again as a filter."""

from __future__ import annotations

import datetime
import decimal
import json
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest

from raytower.errors import InputError
from raytower.index.filters import to_sql
from raytower.index.json_values import json_rows, json_values

D = decimal.Decimal
NOON = 1_706_702_400  # 2024-01-31T12:00:00Z

# Type → values, and how JSON shows them; worked out by hand.
CASES: dict[str, tuple[pa.DataType, list[Any], list[Any]]] = {
    "int64": (pa.int64(), [2**53 + 1, -(2**63)], [9007199254740993, -9223372036854775808]),
    "uint64": (pa.uint64(), [2**64 - 1, 0], [18446744073709551615, 0]),
    "float64": (
        pa.float64(),
        [0.1, float("nan"), float("inf"), float("-inf")],
        [0.1, "NaN", "Infinity", "-Infinity"],
    ),
    "float32": (pa.float32(), [0.1, float("nan"), float("-inf")], [0.10000000149011612, "NaN", "-Infinity"]),
    "decimal": (pa.decimal128(12, 2), [D("32.90"), D("-0.01"), D("0.00")], ["32.90", "-0.01", "0.00"]),
    "long_decimal": (
        pa.decimal128(38, 10),
        [D("12345678901234567903.1234567900"), D("0.0000000001")],
        ["12345678901234567903.1234567900", "0.0000000001"],
    ),
    "longer_decimal": (pa.decimal256(60, 10), [D("1" * 45 + ".5")], ["1" * 45 + ".5000000000"]),
    "hundreds": (pa.decimal128(5, -2), [D("12300")], ["12300"]),
    "bytes": (pa.binary(), [b"\xff\x00", b"", b"it's"], ["/wA=", "", "aXQncw=="]),
    "many_bytes": (pa.large_binary(), [b"\xff\x00"], ["/wA="]),
    "three_bytes": (pa.binary(3), [b"abc"], ["YWJj"]),
    "date": (pa.date32(), [datetime.date(2024, 1, 31), -1], ["2024-01-31", "1969-12-31"]),
    "date64": (pa.date64(), [datetime.date(2024, 1, 31)], ["2024-01-31"]),
    "seconds": (pa.time32("s"), [3723], ["01:02:03"]),
    "milliseconds": (pa.time32("ms"), [3_723_400, 0], ["01:02:03.4", "00:00:00"]),
    "microseconds": (pa.time64("us"), [3_723_000_001], ["01:02:03.000001"]),
    "nanoseconds": (pa.time64("ns"), [3_723_000_000_001], ["01:02:03.000000001"]),
    "instant": (pa.timestamp("s"), [NOON], ["2024-01-31T12:00:00"]),
    "fine": (
        pa.timestamp("ns"),
        [NOON * 10**9 + 123_456_789, -1],
        ["2024-01-31T12:00:00.123456789", "1969-12-31T23:59:59.999999999"],
    ),
    "there": (
        pa.timestamp("ns", "Asia/Shanghai"),
        [NOON * 10**9 + 123_456_789],
        ["2024-01-31T20:00:00.123456789+08:00"],
    ),
    "west": (pa.timestamp("ms", "-03:30"), [NOON * 1000 + 500], ["2024-01-31T08:30:00.5-03:30"]),
    "long_ago": (pa.timestamp("s", "Asia/Shanghai"), [-3_000_000_000], ["1874-12-07T18:40:00Z"]),
    "span": (pa.duration("us"), [3_723_500_000, -1, 0], ["PT3723.5S", "-PT0.000001S", "PT0S"]),
    "words": (pa.list_(pa.string()), [["a", "b"], ["a"]], [["a", "b"], ["a"]]),
    "days": (pa.list_(pa.date32()), [[datetime.date(2024, 1, 31)]], [["2024-01-31"]]),
    "large_list": (pa.large_list(pa.int64()), [[1, 2]], [[1, 2]]),
    "flag": (pa.bool_(), [True, False], [True, False]),
    "text": (pa.large_string(), ["it's", "a\x00b\n", "中文"], ["it's", "a\x00b\n", "中文"]),
    "object": (
        pa.struct([("cost", pa.decimal128(5, 2)), ("at", pa.timestamp("ns"))]),
        [{"cost": D("1.50"), "at": 1}, {"cost": None, "at": 2}],
        [
            {"cost": "1.50", "at": "1970-01-01T00:00:00.000000001"},
            {"cost": None, "at": "1970-01-01T00:00:00.000000002"},
        ],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_shown_is_json_and_finds_its_row_again(name: str, tmp_path: Path) -> None:
    kind, values, shown = CASES[name]
    column = pa.array([*values, None], kind)
    assert json_values(column) == [*shown, None]
    assert json.loads(json.dumps(shown, allow_nan=False)) == shown
    dataset = lance.write_dataset(pa.table({name: column}), tmp_path / "table")
    for row, value in enumerate([*shown, None]):
        condition = to_sql({name: json.loads(json.dumps(value))}, dataset.schema)
        found = dataset.to_table(filter=condition, with_row_id=True, columns=[])["_rowid"].to_pylist()
        assert found == [row], (value, condition)
    if not isinstance(shown[0], (list, dict)):
        either = to_sql({name: {"$in": [shown[0], None]}}, dataset.schema)
        assert dataset.count_rows(filter=either) == 2


def test_a_categorical_column_is_compared_by_its_values(tmp_path: Path) -> None:
    column = pa.array(["x", None, "y", "x"]).dictionary_encode()
    assert json_values(column) == ["x", None, "y", "x"]
    dataset = lance.write_dataset(pa.table({"kind": column}), tmp_path / "table")
    assert dataset.count_rows(filter=to_sql({"kind": "x"}, dataset.schema)) == 2


def test_what_has_no_filter_is_shown_too() -> None:
    maps = pa.array([[("a", D("1.5")), ("b", None)], None, []], pa.map_(pa.string(), pa.decimal128(3, 1)))
    assert json_values(maps) == [[["a", "1.5"], ["b", None]], None, []]
    objects = pa.array([[{"b": b"\xff"}], None, [None]], pa.list_(pa.struct([("b", pa.binary())])))
    assert json_values(objects) == [[{"b": "/w=="}], None, [None]]
    fixed = pa.array([[1.5, None], None], pa.list_(pa.float32(), 2))
    assert json_values(fixed) == [[1.5, None], None]
    assert json_values(pa.nulls(2)) == [None, None]
    # Beyond the years of Python's calendar.
    assert json_values(pa.array([400_000_000_000], pa.timestamp("s"))) == ["14645-06-30T15:06:40"]
    assert json_values(pa.array([400_000_000_000], pa.timestamp("s", "UTC"))) == ["14645-06-30T15:06:40Z"]
    assert json_values(pa.array([-2_000_000], pa.date32())) == ["-3506-03-09"]


def test_slices_and_chunks_keep_their_rows() -> None:
    objects = pa.array([{"n": 1}, None, {"n": 3}], pa.struct([("n", pa.int64())]))
    assert json_values(objects.slice(1)) == [None, {"n": 3}]
    table = pa.table({"a": pa.chunked_array([[b"x"], [b"y", None]]), "b": [1, 2, 3]})
    rows = [{"a": "eA==", "b": 1}, {"a": "eQ==", "b": 2}, {"a": None, "b": 3}]
    assert json_rows(table) == rows
    assert json_rows(table.select([])) == []


def test_a_decimal_as_a_json_number_by_its_digits() -> None:
    """A parser that keeps digits finds the value; of a float that has lost some nobody is told 'nothing found'."""
    schema = pa.schema([("amount", pa.decimal128(38, 10)), ("year", pa.int64()), ("price", pa.float64())])
    body = '{"amount": 12345678901234567903.1234567900, "year": 2020.0, "price": 0.5}'
    exact = to_sql(json.loads(body, parse_float=D), schema)
    assert "CAST('12345678901234567903.1234567900' AS DECIMAL(38, 10))" in exact
    assert "`year` IN (2020)" in exact
    assert "`price` IN (0.5)" in exact
    with pytest.raises(InputError, match=r"amount.*keeps 15 digits.*write it as a string"):
        to_sql(json.loads(body), schema)
    assert to_sql({"amount": 32.9}, schema) == to_sql({"amount": "32.90"}, schema).replace("32.90", "32.9")


def test_times_durations_and_bytes_that_do_not_fit() -> None:
    schema = pa.schema(
        [("t", pa.time32("s")), ("d", pa.duration("ms")), ("b", pa.binary(3)), ("n", pa.duration("ns"))]
    )
    for condition, message in (
        ({"t": "24:00"}, "time of day"),
        ({"t": "12:00:00.5"}, "counts in s"),
        ({"t": 5}, "time of day"),
        ({"d": "1 day"}, "duration in seconds"),
        ({"d": "PT0.0001S"}, "counts in ms"),
        ({"b": "YWI="}, "takes 3 bytes, and these are 2"),
        ({"b": "YW%"}, "base64"),
        ({"b": 5}, "base64"),
    ):
        with pytest.raises(InputError, match=message):
            to_sql(condition, schema)
    assert to_sql({"n": "PT9999999999999S"}, schema) == "`n` != `n`"  # beyond what the column can hold
    assert to_sql({"t": {"$gte": "12:00"}}, schema) == "`t` >= arrow_cast(43200, 'Time32(Second)')"


def test_numpy_scalars_stay_out() -> None:
    (value,) = json_values(pa.array([np.float16(0.5)], pa.float16()))
    assert type(value) is float
