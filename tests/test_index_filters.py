"""Filters against a plain evaluator that looks at one row at a time, every operator by hand, and every refusal."""

from __future__ import annotations

import datetime
import functools
import json
import operator
import pickle
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raytower.errors import FormatError, InputError
from raytower.index.allowed import AllowedRows
from raytower.index.filters import parse_filter

UTC = datetime.UTC
ORDERS: dict[str, Callable[[Any, Any], bool]] = {
    "$gt": operator.gt,
    "$gte": operator.ge,
    "$lt": operator.lt,
    "$lte": operator.le,
}
DAYS = [datetime.date(1969, 12, 31), datetime.date(1970, 1, 1), datetime.date(2024, 2, 29)]
MOMENTS = [
    datetime.datetime(1969, 12, 31, 23, 59, 59, 999999),
    datetime.datetime(2024, 2, 29, 12, 0, 0, 500000),
    datetime.datetime(2024, 3, 1),
]
WORDS = ["", "a", "b", "zz", "é", "中文", "\U0001f600", "\uffff"]
# Each column: its type, values to draw from, and literals to compare with.
COLUMNS: dict[str, tuple[pa.DataType, list[Any], list[Any]]] = {
    "int8": (pa.int8(), [-128, -1, 0, 3, 127], [-129, -128, 0, 3, 3.0, 127, 128, 10**30]),
    "int64": (pa.int64(), [-(2**63), 0, 2**53 + 1, 2**63 - 1], [-(2**63), 0, 2**53, 2**53 + 1, 2**63, -1e30]),
    "uint64": (pa.uint64(), [0, 5, 2**64 - 1], [-1, 0, 5.0, 2**64 - 1, 2**64]),
    "float16": (pa.float16(), [-0.5, 0.1, 2048.0], [0.1, -0.5, 2048, 0]),
    "float32": (pa.float32(), [-0.0, 0.1, 1e30, float("nan"), float("-inf")], [0, -0.0, 0.1, 1e30, 7]),
    "float64": (pa.float64(), [0.0, 0.1, 3.0, float("nan"), float("inf")], [-0.0, 0.1, 3, 2**53, 1e300]),
    "decimal": (
        pa.decimal128(6, 2),
        [Decimal("-1.10"), Decimal(0), Decimal("9999.99")],
        [-1.1, 0, 9999.99, 10**4, -1e9],
    ),
    "decimal32": (pa.decimal32(4, 1), [Decimal("1.5"), Decimal("-999.9")], [1.5, -1000, 3]),
    "string": (pa.string(), WORDS, WORDS),
    "large_string": (pa.large_string(), WORDS, WORDS),
    "string_view": (pa.string_view(), WORDS, WORDS),
    "bool": (pa.bool_(), [True, False], [True, False]),
    "date32": (pa.date32(), DAYS, [str(day) for day in DAYS]),
    "date64": (pa.date64(), DAYS, [str(day) for day in DAYS]),
    "moment": (pa.timestamp("us"), MOMENTS, [moment.isoformat() for moment in MOMENTS]),
    "moment_ns": (
        pa.timestamp("ns"),
        MOMENTS,
        [*(moment.isoformat() for moment in MOMENTS), "0001-01-01", "9999-12-31"],
    ),
    "moment_utc": (
        pa.timestamp("ms", tz="UTC"),
        [datetime.datetime(2024, 3, 1, hour, tzinfo=UTC) for hour in (0, 4, 8)],
        ["2024-03-01", "2024-03-01T12:00:00+08:00", "2024-03-01 00:00-0400", "2024-03-01T08:00:00.000Z"],
    ),
    "coded": (pa.dictionary(pa.int8(), pa.string()), WORDS, WORDS),
    "words": (pa.list_(pa.string()), [[], ["a"], ["a", None, "中文"], [None], ["b", "zz"]], WORDS),
    "numbers": (pa.large_list(pa.int16()), [[], [1, 2], [None, 3], [2]], [0, 1, 2.0, 3, 2**20]),
    "codes": (pa.list_(pa.dictionary(pa.int32(), pa.string())), [[], ["a", None], ["b", "a"]], WORDS),
    "pair": (pa.list_(pa.string(), 2), [["a", "b"], [None, "b"], ["zz", "é"]], WORDS),
}
UNORDERED = {"bool", "words", "numbers", "codes", "pair"}
SCHEMA = pa.schema([(name, kind) for name, (kind, _, _) in COLUMNS.items()])


Drawn = tuple[pa.Table, list[dict[str, Any]]]


# The plain evaluator


def matches(condition: dict[str, Any], row: dict[str, Any]) -> bool:
    return all(member_matches(key, value, row) for key, value in condition.items())


def member_matches(key: str, value: Any, row: dict[str, Any]) -> bool:
    if key == "$not":
        return not matches(value, row)
    if key in ("$and", "$or"):
        answers = [matches(inner, row) for inner in value]
        return all(answers) if key == "$and" else any(answers)
    if not isinstance(value, dict):
        value = {"$eq": value}
    return all(leaf_matches(key, name, literal, row[key]) for name, literal in value.items())


def leaf_matches(column: str, name: str, literal: Any, value: Any) -> bool:
    if name == "$eq":
        if literal is None or value is None:
            return literal is None and value is None
        values = value if isinstance(value, list) else [value]
        return any(item is not None and item == as_stored(column, literal) for item in values)
    if name == "$ne":
        return not leaf_matches(column, "$eq", literal, value)
    if name in ("$in", "$nin"):
        return any(leaf_matches(column, "$eq", item, value) for item in literal) == (name == "$in")
    return value is not None and ORDERS[name](value, as_stored(column, literal))


def as_stored(column: str, literal: Any) -> Any:
    """The literal as the Python value that stands for it in a row."""
    kind = COLUMNS[column][0]
    if pa.types.is_floating(kind):
        return kind.to_pandas_dtype()(literal)
    if pa.types.is_decimal(kind):
        return Decimal(str(literal))
    if pa.types.is_date(kind):
        return datetime.date.fromisoformat(literal)
    if pa.types.is_timestamp(kind):
        moment = datetime.datetime.fromisoformat(literal)
        return moment.replace(tzinfo=UTC) if kind.tz and moment.tzinfo is None else moment
    return literal


# Drawn tables and filters


def conditions(name: str) -> st.SearchStrategy[dict[str, Any]]:
    """Conditions on one column: bare equality, or one to three operators."""
    literals = st.sampled_from([*COLUMNS[name][2], None])
    members = {
        "$eq": literals,
        "$ne": literals,
        "$in": st.lists(literals, max_size=3),
        "$nin": st.lists(literals, max_size=3),
    }
    if name not in UNORDERED:
        members |= {order: st.sampled_from(COLUMNS[name][2]) for order in ORDERS}
    some = st.lists(st.sampled_from(sorted(members)), min_size=1, max_size=3, unique=True)
    operators = some.flatmap(lambda names: st.fixed_dictionaries({key: members[key] for key in names}))
    return st.one_of(literals, operators).map(lambda condition: {name: condition})


leaves = st.sampled_from(sorted(COLUMNS)).flatmap(conditions)
filters = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map(lambda items: {"$and": items}),
        st.lists(inner, min_size=1, max_size=3).map(lambda items: {"$or": items}),
        inner.map(lambda item: {"$not": item}),
        st.tuples(inner, inner).map(lambda pair: pair[0] | pair[1]),
    ),
    max_leaves=6,
)


@functools.cache
def drawn_table(num_rows: int, seed: int) -> tuple[pa.Table, list[dict[str, Any]]]:
    """A table of every column and its rows; each column has chunks of its own, read from within larger buffers."""
    random = np.random.default_rng(seed)
    columns = []
    for kind, values, _ in COLUMNS.values():
        choices = [*values, None]
        drawn = [choices[place] for place in random.integers(0, len(choices), num_rows)]
        cut = int(random.integers(0, num_rows + 1))
        padded = [values[0], *drawn]
        parts = (padded[: cut + 1], padded[cut:])  # each begins with one row too many
        columns.append(pa.chunked_array([pa.array(part, kind).slice(1) for part in parts], kind))
    table = pa.table(columns, schema=SCHEMA)
    return table, rows_of(table)


tables = st.builds(drawn_table, st.sampled_from([0, 1, 40]), st.integers(0, 9))


class TestAgainstRows:
    @settings(max_examples=300, deadline=None)
    @given(drawn=tables, value=filters)
    def test_mask_agrees_with_a_look_at_each_row(self, drawn: Drawn, value: dict[str, Any]) -> None:
        table, rows = drawn
        mask = parse_filter(value, SCHEMA).mask(table)
        assert mask.dtype == np.bool_
        assert mask.tolist() == [matches(value, row) for row in rows]

    @settings(max_examples=60, deadline=None)
    @given(drawn=tables, value=filters)
    def test_not_is_the_complement(self, drawn: Drawn, value: dict[str, Any]) -> None:
        table, _ = drawn
        negated = parse_filter({"$not": value}, SCHEMA).mask(table)
        assert (negated == ~parse_filter(value, SCHEMA).mask(table)).all()

    @settings(max_examples=60, deadline=None)
    @given(value=filters)
    def test_key_is_the_same_whatever_the_order_of_keys(self, value: dict[str, Any]) -> None:
        turned = parse_filter(turn(value), SCHEMA)
        assert turned.key == parse_filter(value, SCHEMA).key
        assert json.loads(turned.key) == value
        assert turned == pickle.loads(pickle.dumps(turned))


def rows_of(table: pa.Table) -> list[dict[str, Any]]:
    rows = table.to_pylist()
    for row in rows:
        # These come as pandas' own moments, to the nanosecond.
        if row["moment_ns"] is not None:
            row["moment_ns"] = datetime.datetime.fromisoformat(str(row["moment_ns"])[:26])
        for name, kind in (("float16", np.float16), ("float32", np.float32)):
            row[name] = None if row[name] is None else kind(row[name])
    return rows


def turn(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: turn(inner) for key, inner in reversed(value.items())}
    return [turn(item) for item in value] if isinstance(value, list) else value


PAPERS = pa.table(
    {
        "id": ["p0", "p1", "p2", "p3"],
        "text": ["甲", "乙", "丙", "丁"],
        "lang": ["zh", "en", None, "zh"],
        "year": [1999, 2005, 2010, None],
        "score": pa.array([0.5, float("nan"), None, 2.0], pa.float32()),
        "open": [True, False, None, True],
        "tags": [["a", "b"], [], None, ["b"]],
        "day": pa.array(["2024-01-31", "2024-02-01", None, "1969-12-31"]).cast(pa.date32()),
        "seen": pa.array([0, 1, None, 2], pa.timestamp("s")),
        "seen_utc": pa.array([0, 1, None, 2], pa.timestamp("s", tz="Asia/Shanghai")),
        "price": pa.array([Decimal("1.10"), Decimal("2.00"), None, Decimal("-3.25")]),
        "blob": pa.array([b"x", None, b"y", b"z"]),
        "place": [{"city": "x"}, None, {"city": "y"}, {"city": "z"}],
        "embedding": pa.array([[0.0, 1.0]] * 4, pa.list_(pa.float32(), 2)),
    }
)


class TestByHand:
    @pytest.mark.parametrize(
        ("value", "expected"),
        [
            ({"lang": "zh"}, [0, 3]),
            ({"lang": {"$eq": "zh"}}, [0, 3]),
            ({"lang": {"$ne": "zh"}}, [1, 2]),
            ({"lang": None}, [2]),
            ({"lang": {"$ne": None}}, [0, 1, 3]),
            ({"lang": {"$in": ["en", "fr"]}}, [1]),
            ({"lang": {"$nin": ["en", "fr"]}}, [0, 2, 3]),
            ({"lang": {"$in": ["en", None]}}, [1, 2]),
            ({"lang": {"$nin": [None]}}, [0, 1, 3]),
            ({"lang": {"$in": []}}, []),
            ({"lang": {"$nin": []}}, [0, 1, 2, 3]),
            ({"year": {"$gt": 2005}}, [2]),
            ({"year": {"$gte": 2005}}, [1, 2]),
            ({"year": {"$lt": 2005}}, [0]),
            ({"year": {"$lte": 2005}}, [0, 1]),
            ({"year": {"$gte": 2000, "$lt": 2010}}, [1]),
            ({"year": 2005.0}, [1]),
            ({"year": {"$lt": 10**40}}, [0, 1, 2]),
            ({"year": {"$gt": 10**40}}, []),
            ({"year": {"$ne": 10**40}}, [0, 1, 2, 3]),
            ({"lang": "zh", "year": 1999}, [0]),
            ({"$and": [{"lang": "zh"}, {"year": None}]}, [3]),
            ({"$or": [{"lang": "en"}, {"year": {"$gte": 2010}}]}, [1, 2]),
            ({"$or": [{"lang": "en"}], "year": 1999}, []),
            ({"$not": {"year": {"$lt": 2010}}}, [2, 3]),
            ({"score": 2}, [3]),
            ({"score": None}, [2]),
            ({"score": {"$gt": -1e30}}, [0, 3]),
            ({"score": {"$ne": 0.5}}, [1, 2, 3]),
            ({"open": False}, [1]),
            ({"open": {"$ne": True}}, [1, 2]),
            ({"tags": "b"}, [0, 3]),
            ({"tags": {"$in": ["a", "c"]}}, [0]),
            ({"tags": {"$ne": "a"}}, [1, 2, 3]),
            ({"tags": None}, [2]),
            ({"day": {"$lt": "2024-02-01"}}, [0, 3]),
            ({"seen": "1970-01-01T00:00:01"}, [1]),
            ({"seen": {"$gte": "1970-01-01"}}, [0, 1, 3]),
            ({"seen_utc": {"$gt": "1970-01-01T08:00:01+08:00"}}, [3]),
            ({"seen_utc": "1970-01-01T00:00:02"}, [3]),
            ({"price": 1.1}, [0]),
            ({"price": {"$lt": 2}}, [0, 3]),
            ({"blob": None}, [1]),
            ({"place": {"$ne": None}}, [0, 2, 3]),
            ({"id": {"$in": ["p3", "p0"]}}, [0, 3]),
            ({"text": {"$gte": "丙"}}, [0, 1, 2]),  # 丙 is U+4E19, 甲 U+7532, 乙 U+4E59, 丁 U+4E01
        ],
    )
    def test_rows_that_match(self, value: dict[str, Any], expected: list[int]) -> None:
        assert np.flatnonzero(parse_filter(value, PAPERS.schema).mask(PAPERS)).tolist() == expected

    def test_a_float_means_what_the_column_stores(self) -> None:
        table = pa.table({"x": pa.array([0.1, 0.2], pa.float32())})
        assert parse_filter({"x": 0.1}, table.schema).mask(table).tolist() == [True, False]
        assert parse_filter({"x": {"$lte": 0.1}}, table.schema).mask(table).tolist() == [True, False]

    @pytest.mark.parametrize("condition", [0, -0.0, {"$in": [0]}, {"$in": [-0.0]}, {"$in": [0.0, 7]}])
    def test_both_zeros_are_zero(self, condition: Any) -> None:
        table = pa.table({"x": [0.0, -0.0, 1.0, None]})
        assert parse_filter({"x": condition}, table.schema).mask(table).tolist() == [True, True, False, False]

    def test_key_is_compact_and_readable(self) -> None:
        parsed = parse_filter({"year": {"$lt": 3, "$gte": 1}, "lang": "中"}, PAPERS.schema)
        assert parsed.key == '{"lang":"中","year":{"$gte":1,"$lt":3}}'
        assert [column.name for column in parsed.columns] == ["lang", "year"]

    def test_the_deepest_nesting_allowed(self) -> None:
        value: dict[str, Any] = {"lang": "zh"}
        for _ in range(32):
            value = {"$not": value}
        assert parse_filter(value, PAPERS.schema).mask(PAPERS).tolist() == [True, False, False, True]

    def test_memory_mapped_file_of_many_batches(self, tmp_path: Path) -> None:
        with pa.ipc.new_file(str(tmp_path / "documents.arrow"), PAPERS.schema) as writer:
            writer.write_table(pa.concat_tables([PAPERS] * 5), max_chunksize=3)
        table = pa.ipc.open_file(pa.memory_map(str(tmp_path / "documents.arrow"))).read_all()
        assert table.column("id").num_chunks == 10
        mask = parse_filter({"lang": "zh", "tags": "a"}, table.schema).mask(table)
        assert np.flatnonzero(mask).tolist() == [0, 4, 8, 12, 16]

    def test_large_dictionaries_and_nulls_inside_them(self) -> None:
        words = pa.array(["a", "b", None, *(f"w{number}" for number in range(100))])
        table = pa.table({"word": pa.DictionaryArray.from_arrays(pa.array([1, 2, None, 0]), words)})
        assert parse_filter({"word": "b"}, table.schema).mask(table).tolist() == [True, False, False, False]
        assert parse_filter({"word": None}, table.schema).mask(table).tolist() == [False, True, True, False]
        assert parse_filter({"word": {"$gt": "a"}}, table.schema).mask(table).tolist() == [True] + [False] * 3

    def test_no_rows(self) -> None:
        assert parse_filter({"lang": "zh"}, PAPERS.schema).mask(PAPERS.slice(0, 0)).tolist() == []


class TestShardsThatDiffer:
    """Shards of one index may store a column more narrowly than its schema, or not at all."""

    def test_a_column_that_is_missing_is_null(self) -> None:
        schema = pa.schema([("year", pa.int64()), ("lang", pa.string())])
        table = pa.table({"year": [1, 2]})
        assert parse_filter({"lang": "zh"}, schema).mask(table).tolist() == [False, False]
        assert parse_filter({"lang": None}, schema).mask(table).tolist() == [True, True]
        assert parse_filter({"lang": None, "year": 2}, schema).mask(table).tolist() == [False, True]

    @pytest.mark.parametrize(
        ("wide", "stored", "literal"),
        [
            (pa.float64(), pa.array([1, 2, None]), 2),
            (pa.string(), pa.nulls(3), "x"),
            (pa.large_string(), pa.array(["x", "y", None]), "y"),
            (pa.timestamp("us"), pa.array([0, 1, None], pa.timestamp("s")), "1970-01-01T00:00:01"),
            (
                pa.dictionary(pa.int32(), pa.string()),
                pa.array(["x", "y", None], pa.dictionary(pa.int8(), pa.string())),
                "y",
            ),
            (pa.list_(pa.int64()), pa.array([[], None, []], pa.list_(pa.null())), 1),
        ],
    )
    def test_a_narrower_column_is_widened(self, wide: pa.DataType, stored: pa.Array, literal: Any) -> None:
        mask = parse_filter({"x": literal}, pa.schema([("x", wide)])).mask(pa.table({"x": stored}))
        assert mask.tolist() == [False, stored.null_count == 1 and wide != pa.list_(pa.int64()), False]

    def test_a_column_that_does_not_fit_is_refused(self) -> None:
        parsed = parse_filter({"x": 1}, pa.schema([("x", pa.int64())]))
        with pytest.raises(FormatError, match=r"'x' of the documents is string, which does not become int64"):
            parsed.mask(pa.table({"x": ["one"]}))


DEEP: dict[str, Any] = {"lang": "zh"}
for _ in range(33):
    DEEP = {"$and": [DEEP]}


class TestRefused:
    @pytest.mark.parametrize(
        ("value", "message"),
        [
            ([], r"filter is \[\]; it must be an object"),
            ("zh", r'filter is "zh"; it must be an object'),
            (None, r"filter is null; it must be an object"),
            ({}, r"filter is empty"),
            ({"lang": {}}, r"filter\.lang is empty"),
            ({1: "zh"}, r"has the key 1; keys of a filter are strings"),
            ({"$and": []}, r"filter\.\$and is \[\]; it takes a list of one or more filters"),
            ({"$or": {"lang": "zh"}}, r"filter\.\$or is .*; it takes a list of one or more filters"),
            ({"$or": [{"lang": "zh"}, {}]}, r"filter\.\$or\[1\] is empty"),
            ({"$not": [{"lang": "zh"}]}, r"filter\.\$not is .*; it must be an object"),
            (
                {"$nor": [{"lang": "zh"}]},
                r"no operator '\$nor'; the nearest is '\$or'; here stand \$and, \$or, \$not",
            ),
            ({"year": {"$gtt": 1}}, r"filter\.year: there is no operator '\$gtt'; the nearest is '\$gt'"),
            ({"year": {"from": 1}}, r"filter\.year: there is no operator 'from'"),
            ({"$gt": 3}, r"'\$gt' stands inside a column"),
            ({"year": {"$not": {"$gt": 3}}}, r"'\$not' holds filters and stands outside columns"),
            (
                {"yaer": 1},
                r"no column 'yaer'; the nearest is 'year'; columns are 'id', 'text', 'lang', 'year'",
            ),
            ({"embedding": None}, r"no column 'embedding'"),
            (DEEP, r"nested more than 32 filters deep"),
            (
                {"year": "2005"},
                r"column 'year' \(int64\) cannot be compared with \"2005\": it takes an integer",
            ),
            (
                {"year": 2005.5},
                r"filter\.year: .* 2005\.5: it takes an integer, and this number has a fraction",
            ),
            ({"year": True}, r"\(int64\) cannot be compared with true: it takes an integer"),
            ({"year": {"$gt": None}}, r"filter\.year\.\$gt is null, which has no order"),
            ({"year": {"$in": 2005}}, r"filter\.year\.\$in is 2005; it takes a list of values"),
            ({"year": {"$nin": [1, "x"]}}, r"filter\.year\.\$nin\[1\]: .* it takes an integer"),
            ({"year": {"$in": [[1]]}}, r"filter\.year\.\$in\[0\]: .* \[1\]: it takes an integer"),
            ({"year": [2005]}, r"to match any of several values write \{'\$in'"),
            ({"year": {"$eq": {"$gt": 1}}}, r"filter\.year\.\$eq: .* it takes an integer"),
            ({"year": 1 << 1024}, r"integers have at most 1024 bits"),
            ({"year": 10**5000}, r"integers have at most 1024 bits"),
            ({"year": float("nan")}, r"cannot be compared with NaN: NaN and infinity are no JSON numbers"),
            ({"score": float("inf")}, r"'score' \(float\) .* Infinity: NaN and infinity are no JSON numbers"),
            ({"score": "high"}, r"'score' \(float\) cannot be compared with \"high\": it takes a number"),
            ({"score": False}, r"it takes a number"),
            ({"score": 1e39}, r"beyond the range of float"),
            ({"score": 10**300}, r"beyond the range of float"),
            ({"score": 2**24 + 1}, r"this integer is not exact in float, whose nearest value is 16777216"),
            ({"lang": 3}, r"'lang' \(string\) cannot be compared with 3: it takes a string"),
            ({"lang": "\ud800"}, r"it takes a string of valid Unicode"),
            ({"open": 1}, r"'open' \(bool\) cannot be compared with 1: it takes true or false"),
            ({"open": {"$gt": False}}, r"'open' \(bool\) has no order; use \$eq, \$ne, \$in or \$nin"),
            ({"tags": {"$gt": "a"}}, r"has no order"),
            ({"tags": 3}, r"'tags' \(list<.*string>\) cannot be compared with 3: it takes a string"),
            ({"tags": ["a"]}, r"to match any of several values"),
            ({"day": "01/02/2024"}, r"it takes an ISO 8601 date"),
            ({"day": "2024-01-31T00:00:00"}, r"it takes an ISO 8601 date"),
            ({"day": 20240131}, r"it takes an ISO 8601 date"),
            ({"day": "2024-02-30"}, r"there is no such date: day is out of range"),
            ({"seen": "yesterday"}, r"it takes an ISO 8601 time"),
            ({"seen": "2024-01-31T12:00:00Z"}, r"the column has no time zone"),
            ({"seen": "2024-01-31T24:00:00"}, r"it takes hours to 23"),
            ({"seen": "2024-01-31T00:00:00.5"}, r"the column counts in s; leave out the finer digits"),
            ({"seen_utc": "2024-01-31T00:00:00+25:00"}, r"offsets go to 23:59"),
            ({"price": 1.101}, r"a number of at most 2 decimal places"),
            ({"price": "1.10"}, r"it takes a number"),
            ({"blob": "x"}, r"'blob' \(binary\) cannot be compared with anything; .* whether it is null"),
            ({"place": {"city": "x"}}, r"filter\.place: there is no operator 'city'"),
            ({"place": {"$in": [1]}}, r"cannot be compared with anything"),
            ({"lang": object()}, r"a object that is no JSON"),
        ],
    )
    def test_the_message_names_place_rule_and_value(self, value: Any, message: str) -> None:
        with pytest.raises(InputError, match=message):
            parse_filter(value, PAPERS.schema)

    def test_two_columns_of_one_name(self) -> None:
        schema = pa.schema([("x", pa.int64()), ("x", pa.string())])
        with pytest.raises(InputError, match="2 columns are named 'x'"):
            parse_filter({"x": 1}, schema)

    def test_a_filter_without_end(self) -> None:
        endless: dict[str, Any] = {}
        endless["$not"] = endless
        with pytest.raises(InputError, match="nested more than 32"):
            parse_filter(endless, PAPERS.schema)

    def test_messages_stay_short(self) -> None:
        with pytest.raises(InputError) as caught:
            parse_filter({"year": "x" * 10_000}, PAPERS.schema)
        assert len(str(caught.value)) < 300


class TestAllowedRows:
    @given(st.lists(st.booleans(), max_size=40))
    def test_bits_are_those_of_the_mask(self, answers: list[bool]) -> None:
        allowed = AllowedRows.of(np.array(answers, np.bool_))
        assert allowed.count == sum(answers)
        assert allowed.rows.tolist() == [row for row, answer in enumerate(answers) if answer]
        # Row r is bit r % 8 of byte r // 8.
        assert [bool(allowed.bits[row // 8] >> (row % 8) & 1) for row in range(len(answers))] == answers
        assert len(allowed.bits) == (len(answers) + 7) // 8

    def test_only_lines_of_booleans(self) -> None:
        with pytest.raises(ValueError, match="must be bool"):
            AllowedRows.of(np.array([0, 1]))  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="must be bool"):
            AllowedRows.of(np.ones((2, 2), np.bool_))
