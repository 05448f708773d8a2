"""Values of documents' columns as JSON has them, each in a form that a filter takes to find the document again.

integers, booleans, strings   themselves; integers are exact, also beyond 2**53
floats                        numbers; the strings "NaN", "Infinity" and "-Infinity", as protobuf writes them
decimals                      strings of all their digits: "32.90"
bytes                         base64, RFC 4648 with padding
dates, times                  ISO 8601: "2024-01-31", "12:00:00.5"
timestamps                    ISO 8601 with all their digits: "2024-01-31T12:00:00.123456789"; where the column has a
                              time zone, in that zone with its offset: "2024-01-31T20:00:00+08:00"
durations                     ISO 8601 in seconds: "PT3723.5S", "-PT1S"
lists, structs                lists and objects of these
maps                          lists of [key, value]
null                          null
"""

from __future__ import annotations

import base64
import datetime
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa

# What a second holds of a unit, as a power of ten.
UNIT_DIGITS = {"s": 0, "ms": 3, "us": 6, "ns": 9}
_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)


def json_values(column: pa.Array | pa.ChunkedArray) -> list[Any]:
    """The values (n,) of a column of any Arrow type, as JSON has them (see above)."""
    if isinstance(column, pa.ChunkedArray):
        return [value for chunk in column.chunks for value in json_values(chunk)]
    if isinstance(column, pa.ExtensionArray):
        return json_values(column.storage)
    convert = next((convert for is_kind, convert in _CONVERTERS if is_kind(column.type)), None)
    return list(column.to_pylist()) if convert is None else convert(column)


def json_rows(table: pa.Table | pa.RecordBatch) -> list[dict[str, Any]]:
    """The rows of a table as JSON objects."""
    columns = {name: json_values(table[name]) for name in table.schema.names}
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _each(convert: Callable[[Any], Any]) -> Callable[[pa.Array], list[Any]]:
    """Converts each value that is not null, as Python has it."""
    return lambda column: [None if value is None else convert(value) for value in column.to_pylist()]


def _float(value: float) -> float | str:
    if math.isfinite(value):
        return float(value)
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _dates(column: pa.Array) -> list[str | None]:
    days = column.cast(pa.date32()).cast(pa.int32()).to_pylist()
    return [None if day is None else str(np.datetime64(day, "D")) for day in days]


def _times(column: pa.Array) -> list[str | None]:
    return [None if text is None else _short(text) for text in column.cast(pa.string()).to_pylist()]


def _timestamps(column: pa.Array) -> list[str | None]:
    unit, name = column.type.unit, column.type.tz
    zone = None if name is None else pa.lib.string_to_tzinfo(name)
    counts = column.cast(pa.int64()).to_pylist()
    return [None if count is None else _timestamp(count, unit, zone) for count in counts]


def _timestamp(count: int, unit: str, zone: datetime.tzinfo | None) -> str:
    if zone is None:
        return _text_of(count, unit)
    per_second = 10 ** UNIT_DIGITS[unit]
    try:
        moment = _EPOCH + datetime.timedelta(seconds=count // per_second)
        offset = moment.astimezone(zone).utcoffset() or datetime.timedelta()
        seconds = int(offset.total_seconds())
        local = _text_of(count + seconds * per_second, unit)
    except (OverflowError, ValueError):  # beyond the calendar of Python, or of this unit
        seconds = 1
    if seconds % 60:  # ISO 8601 has no offset of seconds, as local mean times have
        return _text_of(count, unit) + "Z"
    sign, minutes = "-" if seconds < 0 else "+", abs(seconds) // 60
    return f"{local}{sign}{minutes // 60:02}:{minutes % 60:02}"


def _text_of(count: int, unit: Any) -> str:
    """The time that lies so many units behind 1970, in any year."""
    return _short(str(np.datetime64(count, unit)))


def _durations(column: pa.Array) -> list[str | None]:
    digits = UNIT_DIGITS[column.type.unit]
    counts = column.cast(pa.int64()).to_pylist()
    return [None if count is None else _duration(count, digits) for count in counts]


def _duration(count: int, digits: int) -> str:
    whole, part = divmod(abs(count), 10**digits)
    fraction = f".{part:0{digits}}" if digits else ""
    return f"{'-' if count < 0 else ''}PT{_short(f'{whole}{fraction}')}S"


def _short(text: str) -> str:
    """Without the zeros that a fraction ends in."""
    return text.rstrip("0").rstrip(".") if "." in text else text


def _lists(column: pa.Array) -> list[Any]:
    return [json_values(item.values) if item.is_valid else None for item in column]


def _maps(column: pa.Array) -> list[Any]:
    found = []
    for item in column:
        pairs = zip(*map(json_values, item.values.flatten()), strict=True) if item.is_valid else None
        found.append(None if pairs is None else [list(pair) for pair in pairs])
    return found


def _structs(column: pa.Array) -> list[Any]:
    names = [field.name for field in column.type]
    members = [json_values(part) for part in column.flatten()]
    valid = column.is_valid().to_pylist()
    return [
        dict(zip(names, (part[row] for part in members), strict=True)) if is_valid else None
        for row, is_valid in enumerate(valid)
    ]


_CONVERTERS: tuple[tuple[Callable[[pa.DataType], bool], Callable[[pa.Array], list[Any]]], ...] = (
    (pa.types.is_dictionary, lambda column: json_values(column.dictionary_decode())),
    (pa.types.is_floating, _each(_float)),
    (pa.types.is_decimal, _each(lambda value: f"{value:f}")),
    (pa.types.is_binary, _each(lambda value: base64.b64encode(value).decode())),
    (pa.types.is_large_binary, _each(lambda value: base64.b64encode(value).decode())),
    (pa.types.is_fixed_size_binary, _each(lambda value: base64.b64encode(value).decode())),
    (pa.types.is_binary_view, _each(lambda value: base64.b64encode(value).decode())),
    (pa.types.is_date, _dates),
    (pa.types.is_time, _times),
    (pa.types.is_timestamp, _timestamps),
    (pa.types.is_duration, _durations),
    (pa.types.is_map, _maps),
    (pa.types.is_list, _lists),
    (pa.types.is_large_list, _lists),
    (pa.types.is_fixed_size_list, _lists),
    (pa.types.is_list_view, _lists),
    (pa.types.is_large_list_view, _lists),
    (pa.types.is_struct, _structs),
)
