"""Filters: what the table answers to a JSON condition, against the condition evaluated row by row in Python."""

from __future__ import annotations

import datetime
import decimal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raytower.errors import InputError
from raytower.index.filters import FilterLimits, sql_literal, to_sql
from raytower.index.reader import Index
from raytower.index.table import refuse_unindexable
from tests.support.index_cases import build, unit_vectors, write_embeddings

UTC = datetime.UTC
DAY = datetime.date(2024, 1, 31)
NOON = datetime.datetime(2024, 1, 31, 12, 0, 0, 500_000)
COLUMNS: dict[str, pa.Array] = {
    "year": pa.array([2000, 2001, None, 2003, -(2**63), 2**63 - 1], pa.int64()),
    "small": pa.array([1, None, 3, 127, -128, 0], pa.int8()),
    "large": pa.array([0, 1, 2**64 - 1, 2**63, None, 7], pa.uint64()),
    "price": pa.array([0.5, -1.25, None, 1e300, 0.0, float("nan")], pa.float64()),
    "weight": pa.array([0.1, 0.25, None, 3.5, -0.0, 1e30], pa.float32()),
    "flag": pa.array([True, False, None, True, False, True]),
    "lang": pa.array(["zh", "it's", "", None, "a\\b", "中文\n二"]),
    "day": pa.array([DAY, None, datetime.date(1969, 12, 31), datetime.date(2024, 2, 1), DAY, datetime.date(2100, 1, 1)]),  # noqa: E501
    "at": pa.array([NOON, None, datetime.datetime(1969, 12, 31, 23, 59, 59), NOON, NOON, NOON], pa.timestamp("us")),
    "seen": pa.array([NOON.replace(tzinfo=UTC), None, None, NOON.replace(tzinfo=UTC), None, None], pa.timestamp("ms", "UTC")),  # noqa: E501
    "tick": pa.array([1, None, 0, 10**18, -1, 5], pa.timestamp("ns")),
    "cost": pa.array([decimal.Decimal("1.50"), None, decimal.Decimal("-2.25"), decimal.Decimal("0.00"), None, None], pa.decimal128(8, 2)),  # noqa: E501
    "tags": pa.array([["a", "b"], [], None, ["c'"], ["a"], [None, "b"]], pa.list_(pa.string())),
    "codes": pa.array([[1, 2], [], None, [3], [1], [None, 2]], pa.list_(pa.int64())),
    "metadata": pa.array([{"lang": "zh", "n": 1}, {"lang": "en", "n": 2}, None, {"lang": None, "n": 3}, {"lang": "zh", "n": None}, {"lang": "x", "n": 5}]),  # noqa: E501
    "with space": pa.array([1, 2, 3, None, 5, 6]),
    "Upper": pa.array([1, 2, 3, None, 5, 6]),
    "back`tick": pa.array([1, 2, 3, None, 5, 6]),
    "nothing": pa.nulls(6),
    "blob": pa.array([b"x", None, b"", b"\x00", b"x", b"y"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    folder = tmp_path_factory.mktemp("filters")
    columns = {name: column for name, column in COLUMNS.items() if "`" not in name}
    embeddings = write_embeddings(folder / "e", list("abcdef"), unit_vectors(6), columns=columns)
    build(folder / "index", embeddings, indexed=["lang", "tags", "year", "flag"])
    return Index.open(folder / "index")


def matching(index: Index, condition: dict[str, Any]) -> list[int]:
    return index.table.matching(to_sql(condition, index.table.schema)).tolist()


def rows_where(name: str, holds: Callable[[Any], bool]) -> list[int]:
    """Rows whose value is not null and keeps a rule."""
    return [row for row, value in enumerate(COLUMNS[name].to_pylist()) if value is not None and holds(value)]


class TestComparisons:
    @pytest.mark.parametrize(
        ("name", "literal", "value"),
        [
            ("year", 2001, 2001),
            ("year", 2001.0, 2001),
            ("year", -(2**63), -(2**63)),
            ("year", 2**63 - 1, 2**63 - 1),
            ("small", 3, 3),
            ("small", -128, -128),
            ("small", 300, 300),
            ("small", -1000, -1000),
            ("large", 2**64 - 1, 2**64 - 1),
            ("large", 2**63, 2**63),
            ("large", -1, -1),
            ("large", 2**70, 2**70),
            ("weight", 0.25, 0.25),
            ("weight", 0.1, float(np.float32(0.1))),
            ("lang", "zh", "zh"),
            ("lang", "it's", "it's"),
            ("lang", "", ""),
            ("lang", "a\\b", "a\\b"),
            ("lang", "中文\n二", "中文\n二"),
            ("day", "2024-01-31", DAY),
            ("day", "1969-12-31", datetime.date(1969, 12, 31)),
            ("at", "2024-01-31T12:00:00.5", NOON),
            ("at", "1969-12-31T23:59:59", datetime.datetime(1969, 12, 31, 23, 59, 59)),
            ("seen", "2024-01-31T20:00:00.5+08:00", NOON.replace(tzinfo=UTC)),
            ("cost", 1.5, decimal.Decimal("1.5")),
            ("cost", -2.25, decimal.Decimal("-2.25")),
            ("cost", 0, decimal.Decimal(0)),
            ("with space", 3, 3),
            ("Upper", 3, 3),
        ],
    )
    def test_every_operator_on_every_type(self, index: Index, name: str, literal: Any, value: Any) -> None:
        rules: dict[str, Callable[[Any], bool]] = {
            "$eq": lambda found: found == value,
            "$ne": lambda found: found != value,
            "$gt": lambda found: found > value,
            "$gte": lambda found: found >= value,
            "$lt": lambda found: found < value,
            "$lte": lambda found: found <= value,
        }
        for operator, holds in rules.items():
            wanted = rows_where(name, holds)
            assert matching(index, {name: {operator: literal}}) == wanted, operator
            outside = [row for row in rows_where(name, lambda _: True) if row not in wanted]
            assert matching(index, {"$not": {name: {operator: literal}}}) == outside, operator
        others = [
            item
            for item in COLUMNS[name].to_pylist()
            if item is not None and not isinstance(item, (bytes, datetime.date, decimal.Decimal))
        ][:1]
        assert matching(index, {name: {"$in": [literal, *others]}}) == rows_where(
            name, lambda found: found in (value, *others)
        )
        assert matching(index, {name: {"$nin": [literal]}}) == rows_where(name, lambda found: found != value)

    def test_nan_is_greater_than_any_number_and_null_is_nothing(self, index: Index) -> None:
        assert matching(index, {"price": {"$gt": 1e308}}) == [5]
        assert matching(index, {"price": {"$lt": 0}}) == [1]
        assert matching(index, {"price": {"$ne": 0.5}}) == [1, 3, 4, 5]
        assert matching(index, {"price": None}) == [2]
        assert matching(index, {"price": {"$ne": None}}) == [0, 1, 3, 4, 5]
        assert matching(index, {"year": {"$in": [2000, None]}}) == [0, 2]
        assert matching(index, {"year": {"$nin": [2000, None]}}) == [1, 3, 4, 5]
        assert matching(index, {"weight": 0}) == [4]

    def test_booleans_and_columns_that_hold_nothing(self, index: Index) -> None:
        assert matching(index, {"flag": True}) == [0, 3, 5]
        assert matching(index, {"flag": {"$ne": True}}) == [1, 4]
        assert matching(index, {"nothing": None}) == [0, 1, 2, 3, 4, 5]
        assert matching(index, {"blob": None}) == [1]

    def test_lists_contain(self, index: Index) -> None:
        assert matching(index, {"tags": "a"}) == [0, 4]
        assert matching(index, {"tags": "c'"}) == [3]
        assert matching(index, {"tags": {"$in": ["b", "c'"]}}) == [0, 3, 5]
        assert matching(index, {"codes": 2}) == [0, 5]
        assert matching(index, {"codes": {"$in": [3, 2]}}) == [0, 3, 5]
        assert matching(index, {"tags": {"$ne": "a"}}) == [1, 3, 5]
        assert matching(index, {"tags": {"$nin": ["a", "b"]}}) == [1, 3]
        assert matching(index, {"tags": None}) == [2]
        assert matching(index, {"tags": {"$ne": None}}) == [0, 1, 3, 4, 5]
        assert matching(index, {"tags": {"$in": ["c'", None]}}) == [2, 3]
        assert matching(index, {"tags": {"$nin": ["c'", None]}}) == [0, 1, 4, 5]

    def test_numbers_that_no_member_of_a_list_can_be(self, index: Index) -> None:
        assert matching(index, {"codes": 2**70}) == []
        assert matching(index, {"codes": {"$ne": 2**70}}) == [0, 1, 3, 4, 5]
        assert matching(index, {"codes": {"$in": [2**70, 3]}}) == [3]

    def test_none_of_no_values(self, index: Index) -> None:
        assert matching(index, {"year": {"$in": []}}) == []
        assert matching(index, {"year": {"$nin": []}}) == [0, 1, 3, 4, 5]
        assert matching(index, {"year": {"$in": [None]}}) == [2]
        assert matching(index, {"year": {"$nin": [None]}}) == [0, 1, 3, 4, 5]

    @pytest.mark.parametrize(
        ("name", "beyond", "rows"),
        [
            ("small", 128, [0, 2, 3, 4, 5]),
            ("cost", 1_000_000, [0, 2, 3]),
            ("cost", 2**70, [0, 2, 3]),
            ("seen", "9999-12-31T23:59:59-08:00", [0, 3]),
            ("tick", "2262-04-11T23:47:16.854775808", [0, 2, 3, 4, 5]),
        ],
    )
    def test_a_literal_above_all_that_a_column_holds(
        self, index: Index, name: str, beyond: Any, rows: list[int]
    ) -> None:
        for operator in ("$lt", "$lte", "$ne"):
            assert matching(index, {name: {operator: beyond}}) == rows, operator
        for operator in ("$gt", "$gte", "$eq"):
            assert matching(index, {name: {operator: beyond}}) == [], operator

    @pytest.mark.parametrize(
        ("name", "beyond", "rows"),
        [
            ("small", -129, [0, 2, 3, 4, 5]),
            ("cost", -1_000_000, [0, 2, 3]),
            ("seen", "0001-01-01T00:00+08:00", [0, 3]),
            ("tick", "1677-09-21T00:12:43.145224191", [0, 2, 3, 4, 5]),
        ],
    )
    def test_a_literal_below_all_that_a_column_holds(
        self, index: Index, name: str, beyond: Any, rows: list[int]
    ) -> None:
        for operator in ("$gt", "$gte", "$ne"):
            assert matching(index, {name: {operator: beyond}}) == rows, operator
        for operator in ("$lt", "$lte", "$eq"):
            assert matching(index, {name: {operator: beyond}}) == [], operator

    @pytest.mark.parametrize(
        "written",
        [
            "2024-01-31T12:00:00.5Z",
            "2024-01-31t12:00:00,500z",
            "2024-01-31 20:00:00.50+0800",
            "2024-01-31T04:00:00.5-08",
        ],
    )
    def test_times_as_iso_8601_writes_them(self, index: Index, written: str) -> None:
        assert matching(index, {"seen": written}) == [0, 3]

    def test_times_without_seconds_and_with_all_digits(self, index: Index) -> None:
        assert matching(index, {"at": {"$gt": "2024-01-31T12:00"}}) == [0, 3, 4, 5]
        assert matching(index, {"at": {"$lt": "2024-01-31"}}) == [2]
        assert matching(index, {"at": {"$gt": "1969-12-31T23:59:58.999999"}}) == [0, 2, 3, 4, 5]
        assert matching(index, {"at": {"$gt": "1969-12-31T23:59:59.000001"}}) == [0, 3, 4, 5]
        assert matching(index, {"tick": "1970-01-01T00:00:00.000000001"}) == [0]

    def test_members_of_objects(self, index: Index) -> None:
        assert matching(index, {"metadata": None}) == [2]
        assert matching(index, {"metadata": {"$ne": None}}) == [0, 1, 3, 4, 5]
        assert matching(index, {"metadata": {"n": {"$gte": 3}, "lang": None}}) == [3]
        assert matching(index, {"metadata.lang": "zh"}) == [0, 4]
        assert matching(index, {"metadata": {"lang": "zh"}}) == [0, 4]
        assert matching(index, {"metadata": {"lang": "zh", "n": {"$gte": 1}}}) == [0]
        assert matching(index, {"metadata.n": {"$gt": 1}}) == [1, 3, 5]

    def test_and_or_not(self, index: Index) -> None:
        condition = {"$or": [{"lang": "zh"}, {"$and": [{"flag": False}, {"$not": {"small": {"$gte": 0}}}]}]}
        assert matching(index, condition) == [0, 4]
        assert matching(index, {"lang": "zh", "flag": True, "year": {"$gte": 1999, "$lt": 2001}}) == [0]

    @settings(deadline=None, max_examples=30)
    @given(text=st.text(max_size=8))
    def test_any_text_is_a_literal(self, index: Index, text: str) -> None:
        assert matching(index, {"lang": text}) == rows_where("lang", lambda found: found == text)


def test_a_member_is_looked_for_in_every_column_whose_name_begins_its_own() -> None:
    """`a.b.c` may be the member `c` of a column `a.b`, or the member `b.c` of a column `a`."""
    schema = pa.schema([("a.b", pa.struct([("d", pa.int64())])), ("a", pa.struct([("b.c", pa.int64())]))])
    assert to_sql({"a.b.c": 1}, schema) == to_sql({"a.b.c": 1}, schema.remove(0))
    assert to_sql({"a.b.d": 1}, schema) == to_sql({"a.b.d": 1}, schema.remove(1))


class TestRefusals:
    @pytest.mark.parametrize(
        ("condition", "message"),
        [
            ({"langg": "zh"}, "no column 'langg'; the nearest is 'lang'"),
            ({"ÿ": "zh"}, "no column 'ÿ'; the nearest is '"),
            ({"lang": {"$eg": 1}}, r"no operator '\$eg'; the nearest is"),
            ({"$nor": []}, r"no operator '\$nor'"),
            ({"lang": {"$and": []}}, "holds filters and stands outside columns"),
            ({"$eq": 1}, "stands inside a column"),
            ({"$or": []}, "a list of one or more filters"),
            ({"year": "x"}, "integer"),
            ({"year": 1.5}, "fraction"),
            ({"year": True}, "integer"),
            ({"flag": 1}, "true or false"),
            ({"flag": {"$gt": True}}, "has no order"),
            ({"tags": {"$gt": "a"}}, "has no order"),
            ({"lang": ["zh"]}, r"'\$in'"),
            ({"lang": {"$in": "zh"}}, "takes a list"),
            ({"lang": {"$gt": None}}, "null, which has no order"),
            ({"day": "2024-02-30"}, "no such date"),
            ({"day": "2024-01-31T10:00"}, "ISO 8601 date"),
            ({"at": "2024-01-31T12:00:00+08:00"}, "no time zone"),
            ({"at": "2024-01-31T12:00:00.0000001"}, "finer digits"),
            ({"cost": 1.005}, "2 decimal places"),
            ({"price": float("nan")}, "NaN and infinity"),
            ({"year": 10**400}, "bits"),
            ({"blob": "x"}, "bytes as a base64 string"),
            ({"cost": "1,5"}, "as digits"),
            ({"cost": "1e99999"}, "as digits"),
            ({"cost": "NaN"}, "as digits"),
            (
                {"cost": 0.30000000000000004},
                "keeps 15 digits, and this one has lost some; write it as a string",
            ),
            ({"price": "0.5"}, "or one of"),
            ({"metadata.lang": ["zh"]}, r"'\$in'"),
            ({"metadata": "x"}, "cannot be compared with anything"),
            ({"metadata.nope": "x"}, "no column 'metadata.nope'"),
            ({"price": True}, "takes a number"),
            ({"cost": False}, "takes a number"),
            ({"price": 2**53 + 1}, "not exact in double, whose nearest value is 9007199254740992"),
            ({"weight": 16_777_217}, "not exact in float, whose nearest value is 16777216"),
            ({"weight": 1e39}, "beyond the range of float"),
            ({"weight": 10**39}, "beyond the range of float"),
            ({"lang": 1}, "takes a string"),
            ({"day": 5}, "ISO 8601 date"),
            ({"at": 5}, "ISO 8601 time"),
            ({"at": "2024-01-31T25:00"}, "no such date or time"),
            ({"seen": "2024-01-31T12:00:00.0005"}, "counts in ms"),
            ({"year": "x" * 200}, '"x{79}…'),
            ({}, "is empty"),
            ({"lang": {}}, "filter.lang is empty"),
            ([], "must be an object"),
            ({1: "x"}, "keys of a filter are strings"),
            ({"$or": {"lang": "zh"}}, "a list of one or more filters"),
            ({"$and": [{"lang": "zh"}, {"year": "x"}]}, r"filter\.\$and\[1\]\.year"),
            ({"metadata": {"n": "x"}}, r"filter\.metadata\.n: column 'metadata\.n'"),
            ({"year": {"$in": [1, "x"]}}, r"filter\.year\.\$in\[1\]"),
            ({"lang": "\ud800"}, "valid Unicode"),
        ],
    )
    def test_what_does_not_fit(self, index: Index, condition: Any, message: str) -> None:
        with pytest.raises(InputError, match=message):
            to_sql(condition, index.table.schema)

    def test_bounds(self, index: Index) -> None:
        schema, limits = index.table.schema, FilterLimits(depth=3, conditions=4, members=5)
        deep: dict[str, Any] = {"lang": "zh"}
        for _ in range(4):
            deep = {"$not": deep}
        with pytest.raises(InputError, match="nested more than 3 filters"):
            to_sql(deep, schema, limits)
        to_sql(deep["$not"], schema, limits)
        wide = {"$or": [{"lang": "a"}, {"year": {"$gt": 1, "$lt": 9}}, {"metadata": {"lang": "a", "n": 1}}]}
        with pytest.raises(InputError, match="the filter has 5 conditions or more; at most 4 are taken"):
            to_sql(wide, schema, limits)
        to_sql({"$or": wide["$or"][:2]}, schema, limits)
        lists = {"year": {"$in": [1, 2, 3]}, "small": {"$in": [4, 5, 6]}}
        with pytest.raises(
            InputError, match="the filter has 6 members in its lists or more; at most 5 are taken"
        ):
            to_sql(lists, schema, limits)
        to_sql({"year": {"$in": [1, 2, 3]}}, schema, limits)

    def test_a_bomb_is_refused_before_it_is_looked_at(self, index: Index) -> None:
        """381,300 conditions are what a body of 4 MiB holds."""
        with pytest.raises(
            InputError, match="the filter has 381,300 conditions or more; at most 256 are taken"
        ):
            to_sql({"$or": [{"no such column": 1}] * 381_300}, index.table.schema)
        bottomless: dict[str, Any] = {}
        bottomless["$not"] = bottomless
        with pytest.raises(InputError, match="nested more than 16"):
            to_sql(bottomless, index.table.schema)

    def test_the_largest_that_is_taken_is_evaluated(self, index: Index) -> None:
        limits = FilterLimits()
        most = {"$or": [{"lang": str(number)} for number in range(limits.conditions - 1)] + [{"lang": "zh"}]}
        assert matching(index, most) == [0]
        assert matching(index, {"year": {"$in": list(range(limits.members))}}) == [0, 1, 3]

    def test_sql_that_does_not_fit(self, index: Index) -> None:
        with pytest.raises(InputError, match="No field named nope"):
            index.search(unit_vectors(1), 3, filter="nope = 1")
        with pytest.raises(InputError, match="cannot be evaluated"):
            index.search(unit_vectors(1), 3, filter="year = ")

    @pytest.mark.parametrize("name", ["nothing", "metadata"])
    def test_columns_without_an_order_get_no_index(self, index: Index, name: str) -> None:
        with pytest.raises(InputError, match=f"column '{name}' of type .* has no index"):
            refuse_unindexable(index.table.schema, [name])

    def test_values_that_are_set(self, index: Index) -> None:
        assert sql_literal(index.table.schema.field("year"), None, "x") == "NULL"
        with pytest.raises(InputError, match="beyond the range"):
            sql_literal(index.table.schema.field("small"), 300, "x")
        tags = index.table.schema.field("tags")
        assert sql_literal(tags, ["a", "b'"], "x") == "arrow_cast(make_array('a', 'b'''), 'List(Utf8)')"
        assert sql_literal(tags, [], "x") == "arrow_cast(make_array(), 'List(Utf8)')"
        with pytest.raises(InputError, match=r"holds lists .*: give a list"):
            sql_literal(tags, "a", "x")
        with pytest.raises(InputError, match=r"x\[1\].* cannot be compared with 2"):
            sql_literal(tags, ["a", 2], "x")
        days = pa.field("days", pa.list_(pa.date32()))
        assert sql_literal(days, ["2024-01-31"], "x") == "make_array(DATE '2024-01-31')"
        with pytest.raises(InputError, match="empty list of date32"):
            sql_literal(days, [], "x")

    def test_names_that_read_like_something_else(self) -> None:
        """A name with a dot comes before the member of an object, one with a dollar sign before an operator."""
        inner = pa.struct([("b", pa.int64())])
        schema = pa.schema(
            [("a", inner), ("a.b", pa.int64()), ("$eq", pa.int64()), ("back`tick", pa.int64())]
        )
        assert to_sql({"a.b": 1}, schema) == "`a.b` IN (1)"
        assert to_sql({"a": {"b": 1}}, schema) == "`a.b` IN (1)"
        assert to_sql({"$eq": 1}, schema) == "`$eq` IN (1)"
        assert to_sql({"back`tick": 1}, schema) == "`back``tick` IN (1)"
        assert to_sql({"a.b": 1}, pa.schema([("a", inner)])) == "`a`.`b` IN (1)"


def test_filters_apply_before_ranking_over_shards_and_what_was_added(tmp_path: Path) -> None:
    vectors = unit_vectors(2000, 16)
    columns = {"number": pa.array(range(2000))}
    for placement, kind in (("rows", "hnsw"), ("cluster", "flat"), ("cluster", "ivf_flat")):
        folder = tmp_path / f"{placement}-{kind}"
        embeddings = write_embeddings(
            folder / "e", [str(row) for row in range(2000)], vectors, columns=columns
        )
        build(folder / "index", embeddings, kind=kind, shards=4, placement=placement, target={"recall": 0.99})
        index = Index.open(folder / "index")
        queries = unit_vectors(50, 16, seed=9)
        for share, condition in (
            (1000, {"number": {"$lt": 1000}}),
            (20, {"number": {"$lt": 20}}),
            (1, {"number": 7}),
        ):
            hits = index.search(queries, 10, filter=condition)
            allowed = np.arange(7, 8) if share == 1 else np.arange(share)
            exact = allowed[np.argsort(-(queries @ vectors[allowed].T), axis=1)[:, :10]]
            right = sum(
                len(set(found) & set(best))
                for found, best in zip(hits.rows.tolist(), exact.tolist(), strict=True)
            )
            assert right / exact.size >= 0.98
