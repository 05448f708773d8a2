"""Lines of JSON as rows: one object a line, its keys the fields of a record."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from raytower.data.candidates import NUM_POSITIVES
from raytower.data.extras import refuse_too_many
from raytower.data.layouts import Layout, Source, name_among, refuse_other_kind
from raytower.data.plain_labels import plain_label
from raytower.data.records import RecordField
from raytower.data.row_batch import BadRowError, Rejection, RowBatch

_JSON_TYPES = {str: "string", int: "number", float: "number", bool: "boolean", list: "array", dict: "object"}


def load_json(lines: Sequence[str], numbers: Sequence[int], source: Source) -> RowBatch:
    """Parse `lines`, whose line numbers are `numbers`, into rows with a column for each field."""
    layout = source.layout
    records: list[list[Any]] = []
    num_positives: list[int] = []
    kept: list[int] = []
    extra: list[dict[str, Any]] = []
    rejections: list[Rejection] = []
    text_names = {name for f in layout.fields if f.type == "text" for name in f.names}
    unread: dict[tuple[str, ...], frozenset[str]] = {}  # by the keys of a row: most rows have the same
    for number, line in zip(numbers, lines, strict=True):
        try:
            row = _json_object(line)
            keys = tuple(row)
            row, positives = _with_documents(row) if layout.kind == "candidates" else (row, 0)
            record = [_json_value(row, wanted) for wanted in layout.fields]
        except BadRowError as error:
            rejections.append(Rejection(number, str(error)))
            continue
        if keys not in unread:
            unread[keys] = _unread(keys, layout)
            refuse_other_kind(
                f"{source.file}:{number}", layout.kind, unread[keys], frozenset(keys) - unread[keys]
            )
        records.append(record)
        num_positives.append(positives)
        kept.append(number)
        if layout.passes_columns_through:
            taken = text_names | {name_among(layout.fields[0], row)}
            extra.append({key: value for key, value in row.items() if key not in taken})
    arrays = {
        wanted.name: pa.array([record[i] for record in records], wanted.read_type)
        for i, wanted in enumerate(layout.fields)
    }
    if layout.kind == "candidates":
        arrays[NUM_POSITIVES] = pa.array(num_positives, pa.int64())
    return RowBatch(
        np.array(kept, dtype=np.int64),
        arrays,
        _columns(extra, source),
        rejections,
        unread=frozenset().union(*unread.values()),
    )


def _unread(keys: tuple[str, ...], layout: Layout) -> frozenset[str]:
    """The keys of a row that no field comes from."""
    used = {name_among(wanted, keys) for wanted in layout.fields}
    if layout.kind == "candidates" and "documents" not in keys:
        used |= {"positive", "negatives"}
    return frozenset(keys) - used


def _columns(rows: list[dict[str, Any]], source: Source) -> dict[str, list[Any]]:
    """The values of each key, None in the rows that lack it."""
    names = dict.fromkeys(name for row in rows for name in row)
    refuse_too_many(len(names), source.file)
    return {name: [row.get(name) for row in rows] for name in names}


def _json_object(line: str) -> dict[str, Any]:
    try:
        row = _DECODER.decode(line)
    except BadRowError:
        raise
    except json.JSONDecodeError as error:
        if not line.strip():
            raise BadRowError("empty text: the line is blank") from error
        raise BadRowError(f"not valid JSON: {error.msg} at character {error.pos + 1}") from error
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits; nesting without end
        raise BadRowError(f"not valid JSON: {error}") from error
    if type(row) is not dict:
        found = "null" if row is None else _JSON_TYPES[type(row)]
        raise BadRowError(f"JSON {found}, must be an object with one record a line")
    if "\\ud" in line or "\\uD" in line:
        try:
            json.dumps(row, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadRowError(
                "half of a surrogate pair (\\ud800 to \\udfff) stands alone; it is no character"
            ) from error
    return row


def _object(members: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(members)
    if len(row) < len(members):
        names = [name for name, _ in members]
        repeated = next(name for name in names if names.count(name) > 1)
        raise BadRowError(f"the key {repeated!r} stands twice in one object")
    return row


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _json_value(row: dict[str, Any], wanted: RecordField) -> Any:
    """The field's value: text, or for a list field a list of texts or of floats; None where it may be missing."""
    name = name_among(wanted, row)
    if name is None:
        if wanted.required:
            raise BadRowError(f"missing key {' or '.join(map(repr, wanted.names))}")
        return None
    value = row[name]
    if wanted.is_list:
        return _json_list(name, value, "string" if wanted.type == "texts" else "number")
    if type(value) is str or (value is None and not wanted.required):
        return value
    others: dict[str, tuple[type, ...]] = {"text": (), "id": (int,)}
    if type(value) not in others.get(wanted.type, (int, float)):
        as_numbers = type(value) is bool and wanted.type in ("number", "category")
        remedy = "; write true as 1 and false as 0" if as_numbers else ""
        raise BadRowError(f"{name!r} {_found(value)}, must be a {wanted.expected}{remedy}")
    if wanted.type != "category":
        return str(value)
    if not math.isfinite(value):
        raise BadRowError(
            f"{name!r} is {value}, which is no number and no label; leave the row out, or name its label"
        )
    return plain_label(value)


def _json_list(name: str, value: Any, element_type: str) -> list[Any]:
    """The elements of an array of strings or of numbers, numbers as floats."""
    if type(value) is not list:
        raise BadRowError(f"{name!r} {_found(value)}, must be an array of {element_type}s")
    for place, element in enumerate(value, start=1):
        if _JSON_TYPES.get(type(element)) != element_type:
            raise BadRowError(f"element {place} of {name!r} {_found(element)}, must be a {element_type}")
    return value if element_type == "string" else [_as_float(element) for element in value]


def _as_float(number: int | float) -> float:
    try:
        return float(number)
    except OverflowError:  # an integer of more than 308 digits
        return math.inf


def _found(value: Any) -> str:
    return "is null" if value is None else f"is of JSON type {_JSON_TYPES[type(value)]}"


def _with_documents(row: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """`row` with documents and scores, and its number of positives (see candidates.NUM_POSITIVES).

    `positive` (one text or several) and `negatives` become documents with the scores 1 and 0. The number is 0 where the
    row gives documents and scores itself.
    """
    if "documents" in row:
        both = [key for key in ("positive", "negatives") if key in row]
        if both:
            raise BadRowError(
                f"{both[0]!r} stands beside 'documents'; give documents with scores, or positive with negatives"
            )
        return row, 0
    missing = [key for key in ("positive", "negatives") if key not in row]
    if len(missing) == 2:
        raise BadRowError("missing key 'documents' (with 'scores'), or 'positive' with 'negatives'")
    if missing:
        raise BadRowError(f"missing key {missing[0]!r}")
    if "scores" in row:
        raise BadRowError(
            "'scores' goes with 'documents'; 'positive' and 'negatives' stand for the scores 1 and 0"
        )
    positives = row["positive"]
    if type(positives) not in (str, list):
        raise BadRowError(f"'positive' {_found(positives)}, must be a string or an array of strings")
    positives = [positives] if type(positives) is str else _json_list("positive", positives, "string")
    negatives = _json_list("negatives", row["negatives"], "string")
    for key, texts in (("positive", positives), ("negatives", negatives)):
        if not texts:
            raise BadRowError(f"{key!r} is an empty array, must hold at least 1 text")
    scores = [1.0] * len(positives) + [0.0] * len(negatives)
    return {**row, "documents": positives + negatives, "scores": scores}, len(positives)
