"""Filters: a JSON condition on the columns of documents, turned into the SQL that the table evaluates.

    {"lang": "zh"}                                   equals
    {"year": {"$gte": 2000, "$lt": 2010}}            several conditions in one object mean and
    {"$or": [{"lang": {"$in": ["zh", "en"]}}, {"$not": {"year": {"$lt": 1990}}}]}
    {"metadata.lang": "zh"}                          a member of a column that holds objects

Operators of a column: $eq $ne $gt $gte $lt $lte $in $nin. Operators of filters: $and and $or take a list of one or more
filters, $not takes one. The grammar is that of MongoDB, Pinecone and Chroma.

Null and NaN follow SQL. No comparison holds where the value is null, $ne, $nin and $not of a comparison included.
A null literal asks for null itself: {"x": null} is null, {"x": {"$ne": null}} is not null, and null in a list of
$in adds null to it, null in a list of $nin takes null out, as it is out anyway. NaN equals itself and is greater
than any number.

How literals meet columns; what `json_values` shows of a document can be sent back and finds it:
    integers      integers, also floats without a fraction. A literal beyond the column's range compares as a number.
    floats        numbers; a float is rounded to the column's width, an integer must be exact in it. The strings "NaN",
                  "Infinity" and "-Infinity" are those values.
    decimals      strings of digits, "32.90", or numbers, which must fit the column's scale. A float keeps 15 digits of
                  what was written, so that one with more is refused.
    strings       strings; order is that of code points.
    booleans      true and false; $eq, $ne, $in and $nin only.
    bytes         base64 strings.
    dates         ISO 8601 strings: "2024-01-31".
    times         ISO 8601 strings: "12:00", "12:00:00.5".
    timestamps    ISO 8601 strings: "2024-01-31", "2024-01-31T12:00:00.5", "2024-01-31T12:00:00+08:00". Without an
                  offset the time is UTC where the column has a time zone; an offset is refused where it has none.
    durations     ISO 8601 strings in seconds: "PT3723.5S", "-PT1S".
    lists         $eq means that the list contains the value, or equals a list; $in that it contains one of them, as in
                  MongoDB; $ne and $nin are their negation. There is no order on lists.
Other types can only be asked whether they are null.
"""

from __future__ import annotations

import base64
import binascii
import datetime
import decimal
import difflib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pyarrow as pa

from raytower.errors import InputError
from raytower.index.json_values import UNIT_DIGITS

# Beyond every float; Python writes no decimal digits of far larger integers.
_MAX_BITS = 1024
_ORDERS = {"$gt": ">", "$gte": ">=", "$lt": "<", "$lte": "<="}
_COLUMN_OPERATORS = ("$eq", "$ne", *_ORDERS, "$in", "$nin")
_FILTER_OPERATORS = ("$and", "$or", "$not")
_INSTANT = re.compile(
    r"(?P<date>[0-9]{4}-[0-9]{2}-[0-9]{2})"
    r"(?:[Tt ](?P<time>[0-9]{2}:[0-9]{2}(?::[0-9]{2}(?:[.,](?P<fraction>[0-9]{1,9}))?)?)"
    r"(?P<offset>[Zz]|[+-][0-9]{2}(?::?[0-5][0-9])?)?)?"
)
_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
# The years 1 to 9999, in seconds since 1970.
_FIRST_SECOND, _LAST_SECOND = -62_135_596_800, 253_402_300_799
_TIME = re.compile(r"([01][0-9]|2[0-3]):([0-5][0-9])(?::([0-5][0-9])(?:[.,]([0-9]{1,9}))?)?")
_DURATION = re.compile(r"(-?)PT([0-9]{1,19})(?:[.,]([0-9]{1,9}))?S")
_NUMBER = re.compile(r"[+-]?[0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]{1,4})?")
_NOT_FINITE = {"NaN": "NaN", "Infinity": "inf", "-Infinity": "-inf"}
# What DataFusion calls a unit in the name of a type.
_UNIT_NAMES = {"s": "Second", "ms": "Millisecond", "us": "Microsecond", "ns": "Nanosecond"}
# Digits that a float keeps of every number.
_FLOAT_DIGITS = 15


@dataclass(frozen=True, kw_only=True)
class FilterLimits:
    """How large a filter may be, before anything is evaluated. A condition costs a pass over its column."""

    depth: int = 16
    """Filters inside each other."""
    conditions: int = 256
    """Comparisons, one for each operator of a column."""
    members: int = 10_000
    """Members of all lists together."""


def to_sql(value: object, schema: pa.Schema, limits: FilterLimits | None = None) -> str:
    """A filter over the columns of `schema`, from decoded JSON, as an SQL condition.

    Decoded with `parse_float=decimal.Decimal`, numbers keep all their digits, which decimals may need.

    Raises:
        InputError: an unknown column or operator, a wrong shape, a literal that does not fit its column, NaN or
            infinity as a number, or more nesting, conditions or members than `limits`; the message names the place.
    """
    bounds = limits or FilterLimits()
    _check_size(value, bounds)
    return _Parser(schema, bounds).filter(value, "filter", 0)


def _check_size(value: object, limits: FilterLimits) -> None:
    """Raises InputError where a filter has too many conditions or members; what is nested too deep is the parser's.

    Counting ends at the limit: every part that waits to be looked at holds a condition, or is wrong.
    """
    conditions = members = 0
    waiting: list[tuple[object, int]] = [(value, 0)]
    while waiting:
        item, depth = waiting.pop()
        for key, inner in item.items() if isinstance(item, dict) and depth <= 2 * limits.depth + 1 else ():
            if key in ("$and", "$or") and isinstance(inner, list):
                _check_number("conditions", conditions + len(waiting) + len(inner), limits.conditions)
                waiting += [(member, depth + 1) for member in inner]
            elif isinstance(inner, dict):
                waiting.append((inner, depth + 1))
            else:
                conditions += 1
                members += len(inner) if isinstance(inner, list) else 0
        _check_number("conditions", conditions + len(waiting), limits.conditions)
        _check_number("members in its lists", members, limits.members)


def _check_number(what: str, number: int, limit: int) -> None:
    if number > limit:
        raise InputError(f"the filter has {number:,} {what} or more; at most {limit:,} are taken: give fewer")


# What DataFusion's arrow_cast calls the types of a list's members.
_ARROW_NAMES = {
    pa.string(): "Utf8",
    pa.bool_(): "Boolean",
    pa.int64(): "Int64",
    pa.int32(): "Int32",
    pa.float64(): "Float64",
    pa.float32(): "Float32",
}


def sql_literal(field: pa.Field, value: object, where: str) -> str:
    """A JSON value as an SQL literal of a column's type. Raises InputError where it does not fit."""
    if value is None:
        return "NULL"
    if pa.types.is_list(field.type) or pa.types.is_large_list(field.type):
        return _list_literal(field, value, where)
    literal = _literal(field, value, where)
    if isinstance(literal, int):
        raise InputError(
            f"{where} is {_shown(value)}, which is beyond the range of column {field.name!r} ({field.type})"
        )
    return literal


def _list_literal(field: pa.Field, value: object, where: str) -> str:
    if not isinstance(value, list):
        raise InputError(
            f"{where} is {_shown(value)}; column {field.name!r} holds lists ({field.type}): give a list"
        )
    member = pa.field(field.name, field.type.value_type)
    members = [sql_literal(member, item, f"{where}[{number}]") for number, item in enumerate(value)]
    # The cast gives an empty list its type.
    name = _ARROW_NAMES.get(member.type)
    if name is None and not members:
        raise InputError(f"{where} is an empty list of {member.type}; set it by a file of ids and values")
    array = f"make_array({', '.join(members)})"
    return array if name is None else f"arrow_cast({array}, 'List({name})')"


class _Parser:
    """Turns JSON into conditions."""

    def __init__(self, schema: pa.Schema, limits: FilterLimits) -> None:
        self._schema = schema
        self._limits = limits

    def filter(self, value: object, where: str, depth: int) -> str:
        if depth > self._limits.depth:
            raise InputError(
                f"{_shorten(where)} is nested more than {self._limits.depth} filters deep; flatten the filter"
            )
        parts: list[str] = []
        for key, inner in _members(value, where).items():
            place = f"{where}.{key}"
            if key == "$not":
                parts.append(f"NOT ({self.filter(inner, place, depth + 1)})")
            elif key in _FILTER_OPERATORS:
                if not isinstance(inner, list) or not inner:
                    raise InputError(f"{place} is {_shown(inner)}; it takes a list of one or more filters")
                members = [
                    self.filter(item, f"{place}[{number}]", depth + 1) for number, item in enumerate(inner)
                ]
                parts.append((" AND " if key == "$and" else " OR ").join(f"({member})" for member in members))
            elif key.startswith("$") and key not in self._schema.names:
                raise InputError(_unknown_operator(key, where, _FILTER_OPERATORS))
            else:
                parts.append(self._column(key, inner, place))
        return _all(parts)

    def _column(self, name: str, value: object, where: str) -> str:
        column, path = self._find(name, where)
        if not isinstance(value, dict):
            return self._condition(column, path, "$eq", value, where)
        if pa.types.is_struct(column.type) and not any(
            str(key).startswith("$") for key in _members(value, where)
        ):
            return _all(
                [self._column(f"{name}.{key}", inner, f"{where}.{key}") for key, inner in value.items()]
            )
        parts = []
        for operator, literal in _members(value, where).items():
            if operator not in _COLUMN_OPERATORS:
                raise InputError(_unknown_operator(operator, where, _COLUMN_OPERATORS))
            parts.append(self._condition(column, path, operator, literal, f"{where}.{operator}"))
        return _all(parts)

    def _find(self, name: str, where: str) -> tuple[pa.Field, str]:
        """A column, or a member of one that holds objects; and how SQL names it."""
        found = _member(self._schema, name)
        if found is not None:
            return found[0].with_name(name), found[1]
        known = ", ".join(repr(column) for column in self._schema.names)
        nearest = difflib.get_close_matches(name, self._schema.names, n=1, cutoff=0.0)
        hint = f"the nearest is {nearest[0]!r}; " if nearest else ""
        raise InputError(f"{where}: there is no column {name!r}; {hint}columns are {known}")

    def _condition(self, column: pa.Field, path: str, operator: str, literal: object, where: str) -> str:
        if operator in _ORDERS:
            return _ordering(column, path, operator, literal, where)
        if operator in ("$eq", "$ne"):
            if isinstance(literal, list) and _is_list(column.type):
                return f"{path} {'!=' if operator == '$ne' else '='} {_list_literal(column, literal, where)}"
            if isinstance(literal, list):
                raise InputError(
                    f"{where} is {_shown(literal)}; to match any of several values write {{'$in': [...]}}"
                )
            return _membership(column, path, operator == "$ne", [literal], where)
        if not isinstance(literal, list):
            raise InputError(f"{where} is {_shown(literal)}; it takes a list of values")
        return _membership(column, path, operator == "$nin", literal, where, is_listed=True)


def _member(fields: Iterable[pa.Field], name: str, path: str = "") -> tuple[pa.Field, str] | None:
    # The longest first, for names that hold dots themselves.
    for field in sorted(fields, key=lambda field: len(field.name), reverse=True):
        here = path + _quoted(field.name)
        if name == field.name:
            return field, here
        if pa.types.is_struct(field.type) and name.startswith(f"{field.name}."):
            found = _member(field.type, name.removeprefix(f"{field.name}."), f"{here}.")
            if found is not None:
                return found
    return None


def _quoted(name: str) -> str:
    return "`" + name.replace("`", "``") + "`"


def _all(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else " AND ".join(f"({part})" for part in parts)


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


def _ordering(column: pa.Field, path: str, operator: str, value: object, where: str) -> str:
    if _is_list(column.type) or pa.types.is_boolean(column.type):
        raise InputError(
            f"{where}: column {column.name!r} ({column.type}) has no order; use $eq, $ne, $in or $nin"
        )
    if value is None:
        raise InputError(
            f"{where} is null, which has no order; to ask for null write {{{column.name!r}: null}}"
        )
    literal = _literal(column, value, where)
    if isinstance(literal, int):
        return _never(column, path, negated=operator.startswith("$lt") == (literal > 0))
    return f"{path} {_ORDERS[operator]} {literal}"


def _membership(
    column: pa.Field,
    path: str,
    negated: bool,
    values: Sequence[object],
    where: str,
    *,
    is_listed: bool = False,
) -> str:
    """Whether one of some values is the column's; they stand at `where`, in a list there or alone."""
    literals = [
        _literal(column, value, where, number if is_listed else None)
        for number, value in enumerate(values)
        if value is not None
    ]
    asks_null = len(literals) < len(values)
    if asks_null and not literals:
        return f"{path} IS {'NOT ' if negated else ''}NULL"
    inside = ", ".join(literal for literal in literals if isinstance(literal, str))
    if not inside:
        condition = _never(column, path, negated)
    elif _is_list(column.type):
        condition = f"{'NOT ' if negated else ''}array_has_any({path}, [{inside}])"
    else:
        condition = f"{path} {'NOT IN' if negated else 'IN'} ({inside})"
    return f"({condition}) OR {path} IS NULL" if asks_null and not negated else condition


def _never(column: pa.Field, path: str, negated: bool) -> str:
    """A comparison that holds for no value, or for every value; null for null, as every comparison is."""
    if _is_list(column.type):
        return f"array_length({path}) {'>=' if negated else '<'} 0"
    return f"{path} {'=' if negated else '!='} {path}"


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


# Literals


_Parse = Callable[[object, pa.DataType], str | int]


class _Misfit(Exception):
    """A literal does not fit its column; the message says what does."""


def _literal(column: pa.Field, value: object, where: str, number: int | None = None) -> str | int:
    """SQL, or the side on which a value lies beyond the range of the column's type: -1 below, 1 above.

    `number` is the value's in a list at `where`.
    """
    parser = _parser_of(column.type)
    if parser is None:
        raise InputError(
            f"{where}: column {column.name!r} ({column.type}) cannot be compared with anything; a filter can only ask "
            "whether it is null"
        )
    try:
        if isinstance(value, (float, decimal.Decimal)) and not math.isfinite(value):
            raise _Misfit("NaN and infinity are no JSON numbers; to ask for missing values write null")
        if isinstance(value, int) and value.bit_length() > _MAX_BITS:
            raise _Misfit(f"integers have at most {_MAX_BITS} bits")
        parse, kind = parser
        return parse(value, kind)
    except _Misfit as misfit:
        place = where if number is None else f"{where}[{number}]"
        raise InputError(
            f"{place}: column {column.name!r} ({column.type}) cannot be compared with {_shown(value)}: {misfit}"
        ) from misfit


@lru_cache(maxsize=256)
def _parser_of(kind: pa.DataType) -> tuple[_Parse, pa.DataType] | None:
    """What reads a literal for a column of this type, and the type that it is compared with; a list's members'."""
    kind = kind.value_type if _is_list(kind) else kind
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    parse = next((parse for is_kind, parse in _PARSERS if is_kind(kind)), None)
    return None if parse is None else (parse, kind)


def _boolean(value: object, kind: pa.DataType) -> str:
    if not isinstance(value, bool):
        raise _Misfit("it takes true or false")
    return "true" if value else "false"


def _number(value: object, what: str) -> int | float | decimal.Decimal:
    if isinstance(value, bool) or not isinstance(value, (int, float, decimal.Decimal)):
        raise _Misfit(f"it takes {what}")
    return value


def _integer(value: object, kind: pa.DataType) -> str | int:
    number = _number(value, "an integer")
    if number != int(number):
        raise _Misfit("it takes an integer, and this number has a fraction")
    # A minus and the digits of the least integer would be read apart, as a float.
    shown = str(int(number)) if number != -(2**63) else f"({-(2**63) + 1} - 1)"
    return _side(int(number), kind) or shown


def _side(value: int, kind: pa.DataType) -> int:
    bounds = np.iinfo(kind.to_pandas_dtype())
    return -1 if value < bounds.min else int(value > bounds.max)


def _float(value: object, kind: pa.DataType) -> str:
    if isinstance(value, str) and value in _NOT_FINITE:
        return f"CAST('{_NOT_FINITE[value]}' AS DOUBLE)"
    number = _number(value, 'a number, or one of "NaN", "Infinity" and "-Infinity"')
    try:
        with np.errstate(over="ignore"):
            rounded = float(kind.to_pandas_dtype()(number))
    except OverflowError:
        rounded = math.inf
    if not math.isfinite(rounded):
        raise _Misfit(f"it is beyond the range of {kind}")
    if isinstance(number, int) and int(rounded) != number:
        raise _Misfit(f"this integer is not exact in {kind}, whose nearest value is {int(rounded)}")
    return repr(rounded)


def _decimal(value: object, kind: pa.DataType) -> str | int:
    exact = _digits(value)
    with decimal.localcontext(prec=_MAX_BITS):
        units = exact.scaleb(kind.scale)
        if units != units.to_integral_value():
            raise _Misfit(f"it takes a number of at most {kind.scale} decimal places")
        if abs(units) >= 10**kind.precision:
            return -1 if units < 0 else 1
    if kind.scale < 0:
        return f"{exact:f}"
    if pa.types.is_decimal256(kind):
        return f"arrow_cast('{exact:f}', 'Decimal256({kind.precision}, {kind.scale})')"
    return f"CAST('{exact:f}' AS DECIMAL({kind.precision}, {kind.scale}))"


def _digits(value: object) -> decimal.Decimal:
    """A number by the digits that were written, not those of the nearest binary fraction."""
    if isinstance(value, str):
        if len(value) > _MAX_BITS or not _NUMBER.fullmatch(value):
            raise _Misfit('it takes a number, as digits ("32.90") or as a JSON number')
        return decimal.Decimal(value)
    number = _number(value, 'a number, as digits ("32.90") or as a JSON number')
    if not isinstance(number, float):
        return decimal.Decimal(number)
    exact = decimal.Decimal(repr(number))
    if len(exact.normalize().as_tuple().digits) > _FLOAT_DIGITS:
        raise _Misfit(
            f"a JSON number keeps {_FLOAT_DIGITS} digits, and this one has lost some; write it as a string"
        )
    return exact


def _bytes(value: object, kind: pa.DataType) -> str:
    try:
        if not isinstance(value, str):
            raise ValueError
        content = base64.b64decode(value, validate=True)
    except (ValueError, binascii.Error) as error:
        raise _Misfit("it takes bytes as a base64 string") from error
    if pa.types.is_fixed_size_binary(kind) and len(content) != kind.byte_width:
        raise _Misfit(f"it takes {kind.byte_width} bytes, and these are {len(content)}")
    return f"X'{content.hex()}'"


def _string(value: object, kind: pa.DataType) -> str:
    if not isinstance(value, str):
        raise _Misfit("it takes a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _Misfit(f"it takes a string of valid Unicode: {error.reason}") from error
    return "'" + value.replace("'", "''") + "'"


def _date(value: object, kind: pa.DataType) -> str:
    match = _INSTANT.fullmatch(value) if isinstance(value, str) else None
    if match is None or match["time"]:
        raise _Misfit('it takes an ISO 8601 date such as "2024-01-31"')
    return f"DATE '{_moment(match['date']).date()}'"


def _timestamp(value: object, kind: pa.DataType) -> str | int:
    match = _INSTANT.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise _Misfit('it takes an ISO 8601 time such as "2024-01-31T12:00:00" or "2024-01-31"')
    if match["offset"] and kind.tz is None:
        raise _Misfit("the column has no time zone; write the time without an offset")
    time = (match["time"] or "00:00")[:8]
    moment = _moment(f"{match['date']}T{time}{(match['offset'] or 'Z').upper()}")
    seconds = (moment - _EPOCH) // datetime.timedelta(seconds=1)
    if not _FIRST_SECOND <= seconds <= _LAST_SECOND:
        return -1 if seconds < 0 else 1  # no column holds what no calendar of four digits has
    count = seconds * 10 ** UNIT_DIGITS[kind.unit] + _part_of(match["fraction"], kind)
    # A count with the column's own zone: a text would become a time without one, which is read as that zone's.
    zone = "None" if kind.tz is None else f'Some("{kind.tz}")'.replace("'", "''")
    literal = f"arrow_cast({_integer(count, pa.int64())}, 'Timestamp({_UNIT_NAMES[kind.unit]}, {zone})')"
    return _side(count, pa.int64()) or literal


def _time(value: object, kind: pa.DataType) -> str:
    match = _TIME.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise _Misfit('it takes an ISO 8601 time of day such as "12:00:00.5"')
    hours, minutes, seconds = (int(part or 0) for part in match.groups()[:3])
    count = ((hours * 60 + minutes) * 60 + seconds) * 10 ** UNIT_DIGITS[kind.unit] + _part_of(match[4], kind)
    return f"arrow_cast({count}, 'Time{kind.bit_width}({_UNIT_NAMES[kind.unit]})')"


def _duration(value: object, kind: pa.DataType) -> str | int:
    match = _DURATION.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise _Misfit('it takes an ISO 8601 duration in seconds such as "PT3723.5S"')
    count = int(match[2]) * 10 ** UNIT_DIGITS[kind.unit] + _part_of(match[3], kind)
    count = -count if match[1] else count
    literal = f"arrow_cast({_integer(count, pa.int64())}, 'Duration({_UNIT_NAMES[kind.unit]})')"
    return _side(count, pa.int64()) or literal


def _part_of(fraction: str | None, kind: pa.DataType) -> int:
    """The digits behind a second's point, in the unit of a column."""
    digits, written = UNIT_DIGITS[kind.unit], (fraction or "").ljust(9, "0")
    if written[digits:].strip("0"):
        raise _Misfit(f"the column counts in {kind.unit}; leave out the finer digits")
    return int(written[:digits] or 0)


def _moment(text: str) -> datetime.datetime:
    try:
        return datetime.datetime.fromisoformat(text)
    except ValueError as error:
        raise _Misfit(f"there is no such date or time: {error}") from error


_PARSERS: tuple[tuple[Callable[[pa.DataType], bool], _Parse], ...] = (
    (pa.types.is_boolean, _boolean),
    (pa.types.is_integer, _integer),
    (pa.types.is_floating, _float),
    (pa.types.is_decimal, _decimal),
    (pa.types.is_string, _string),
    (pa.types.is_large_string, _string),
    (pa.types.is_string_view, _string),
    (pa.types.is_date, _date),
    (pa.types.is_timestamp, _timestamp),
    (pa.types.is_time, _time),
    (pa.types.is_duration, _duration),
    (pa.types.is_binary, _bytes),
    (pa.types.is_large_binary, _bytes),
    (pa.types.is_fixed_size_binary, _bytes),
    (pa.types.is_binary_view, _bytes),
)


# Messages


def _unknown_operator(name: str, where: str, known: tuple[str, ...]) -> str:
    here = f"here stand {', '.join(known)}"
    if name in _COLUMN_OPERATORS:
        return f"{where}: {name!r} stands inside a column; {here}"
    if name in _FILTER_OPERATORS:
        return f"{where}: {name!r} holds filters and stands outside columns; {here}"
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
    return f"{where}: there is no operator {name!r}; the nearest is {nearest!r}; {here}"


def _shown(value: object) -> str:
    """A value as JSON, cut to a line."""
    try:
        text = json.dumps(value, default=_as_written)
    except (TypeError, ValueError, RecursionError):
        text = f"a {type(value).__name__} that is no JSON"
    return _shorten(text)


def _as_written(value: object) -> float:
    if isinstance(value, decimal.Decimal):
        return float(value)
    raise TypeError


def _shorten(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else text[:limit] + "…"
