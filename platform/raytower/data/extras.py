"""Columns that a corpus passes through: one name and one type for each over all files, and tables made to that schema.

The values decide the type, never what a file declares. A column without values takes any type. Whole numbers become
floats, or floats whole numbers, only if no value changes.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Set
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raytower.data.columns import cast_exactly, parents
from raytower.data.row_batch import Column, RowBatch, mask_of
from raytower.data.sources import SourceFile
from raytower.errors import InputError

MAX_COLUMNS = 1000
"""Most columns, members of objects counted. More mean that keys are data (user ids, say); each would be a column."""
# Columns of the embeddings, and of the index's table.
_OWN_NAMES = ("id", "text", "embedding", "row", "vector", "tokens")
_UNSTORABLE = re.compile("[.`\0]")  # a dot leads to a member of an object, a backtick quotes a name

_EXACT_IN_FLOAT = 2**53
_INT64_MAX = 2**63 - 1
_NS_RANGE_IN_US = (-(2**63) // 1000 + 1, _INT64_MAX // 1000)

Trait: TypeAlias = str | pa.DataType
"""A property of values that their type must suit, such as `fraction`; for decimals, their Arrow type."""
_WORDS = {
    "long": "integers beyond 2^53",
    "unsigned": "integers beyond 2^63",
    "negative": "numbers below zero",
    "fraction": "numbers with a fraction",
    "instant": "timestamp with a time zone",
    "nanoseconds": "times to the nanosecond",
    "far": "times before 1678 or after 2261",
}
_INTEGERS = {"int64", "long", "negative", "unsigned"}
_FLOATS = {"float32", "float64", "fraction"}
_PRECISIONS = {"nanoseconds", "far"}
_LONE: dict[Trait, pa.DataType] = {
    "bool": pa.bool_(), "string": pa.string(), "date": pa.date32(), "struct": pa.struct([]), "list": pa.list_(pa.null())
}  # fmt: skip
_BASES: dict[int, Trait] = {kind.id: trait for trait, kind in _LONE.items()} | {
    pa.date64().id: "date", pa.int64().id: "int64", pa.uint64().id: "int64", pa.float32().id: "float32",
    pa.float64().id: "float64",
}  # fmt: skip
_OF_PYTHON: dict[object, pa.DataType] = {
    bool: pa.bool_(), int: pa.int64(), "large": pa.uint64(), float: pa.float64(), str: pa.string()
}  # fmt: skip


def stored_name(name: str) -> str:
    """The name under which a column passes through: its own, unless the index uses that itself or cannot store it."""
    storable = _UNSTORABLE.sub("_", name) or "unnamed"
    return f"source_{storable}" if storable in _OWN_NAMES or storable.startswith("_row") else storable


def refuse_too_many(columns: int, file: SourceFile) -> None:
    """Raise InputError where a corpus has more columns, members of objects counted, than can be stored."""
    if columns > MAX_COLUMNS:
        raise InputError(
            f"{file}: the corpus has more than {MAX_COLUMNS} columns, members of objects counted; where keys are data, "
            "write the object as a string of JSON"
        )


class ExtraTypes:
    """Learns what type each passed-through column has, from the values in all rows of all files."""

    def __init__(self) -> None:
        self._columns: dict[str, _Seen] = {}
        self._originals: dict[str, str] = {}

    def observe(self, batch: RowBatch, file: SourceFile) -> None:
        """Take in the good rows of one chunk.

        Raises:
            InputError: values that have no type in common with those of earlier rows, two columns that would get one
                name, or too many columns.
        """
        for original, column in batch.extra.items():
            name = stored_name(original)
            other = self._originals.setdefault(name, original)
            if other != original:
                raise InputError(
                    f"{file}: columns {other!r} and {original!r} would both pass through as {name!r}; rename one of "
                    f"them ({', '.join(_OWN_NAMES)} are names of the index's own)"
                )
            seen = self._columns.setdefault(name, _Seen(original))
            seen.observe(column, batch.lines, file)
        refuse_too_many(sum(seen.count for seen in self._columns.values()), file)

    @property
    def renamed(self) -> dict[str, str]:
        """Own name → stored name of the columns that pass through under another name."""
        return {original: name for name, original in self._originals.items() if name != original}

    def schema(self, own: pa.Schema) -> pa.Schema:
        """The full schema of tables: the columns `own` of their kind, then the passed-through ones as first seen."""
        extra = [pa.field(name, seen.type) for name, seen in self._columns.items()]
        return pa.schema([*own, *extra])


def build_table(batch: RowBatch, schema: pa.Schema) -> pa.Table:
    """The rows of `batch` as a table of exactly `schema`; columns that the batch lacks are null."""
    extra = {stored_name(name): column for name, column in batch.extra.items()}
    columns = [
        batch.columns[field.name]
        if field.name in batch.columns
        else _of_type(extra.get(field.name, pa.nulls(len(batch.lines))), field.type)
        for field in schema
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def _of_type(column: Column, kind: pa.DataType) -> pa.Array:
    if isinstance(column, pa.Array):
        return cast_exactly(column, kind)
    if pa.types.is_null(kind):
        return pa.nulls(len(column))
    return pa.array(column, kind, from_pandas=True)  # NaN, which Python's JSON reads, becomes null


class _Seen:
    """The traits seen in a column, a member of its objects or the elements of its lists, each with its first line."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._traits: dict[Trait, str] = {}
        self._declared: set[Trait] = set()
        """Traits of the declared types of columns without values."""
        self._members: dict[str | None, _Seen] = {}
        """Members of objects by key; elements of lists under None."""

    @property
    def count(self) -> int:
        return 1 + sum(member.count for member in self._members.values())

    @property
    def type(self) -> pa.DataType:
        kind = _unified(self._traits.keys() or self._declared)
        if kind is None:
            return pa.null()
        if pa.types.is_list(kind):
            return pa.list_(self._members[None].type if None in self._members else pa.null())
        if pa.types.is_struct(kind):
            members = [(name, member.type) for name, member in self._members.items() if name is not None]
            return pa.struct(members) if members else pa.null()  # Parquet has no object without members
        return kind

    def observe(self, values: Column, lines: np.ndarray, file: SourceFile) -> None:
        """Take in values with the line of each. Raises InputError where no type holds these and earlier ones."""
        groups = _alike(values, lines) if isinstance(values, list) else [(values, lines)]
        shown: list[tuple[int, Trait]] = []
        for same, places in groups:
            base = _base_trait(same)
            if base is not None and isinstance(same, pa.Array) and same.null_count == len(same):
                self._declared.add(base)
            for trait, shows in _traits(same, base):
                if trait not in self._traits and (mask := mask_of(shows)).any():
                    shown.append((int(places[np.argmax(mask)]), trait))
        for line, trait in sorted(shown, key=lambda item: item[0]):
            self._add(trait, file, line)
        for same, places in groups:
            for key, inner, inner_lines in _members(same, places):
                self._member(key).observe(inner, inner_lines, file)

    def _member(self, key: str | None) -> _Seen:
        if key not in self._members:
            self._members[key] = _Seen(f"{self._name}[]" if key is None else f"{self._name}.{key}")
        return self._members[key]

    def _add(self, trait: Trait, file: SourceFile, line: int) -> None:
        for other, place in self._traits.items():
            if _unified({trait, other}) is None:
                raise InputError(
                    f"{file}:{line}: column {self._name!r} holds {_WORDS.get(str(trait), trait)}, but "
                    f"{_WORDS.get(str(other), other)} at {place}; give it one type in all rows of all files"
                )
        self._traits[trait] = f"{file}:{line}"


def _unified(traits: Set[Trait]) -> pa.DataType | None:
    """The type that holds all values with these traits unchanged; None if there is no such type, or no trait.

    If traits have no such type, then some two of them have none either, so an error can name the two.
    """
    if len(traits) == 1 and (lone := _LONE.get(next(iter(traits)))) is not None:
        return lone
    decimals = [trait for trait in traits if isinstance(trait, pa.DataType)]
    if not traits:
        return None
    if traits <= _INTEGERS:
        if "unsigned" in traits:
            return None if "negative" in traits else pa.uint64()
        return pa.int64()
    if traits <= _INTEGERS | _FLOATS:
        if traits & {"long", "unsigned"}:
            return None if "fraction" in traits else _unified(traits & _INTEGERS)
        return pa.float64() if traits & {"int64", "float64"} else pa.float32()
    if decimals and traits <= _INTEGERS | set(decimals):
        digits = [kind.precision - kind.scale for kind in decimals]
        digits += [size for trait, size in (("int64", 16), ("long", 19), ("unsigned", 20)) if trait in traits]
        scale = max(0, *(kind.scale for kind in decimals))
        return pa.decimal128(max(digits) + scale, scale) if max(digits) + scale <= 38 else None
    if traits <= _PRECISIONS | {"timestamp"} or traits <= _PRECISIONS | {"instant"}:
        unit = "ns" if "nanoseconds" in traits else "us"
        return None if traits >= _PRECISIONS else pa.timestamp(unit, "UTC" if "instant" in traits else None)
    return None


def _alike(values: list[Any], lines: np.ndarray) -> list[tuple[Column, np.ndarray]]:
    """JSON values grouped by their Python type, scalars as Arrow; null and NaN are left out."""
    groups: dict[object, tuple[list[Any], list[int]]] = {}
    for value, line in zip(values, lines.tolist(), strict=True):
        if value is not None and value == value:  # NaN differs from itself
            kind = type(value)
            same, places = groups.setdefault(
                "large" if kind is int and value > _INT64_MAX else kind, ([], [])
            )
            same.append(value)
            places.append(line)
    return [
        (pa.array(same, _OF_PYTHON[kind]) if kind in _OF_PYTHON else same, np.array(places))
        for kind, (same, places) in groups.items()
    ]


def _members(values: Column, lines: np.ndarray) -> Iterator[tuple[str | None, Column, np.ndarray]]:
    """The members of objects by key, or the elements of lists under None, each with their lines."""
    if isinstance(values, list) and type(values[0]) is dict:
        for key in dict.fromkeys(itertools.chain.from_iterable(values)):
            yield key, [value.get(key) for value in values], lines
    elif isinstance(values, list):
        yield None, list(itertools.chain.from_iterable(values)), np.repeat(lines, list(map(len, values)))
    elif pa.types.is_struct(values.type):
        for member, child in zip(values.type, values.flatten(), strict=True):
            yield member.name, child, lines
    elif pa.types.is_list(values.type):
        yield None, values.flatten(), parents(values, lines)


def _base_trait(values: Column) -> Trait | None:
    if isinstance(values, list):
        return "struct" if type(values[0]) is dict else "list"
    if pa.types.is_decimal(values.type):
        return values.type
    if pa.types.is_timestamp(values.type):
        return "timestamp" if values.type.tz is None else "instant"
    return _BASES.get(values.type.id)


def _traits(values: Column, base: Trait | None) -> Iterator[tuple[Trait, pa.Array]]:
    """The traits that such values may have, each with the rows that show it."""
    if base is None:
        return
    if isinstance(values, list):
        yield base, pa.array([True])
        return
    yield base, values.is_valid()
    if base == "int64":
        yield "long", pc.greater(values, pa.scalar(_EXACT_IN_FLOAT, values.type))
        if pa.types.is_uint64(values.type):
            yield "unsigned", pc.greater(values, pa.scalar(_INT64_MAX, values.type))
        else:
            yield "long", pc.less(values, -_EXACT_IN_FLOAT)
            yield "negative", pc.less(values, 0)
    elif base in ("float32", "float64"):
        is_exact = pc.less_equal(pc.abs(values), float(_EXACT_IN_FLOAT))
        yield "fraction", pc.invert(pc.and_(pc.equal(values, pc.floor(values)), is_exact))
        yield "negative", pc.less(values, 0)
    elif base in ("timestamp", "instant") and values.type.unit == "ns":
        ticks = values.cast(pa.int64())
        yield "nanoseconds", pc.not_equal(pc.multiply(pc.divide(ticks, 1000), 1000), ticks)
    elif base in ("timestamp", "instant"):
        ticks = values.cast(pa.timestamp("us", values.type.tz)).cast(pa.int64())
        first, last = _NS_RANGE_IN_US
        yield "far", pc.or_(pc.less(ticks, first), pc.greater(ticks, last))
