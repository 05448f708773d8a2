"""Filters: a JSON condition on the metadata columns of documents, evaluated into a mask of the rows that match.

    {"lang": "zh"}                                   equals
    {"year": {"$gte": 2000, "$lt": 2010}}            several conditions in one object mean and
    {"$or": [{"lang": {"$in": ["zh", "en"]}}, {"$not": {"year": {"$lt": 1990}}}]}

Operators of a column: $eq $ne $gt $gte $lt $lte $in $nin. Operators of filters: $and and $or take a list of one or more
filters, $not takes one. The grammar is that of MongoDB, Pinecone and Chroma.

A comparison is false where the value is null. $ne, $nin and $not are the plain negation of $eq, $in and a filter, so
they hold where the value is null. A null literal asks for null itself: {"x": null} is null, {"x": {"$ne": null}} is not
null, and null in a list of $in or $nin adds null to it.

How literals meet columns:
    integers      integers, also floats without a fraction. A literal beyond the column's range compares as a number.
    floats        numbers; a float is rounded to the column's width, an integer must be exact in it. A stored NaN equals
                  nothing and is no null.
    decimals      numbers, by the digits written, which must fit the column's scale.
    strings       strings; order is that of code points.
    booleans      true and false; $eq, $ne, $in and $nin only.
    dates         ISO 8601 strings: "2024-01-31".
    timestamps    ISO 8601 strings: "2024-01-31", "2024-01-31T12:00:00.5", "2024-01-31T12:00:00+08:00". Without an
                  offset the time is UTC where the column has a time zone; an offset is refused where it has none.
    lists         $eq means that the list contains the value, $in that it contains one of them, as in MongoDB; $ne and
                  $nin are their negation. There is no order on lists.
Dictionary-encoded columns compare as their values. Other types can only be asked whether they are null.
"""

from __future__ import annotations

import datetime
import decimal
import difflib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from raytower.errors import FormatError, InputError

Mask = NDArray[np.bool_]
_Columns = Mapping[str, pa.Array]
MAX_DEPTH = 32
EMBEDDING_COLUMN = "embedding"
# Rows evaluated at once: the masks and offsets in flight stay small however large the record batches are.
_ROWS_AT_ONCE = 1 << 17
# Beyond every float; Python writes no decimal digits of far larger integers.
_MAX_BITS = 1024
_ORDERS = {"$gt": "greater", "$gte": "greater_equal", "$lt": "less", "$lte": "less_equal"}
_COLUMN_OPERATORS = ("$eq", "$ne", *_ORDERS, "$in", "$nin")
_FILTER_OPERATORS = ("$and", "$or", "$not")
_INSTANT = re.compile(
    r"(?P<date>[0-9]{4}-[0-9]{2}-[0-9]{2})"
    r"(?:[Tt ](?P<hour>[0-9]{2}):(?P<minute>[0-9]{2})(?::(?P<second>[0-9]{2})(?:[.,](?P<fraction>[0-9]{1,9}))?)?"
    r"(?P<offset>[Zz]|[+-][0-9]{2}(?::?[0-9]{2})?)?)?"
)
_NANOSECONDS = {"s": 10**9, "ms": 10**6, "us": 10**3, "ns": 1}


@dataclass(frozen=True)
class Filter:
    """A parsed filter. Two filters with equal keys over equal columns match the same rows."""

    key: str  # canonical JSON
    columns: tuple[pa.Field, ...]  # what it reads
    _condition: _Condition = field(compare=False, repr=False)

    def mask(self, table: pa.Table) -> Mask:
        """Which rows of `table` match, (rows,). Reads record batch by record batch and copies no column whole.

        A column that the table lacks is null in every row. One of a narrower type than the schema's, as a shard that
        was added later may have, is widened batch by batch.

        Raises:
            FormatError: a column does not fit the type that the filter was made for.
        """
        present = [column for column in self.columns if column.name in table.schema.names]
        mask = np.zeros(table.num_rows, np.bool_)
        if not present:
            mask[:] = self._condition.mask({column.name: pa.nulls(1, column.type) for column in self.columns})
            return mask
        start = 0
        for batch in table.select([column.name for column in present]).to_batches(_ROWS_AT_ONCE):
            mask[start : start + batch.num_rows] = self._condition.mask(_conformed(batch, self.columns))
            start += batch.num_rows
        return mask


def parse_filter(value: object, schema: pa.Schema) -> Filter:
    """A filter over the columns of `schema`, all but the embedding, from decoded JSON.

    Raises:
        InputError: an unknown column or operator, a wrong shape, a literal that does not fit its column, NaN or
            infinity, or filters nested more than 32 deep; the message names the place.
    """
    parser = _Parser(schema)
    condition = parser.filter(value, "filter", 0)
    key = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return Filter(key, tuple(schema.field(name) for name in sorted(parser.used)), condition)


def _conformed(batch: pa.RecordBatch, columns: tuple[pa.Field, ...]) -> dict[str, pa.Array]:
    """The columns with the types that the filter was made for."""
    arrays = {}
    for column in columns:
        if column.name not in batch.schema.names:
            arrays[column.name] = pa.nulls(batch.num_rows, column.type)
            continue
        array = batch.column(column.name)
        try:
            arrays[column.name] = array if _fits(array.type, column.type) else array.cast(column.type)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise FormatError(
                f"column {column.name!r} of the documents is {array.type}, which does not become {column.type} as the "
                f"filter needs: {error}; build the index again"
            ) from error
    return arrays


def _fits(found: pa.DataType, wanted: pa.DataType) -> bool:
    if pa.types.is_dictionary(found) and pa.types.is_dictionary(wanted):
        return found.value_type == wanted.value_type  # a test never looks at the type of the indices
    return found == wanted


# Conditions on rows


class _Condition(Protocol):
    def mask(self, columns: _Columns) -> Mask: ...


@dataclass(frozen=True)
class _OnColumn:
    name: str
    test: _Test

    def mask(self, columns: _Columns) -> Mask:
        return self.test.mask(columns[self.name])


@dataclass(frozen=True)
class _All:
    parts: tuple[_Condition, ...]

    def mask(self, columns: _Columns) -> Mask:
        return np.logical_and.reduce([part.mask(columns) for part in self.parts])


@dataclass(frozen=True)
class _Any:
    parts: tuple[_Condition, ...]

    def mask(self, columns: _Columns) -> Mask:
        return np.logical_or.reduce([part.mask(columns) for part in self.parts])


@dataclass(frozen=True)
class _Negated:
    part: _Condition

    def mask(self, columns: _Columns) -> Mask:
        return ~self.part.mask(columns)


# Tests of a column's values; each is false where the value is null, _IsNull aside


class _Test(Protocol):
    def mask(self, array: pa.Array) -> Mask: ...


@dataclass(frozen=True)
class _IsNull:
    def mask(self, array: pa.Array) -> Mask:
        return _to_mask(pc.is_null(array))


@dataclass(frozen=True)
class _Always:
    """The same answer for every value, as for a literal that no value of the column's type can equal."""

    answer: bool

    def mask(self, array: pa.Array) -> Mask:
        return _to_mask(pc.is_valid(array)) & self.answer


@dataclass(frozen=True)
class _Compared:
    function: str  # of pyarrow.compute
    literal: pa.Scalar

    def mask(self, array: pa.Array) -> Mask:
        return _to_mask(pc.call_function(self.function, [_comparable(array), self.literal]))


@dataclass(frozen=True)
class _OneOf:
    literals: pa.Array

    def mask(self, array: pa.Array) -> Mask:
        return _to_mask(pc.is_in(_comparable(array), value_set=self.literals, skip_nulls=True))


@dataclass(frozen=True)
class _OrNull:
    test: _Test

    def mask(self, array: pa.Array) -> Mask:
        return self.test.mask(array) | _to_mask(pc.is_null(array))


@dataclass(frozen=True)
class _OfDictionary:
    """Tests each value of a dictionary once, then looks rows up by their index."""

    test: _Test

    def mask(self, array: pa.Array) -> Mask:
        if len(array.dictionary) > len(array):
            return self.test.mask(array.dictionary_decode())
        matches = np.append(self.test.mask(array.dictionary), False)  # the last entry is for null
        return matches[array.indices.cast(pa.int64()).fill_null(len(array.dictionary)).to_numpy()]


@dataclass(frozen=True)
class _Contains:
    test: _Test

    def mask(self, array: pa.Array) -> Mask:
        mask = np.zeros(len(array), np.bool_)
        parents = pc.list_parent_indices(array).to_numpy(zero_copy_only=False)
        mask[parents[self.test.mask(pc.list_flatten(array))]] = True
        return mask


def _to_mask(answers: pa.BooleanArray) -> Mask:
    return answers.fill_null(False).to_numpy(zero_copy_only=False)


def _comparable(array: pa.Array) -> pa.Array:
    comparable = _comparable_type(array.type)
    if comparable == array.type:
        return array
    return array.view(comparable) if pa.types.is_temporal(array.type) else array.cast(comparable)


def _comparable_type(kind: pa.DataType) -> pa.DataType:
    """What values of a type are compared as: moments as their counts, types without all kernels as wider ones."""
    if pa.types.is_date32(kind):
        return pa.int32()
    if pa.types.is_date64(kind) or pa.types.is_timestamp(kind):
        return pa.int64()
    if pa.types.is_float16(kind):
        return pa.float32()
    if pa.types.is_string_view(kind):
        return pa.large_string()
    if pa.types.is_decimal(kind) and kind.bit_width < 128:
        return pa.decimal128(kind.precision, kind.scale)
    return kind


# Parsing


class _Parser:
    """Turns JSON into conditions; `used` gathers the columns that they read."""

    def __init__(self, schema: pa.Schema) -> None:
        self.used: set[str] = set()
        self._schema = schema
        self._columns = [name for name in dict.fromkeys(schema.names) if name != EMBEDDING_COLUMN]

    def filter(self, value: object, where: str, depth: int) -> _Condition:
        if depth > MAX_DEPTH:
            raise InputError(
                f"{_shorten(where)} is nested more than {MAX_DEPTH} filters deep; flatten the filter"
            )
        parts: list[_Condition] = []
        for key, inner in _members(value, where).items():
            place = f"{where}.{key}"
            if key == "$not":
                parts.append(_Negated(self.filter(inner, place, depth + 1)))
            elif key in _FILTER_OPERATORS:
                if not isinstance(inner, list) or not inner:
                    raise InputError(f"{place} is {_shown(inner)}; it takes a list of one or more filters")
                members = tuple(
                    self.filter(item, f"{place}[{number}]", depth + 1) for number, item in enumerate(inner)
                )
                parts.append(_All(members) if key == "$and" else _Any(members))
            elif key.startswith("$") and key not in self._columns:
                raise InputError(_unknown_operator(key, where, _FILTER_OPERATORS))
            else:
                parts.append(self._column(key, inner, place))
        return parts[0] if len(parts) == 1 else _All(tuple(parts))

    def _column(self, name: str, value: object, where: str) -> _Condition:
        column = self._field(name, where)
        if not isinstance(value, dict):
            return _condition(column, "$eq", value, where)
        parts: list[_Condition] = []
        for operator, literal in _members(value, where).items():
            if operator not in _COLUMN_OPERATORS:
                raise InputError(_unknown_operator(operator, where, _COLUMN_OPERATORS))
            parts.append(_condition(column, operator, literal, f"{where}.{operator}"))
        return parts[0] if len(parts) == 1 else _All(tuple(parts))

    def _field(self, name: str, where: str) -> pa.Field:
        if name not in self._columns:
            known = ", ".join(repr(column) for column in self._columns)
            nearest = difflib.get_close_matches(name, self._columns, n=1, cutoff=0.0)
            hint = f"the nearest is {nearest[0]!r}; " if nearest else ""
            raise InputError(f"{where}: there is no column {name!r}; {hint}columns are {known}")
        indices = self._schema.get_all_field_indices(name)
        if len(indices) > 1:
            raise InputError(
                f"{where}: {len(indices)} columns are named {name!r}; rename them and build again"
            )
        self.used.add(name)
        return self._schema.field(indices[0])


def _members(value: object, where: str) -> Mapping[str, object]:
    """The members of a JSON object that has some; raises InputError for anything else."""
    if not isinstance(value, dict):
        raise InputError(f"{where} is {_shown(value)}; it must be an object of columns or operators")
    if not value:
        raise InputError(f"{where} is empty; name a column or an operator in it, or leave the filter out")
    for key in value:
        if not isinstance(key, str):
            raise InputError(f"{where} has the key {_shown(key)}; keys of a filter are strings")
    return value


def _condition(column: pa.Field, operator: str, literal: object, where: str) -> _Condition:
    if operator in ("$in", "$nin"):
        test = _membership(column, literal, where)
    elif operator in _ORDERS:
        test = _ordering(column, operator, literal, where)
    else:
        test = _equality(column, literal, where)
    condition = _OnColumn(column.name, test)
    return _Negated(condition) if operator in ("$ne", "$nin") else condition


def _equality(column: pa.Field, value: object, where: str) -> _Test:
    if value is None:
        return _IsNull()
    if isinstance(value, list):
        raise InputError(f"{where} is {_shown(value)}; to match any of several values write {{'$in': [...]}}")
    return _wrapped(column.type, _compared(column, "equal", _literal(column, value, where)))


def _ordering(column: pa.Field, operator: str, value: object, where: str) -> _Test:
    element = _element_type(column.type)
    if _is_list(column.type) or pa.types.is_boolean(element):
        raise InputError(
            f"{where}: column {column.name!r} ({column.type}) has no order; use $eq, $ne, $in or $nin"
        )
    if value is None:
        raise InputError(
            f"{where} is null, which has no order; to ask for null write {{{column.name!r}: null}}"
        )
    return _wrapped(column.type, _compared(column, _ORDERS[operator], _literal(column, value, where)))


def _membership(column: pa.Field, values: object, where: str) -> _Test:
    if not isinstance(values, list):
        raise InputError(f"{where} is {_shown(values)}; it takes a list of values")
    literals = [
        _literal(column, value, f"{where}[{number}]")
        for number, value in enumerate(values)
        if value is not None
    ]
    # A column compares with no literal at all only when none is given, as in {"$in": [null]}.
    if not literals:
        test: _Test = _Always(False)
    else:
        inside = [literal.value for literal in literals if not literal.side]
        if pa.types.is_floating(_element_type(column.type)):
            # Sets of floats go by their bits, which differ for the two zeros.
            inside += [-value for value in inside if value == 0]
        comparable = _comparable_type(_element_type(column.type))
        test = _wrapped(column.type, _OneOf(pa.array(inside, comparable)))
    return _OrNull(test) if None in values else test


def _compared(column: pa.Field, function: str, literal: _Literal) -> _Test:
    if literal.side:
        return _Always(function.startswith("less" if literal.side > 0 else "greater"))
    return _Compared(function, pa.scalar(literal.value, _comparable_type(_element_type(column.type))))


def _is_list(kind: pa.DataType) -> bool:
    types = pa.types
    return any(
        is_kind(kind)
        for is_kind in (types.is_list, types.is_large_list, types.is_fixed_size_list, types.is_list_view)
    )


def _element_type(kind: pa.DataType) -> pa.DataType:
    """What a literal is compared with: the values of a dictionary, the members of a list."""
    if _is_list(kind):
        return kind.value_type.value_type if pa.types.is_dictionary(kind.value_type) else kind.value_type
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _wrapped(kind: pa.DataType, test: _Test) -> _Test:
    """A test of elements as a test of the column that holds them."""
    if _is_list(kind):
        return _Contains(_wrapped(kind.value_type, test))
    return _OfDictionary(test) if pa.types.is_dictionary(kind) else test


# Literals


@dataclass(frozen=True)
class _Literal:
    """A literal in the comparable type of its column, or the side on which it lies beyond that type's range."""

    value: Any
    side: int = 0  # -1 below every value of the type, 1 above


class _Misfit(Exception):
    """A literal does not fit its column; the message says what does."""


def _literal(column: pa.Field, value: object, where: str) -> _Literal:
    kind = _element_type(column.type)
    parse = next((parse for is_kind, parse in _PARSERS if is_kind(kind)), None)
    if parse is None:
        raise InputError(
            f"{where}: column {column.name!r} ({column.type}) cannot be compared with anything; a filter can only ask "
            "whether it is null"
        )
    try:
        if isinstance(value, float) and not math.isfinite(value):
            raise _Misfit("NaN and infinity are no JSON numbers; to ask for missing values write null")
        if isinstance(value, int) and value.bit_length() > _MAX_BITS:
            raise _Misfit(f"integers have at most {_MAX_BITS} bits")
        return parse(value, kind)
    except _Misfit as misfit:
        raise InputError(
            f"{where}: column {column.name!r} ({column.type}) cannot be compared with {_shown(value)}: {misfit}"
        ) from misfit


def _boolean(value: object, kind: pa.DataType) -> _Literal:
    if not isinstance(value, bool):
        raise _Misfit("it takes true or false")
    return _Literal(value)


def _integer(value: object, kind: pa.DataType) -> _Literal:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _Misfit("it takes an integer")
    if value != int(value):
        raise _Misfit("it takes an integer, and this number has a fraction")
    return _in_range(int(value), kind)


def _in_range(value: int, kind: pa.DataType) -> _Literal:
    bounds = np.iinfo(kind.to_pandas_dtype())
    return _Literal(value, -1 if value < bounds.min else int(value > bounds.max))


def _float(value: object, kind: pa.DataType) -> _Literal:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _Misfit("it takes a number")
    with np.errstate(over="ignore"):
        rounded = kind.to_pandas_dtype()(_to_float(value))
    if not np.isfinite(rounded):
        raise _Misfit(f"it is beyond the range of {kind}")
    if isinstance(value, int) and int(rounded) != value:
        raise _Misfit(f"this integer is not exact in {kind}, whose nearest value is {int(rounded)}")
    return _Literal(float(rounded))


def _to_float(value: int | float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _decimal(value: object, kind: pa.DataType) -> _Literal:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _Misfit("it takes a number")
    # The digits that were written, not those of the nearest binary fraction.
    exact = decimal.Decimal(value) if isinstance(value, int) else decimal.Decimal(repr(float(value)))
    with decimal.localcontext(prec=_MAX_BITS):
        units = exact.scaleb(kind.scale)
        if units != units.to_integral_value():
            raise _Misfit(f"it takes a number of at most {kind.scale} decimal places")
        largest = 10**kind.precision
        return _Literal(exact, -1 if units <= -largest else int(units >= largest))


def _string(value: object, kind: pa.DataType) -> _Literal:
    if not isinstance(value, str):
        raise _Misfit("it takes a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _Misfit(f"it takes a string of valid Unicode: {error.reason}") from error
    return _Literal(value)


def _date(value: object, kind: pa.DataType) -> _Literal:
    match = _INSTANT.fullmatch(value) if isinstance(value, str) else None
    if match is None or match["hour"]:
        raise _Misfit('it takes an ISO 8601 date such as "2024-01-31"')
    days = _days(match["date"])
    return _in_range(days if pa.types.is_date32(kind) else days * 86_400_000, _comparable_type(kind))


def _timestamp(value: object, kind: pa.DataType) -> _Literal:
    match = _INSTANT.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise _Misfit('it takes an ISO 8601 time such as "2024-01-31T12:00:00" or "2024-01-31"')
    if match["offset"] and kind.tz is None:
        raise _Misfit("the column has no time zone; write the time without an offset")
    hour, minute, second = (int(match[name] or 0) for name in ("hour", "minute", "second"))
    if hour > 23 or minute > 59 or second > 59:
        raise _Misfit("it takes hours to 23, minutes to 59 and seconds to 59")
    seconds = _days(match["date"]) * 86_400 + hour * 3600 + minute * 60 + second - _offset(match["offset"])
    nanoseconds = seconds * 10**9 + int((match["fraction"] or "").ljust(9, "0"))
    count, finer = divmod(nanoseconds, _NANOSECONDS[kind.unit])
    if finer:
        raise _Misfit(f"the column counts in {kind.unit}; leave out the finer digits")
    return _in_range(count, pa.int64())


def _days(text: str) -> int:
    """Days since 1970-01-01."""
    try:
        return (datetime.date.fromisoformat(text) - datetime.date(1970, 1, 1)).days
    except ValueError as error:
        raise _Misfit(f"there is no such date: {error}") from error


def _offset(text: str | None) -> int:
    """Seconds east of UTC."""
    if text is None or text in "Zz":
        return 0
    hours, minutes = int(text[1:3]), int(text[3:].lstrip(":") or 0)
    if hours > 23 or minutes > 59:
        raise _Misfit("offsets go to 23:59")
    return (hours * 3600 + minutes * 60) * (-1 if text[0] == "-" else 1)


_PARSERS = (
    (pa.types.is_boolean, _boolean),
    (pa.types.is_integer, _integer),
    (pa.types.is_floating, _float),
    (pa.types.is_decimal, _decimal),
    (pa.types.is_string, _string),
    (pa.types.is_large_string, _string),
    (pa.types.is_string_view, _string),
    (pa.types.is_date, _date),
    (pa.types.is_timestamp, _timestamp),
)


# Messages


def _unknown_operator(name: str, where: str, known: tuple[str, ...]) -> str:
    elsewhere = _FILTER_OPERATORS if known is _COLUMN_OPERATORS else _COLUMN_OPERATORS
    if name in elsewhere:
        rule = (
            "stands inside a column"
            if name in _COLUMN_OPERATORS
            else "holds filters and stands outside columns"
        )
        return f"{where}: {name!r} {rule}; here stand {', '.join(known)}"
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
    return (
        f"{where}: there is no operator {name!r}; the nearest is {nearest!r}; here stand {', '.join(known)}"
    )


def _shown(value: object) -> str:
    """A value as JSON, cut to a line."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        text = f"a {type(value).__name__} that is no JSON"
    return _shorten(text)


def _shorten(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else text[:limit] + "…"
