"""The gate for columns that a corpus passes through: the index can store what passes, and JSON can express it.

These types pass: null, bool, string, int64, uint64, float32, float64, decimal128, date32, timestamp, and lists and
structs of them. Dictionaries, extension types, views and narrow numbers become the plain type of their values. NaN
becomes null. Rows with text that is not UTF-8, an infinite number or a date outside of the years 1 to 9999 are
rejected. Columns of bytes, times of day, durations, maps or unions are refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raytower.data.first_bytes import is_utf8
from raytower.data.row_batch import RowBatch, mask_of
from raytower.data.slices import MAX_LINE_BYTES
from raytower.data.sources import SourceFile
from raytower.errors import InputError

MAX_DEPTH = 16
"""How many levels deep lists and objects may be nested."""
_MAX_DIGITS = 38
_UINT64_MAX = 2**64 - 1
_INT64_MIN = -(2**63)
# The years 1 to 9999, those of ISO 8601 and of Python, in days and seconds since 1970.
_DAYS = (-719_162, 2_932_896)
_SECONDS = (-62_135_596_800, 253_402_300_799)
_TICKS = {"s": 1, "ms": 10**3, "us": 10**6}
_PLAIN = {kind.id: plain for kinds, plain in (
    ([pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32()], pa.int64()),
    ([pa.string(), pa.large_string(), pa.string_view()], pa.string()),
    ([pa.float16(), pa.float32()], pa.float32()),
    *(([kind], kind) for kind in (pa.null(), pa.bool_(), pa.uint64(), pa.float64(), pa.date32(), pa.date64())),
) for kind in kinds}  # fmt: skip
_LISTS = {kind(pa.null()).id for kind in (pa.list_, pa.large_list, pa.list_view, pa.large_list_view)}
_LISTS.add(pa.list_(pa.null(), 1).id)
_NO_UTF8 = "is not UTF-8"


def admit(batch: RowBatch, file: SourceFile) -> None:
    """Decode the passed-through columns of `batch`, and reject the rows with a value that cannot pass.

    Raises:
        InputError: a column whose type cannot pass.
    """
    for name, column in batch.extra.items():
        if isinstance(column, pa.Array):
            try:
                batch.extra[name] = cast_exactly(column, plain_type(column.type))
            except TypeError as error:
                raise InputError(
                    f"{file}: column {name!r} is {column.type}: {error}; write it as another type, or the file "
                    "without it"
                ) from error
    for name in list(batch.extra):
        column = batch.extra[name]
        if isinstance(column, list):
            reject_faults(batch, f"column {name!r}", _json_faults(column))
            batch.extra[name] = [_settled(value) for value in batch.extra[name]]
        else:
            reject_faults(batch, f"column {name!r}", faults(column))


def reject_faults(batch: RowBatch, label: str, found: dict[int, str]) -> None:
    """Reject the rows in `found`, which says for each what is wrong with `label`."""
    bad = np.zeros(len(batch.lines), dtype=bool)
    bad[list(found)] = True
    batch.reject(bad, lambda row: f"{label} {found[row]}")


def plain_type(kind: pa.DataType, depth: int = 0) -> pa.DataType:
    """The type in which values of an Arrow type pass. Raises TypeError with the reason if they cannot."""
    types = pa.types
    if isinstance(kind, pa.BaseExtensionType):
        return plain_type(kind.storage_type, depth)
    if types.is_dictionary(kind) or types.is_run_end_encoded(kind):
        return plain_type(kind.value_type, depth)
    if depth > MAX_DEPTH:
        raise TypeError(f"lists and structs may be nested at most {MAX_DEPTH} deep")
    if types.is_struct(kind):
        for name in (member.name for member in kind):
            if not is_member_name(name):
                raise TypeError(f"it has a member named {name!r}")
        return pa.struct([(member.name, plain_type(member.type, depth + 1)) for member in kind])
    if kind.id in _LISTS:
        return pa.list_(plain_type(kind.value_type, depth + 1))
    if kind.id in _PLAIN:
        return _PLAIN[kind.id]
    if types.is_timestamp(kind):
        return pa.timestamp(kind.unit, kind.tz and "UTC")
    if types.is_decimal(kind) and kind.precision <= _MAX_DIGITS:
        return pa.decimal128(kind.precision, kind.scale)
    raise TypeError("no filter or JSON answer holds such values")


def is_member_name(name: str) -> bool:
    """Whether the table can store a member of an object under this name."""
    return name != "" and "\0" not in name


def cast_exactly(array: pa.Array, kind: pa.DataType) -> pa.Array:
    """`array` cast to `kind`, which can hold its values. Members that its structs lack become null, and so does NaN."""
    array = _decoded(array)
    if pa.types.is_null(kind) or array.null_count == len(array):
        return pa.nulls(len(array), kind)
    if pa.types.is_struct(kind):
        found = {member.name: child for member, child in zip(array.type, array.flatten(), strict=True)}
        children = [
            cast_exactly(found.get(member.name, pa.nulls(len(array))), member.type) for member in kind
        ]
        return pa.StructArray.from_arrays(children, fields=list(kind), mask=array.is_null())
    if pa.types.is_list(kind):
        lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
        values = cast_exactly(array.flatten(), kind.value_type)
        return pa.ListArray.from_arrays(offsets, values, type=kind, mask=array.is_null())
    if pa.types.is_decimal(kind) and pa.types.is_integer(array.type):
        array = array.cast(pa.decimal128(_MAX_DIGITS, 0))  # Arrow wants room for the largest integer
    if array.type != kind:
        array = array.cast(kind, safe=not pa.types.is_date64(array.type))  # of a date64 only the day counts
    if pa.types.is_floating(kind) and (no_number := pc.is_nan(array)).true_count:
        array = pc.if_else(no_number, pa.scalar(None, kind), array)
    return array


def faults(array: pa.Array) -> dict[int, str]:
    """The rows of an Arrow column with a value that cannot pass, each with the fault of its first such value."""
    found: dict[int, str] = {}
    for values, rows in _leaves(array, np.arange(len(array))):
        for bad, words in _leaf_faults(values):
            for row in rows[bad].tolist():
                found.setdefault(row, words)
    return found


def parents(array: pa.Array, rows: np.ndarray) -> np.ndarray:
    """The row of each element of a list column, (elements,): lists [[a, b], [], [c]] of `rows` 5 6 7 give 5 5 7."""
    return rows[pc.list_parent_indices(array).to_numpy()]


def _decoded(array: pa.Array) -> pa.Array:
    while True:
        if isinstance(array, pa.ExtensionArray):
            array = array.storage
        elif isinstance(array, pa.DictionaryArray):
            array = array.dictionary_decode()
        elif isinstance(array, pa.RunEndEncodedArray):
            array = pc.run_end_decode(array)
        else:
            return array


def _leaves(array: pa.Array, rows: np.ndarray) -> Iterator[tuple[pa.Array, np.ndarray]]:
    """The columns of plain values in `array`, with the row of each value."""
    if pa.types.is_struct(array.type):
        for child in array.flatten():
            yield from _leaves(child, rows)
    elif pa.types.is_list(array.type):
        yield from _leaves(array.flatten(), parents(array, rows))
    else:
        yield array, rows


def _leaf_faults(values: pa.Array) -> Iterator[tuple[np.ndarray, str]]:
    """Each fault that plain values may have: a mask, bool [values], and its words."""
    kind = values.type
    if pa.types.is_string(kind):
        yield _is_no_utf8(values), _NO_UTF8
        yield (
            mask_of(pc.greater(pc.binary_length(values), MAX_LINE_BYTES)),
            f"is longer than {MAX_LINE_BYTES} bytes",
        )
    elif pa.types.is_floating(kind):
        yield mask_of(pc.is_inf(values)), "is infinite, which JSON cannot say"
    elif pa.types.is_date(kind) or (pa.types.is_timestamp(kind) and kind.unit in _TICKS):
        if pa.types.is_date32(kind):
            first, last = _DAYS
            ticks = values.cast(pa.int32())
        else:
            scale = _TICKS[kind.unit if pa.types.is_timestamp(kind) else "ms"]
            first, last = _SECONDS[0] * scale, (_SECONDS[1] + 1) * scale - 1
            ticks = values.cast(pa.int64())
        beyond = pc.or_(pc.less(ticks, first), pc.greater(ticks, last))
        yield mask_of(beyond), "is a date outside of the years 1 to 9999"


def _is_no_utf8(texts: pa.Array) -> np.ndarray:
    try:
        texts.validate(full=True)
        return np.zeros(len(texts), dtype=bool)
    except pa.ArrowInvalid:
        return np.array([not is_utf8(value or b"") for value in texts.cast(pa.binary()).to_pylist()])


def _json_faults(values: list[Any]) -> dict[int, str]:
    checked = ((row, _json_fault(value, 0)) for row, value in enumerate(values) if type(value) is not str)
    return {row: fault for row, fault in checked if fault is not None}


def _settled(value: Any) -> Any:
    """The JSON value with null in place of objects without members, which no column can hold."""
    if type(value) is dict:
        return {key: _settled(inner) for key, inner in value.items()} or None
    return list(map(_settled, value)) if type(value) is list else value


def _json_fault(value: Any, depth: int) -> str | None:
    """The fault of a value that JSON gave, or None."""
    kind = type(value)
    if kind is int:
        if not _INT64_MIN <= value <= _UINT64_MAX:
            return "is an integer of more than 64 bits; write it as a string"
    elif kind is float:
        if math.isinf(value):
            return "is infinite, which JSON cannot say"
    elif kind is list or kind is dict:
        if depth == MAX_DEPTH:
            return f"is nested more than {MAX_DEPTH} deep"
        if kind is dict and not all(map(is_member_name, value)):
            return "has an object with a key that is empty or holds a NUL character"
        for inner in value.values() if kind is dict else value:
            if type(inner) is not str and (fault := _json_fault(inner, depth + 1)) is not None:
                return fault
    return None
