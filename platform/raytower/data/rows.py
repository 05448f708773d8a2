"""Rows become records: every rule that a row must keep is here, and one parser serves both survey and reading.

Lines are decoded, split and checked a slice at a time with Arrow kernels; only rows that break a rule, and JSON, are
looked at one by one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raytower.data.layouts import Layout, Source, name_among, refuse_other_kind
from raytower.data.records import RecordField, canonical_schema, is_corpus_like
from raytower.data.slices import Slice

Extra = dict[str, pa.Array] | list[dict[str, Any]]
"""Columns passed through: Arrow columns by name (TSV, Parquet), or one mapping a row (JSONL)."""

_NUMBER = r"^[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?$"
_JSON_TYPES = {str: "string", int: "number", float: "number", bool: "boolean", list: "array", dict: "object"}


@dataclass(frozen=True)
class Rejection:
    """A row that breaks a rule, by its line number (row number in Parquet), counted from 1."""

    line: int
    reason: str


@dataclass
class Parsed:
    """The good rows of a slice, in file order, and the rows that break a rule."""

    columns: dict[str, pa.Array]
    extra: Extra
    lines: np.ndarray
    rejections: list[Rejection]

    @property
    def num_rows(self) -> int:
        return len(self.lines)


class BadRowError(ValueError):
    """A rule that one row breaks; its text is the reason."""


@dataclass
class RowBatch:
    """Rows on their way to being records: one Arrow string column for each field, thinned out as rules are checked."""

    lines: np.ndarray
    columns: dict[str, pa.Array]
    extra: Extra = field(default_factory=dict)
    rejections: list[Rejection] = field(default_factory=list)

    def reject(self, bad: np.ndarray, reason: Callable[[int], str]) -> None:
        """Take out the rows where `bad` (bool [rows]) holds; `reason` is asked with each row's position."""
        if not bad.any():
            return
        self.rejections += [Rejection(int(self.lines[i]), reason(int(i))) for i in np.flatnonzero(bad)]
        keep = ~bad
        mask = pa.array(keep)
        self.lines = self.lines[keep]
        self.columns = {name: column.filter(mask) for name, column in self.columns.items()}
        if isinstance(self.extra, dict):
            self.extra = {name: column.filter(mask) for name, column in self.extra.items()}
        else:
            self.extra = [row for row, kept in zip(self.extra, keep, strict=True) if kept]


def parse_slice(piece: Slice, source: Source) -> Parsed:
    """Read the lines of `piece` as records.

    Raises:
        InputError: the file as a whole is of another kind (labelled pairs read as pairs).
    """
    text, numbers, rejections = _decode(piece)
    if len(numbers) == 0:
        batch = RowBatch(numbers, {name: pa.nulls(0, pa.string()) for name in _names(source.layout)})
    elif source.layout.format == "jsonl":
        batch = _load_json(text, numbers, source)
    else:
        batch = _split_columns(text, numbers, source.layout)
    batch.rejections = rejections + batch.rejections
    return to_records(batch, source.layout, source.file.stem)


def to_records(batch: RowBatch, layout: Layout, stem: str) -> Parsed:
    """Check every rule about values and make the canonical columns of the layout's kind."""
    for record_field in layout.fields:
        _check_field(batch, record_field)
    if is_corpus_like(layout.kind):
        _make_corpus(batch, layout, stem)
    columns = {name: batch.columns[name] for name in canonical_schema(layout.kind).names}
    batch.rejections.sort(key=lambda rejection: rejection.line)
    return Parsed(columns, batch.extra, batch.lines, batch.rejections)


def raw_line(piece: Slice, line: int) -> bytes:
    """The bytes of one line of `piece`, by its line number in the file."""
    return piece.data.split(b"\n")[line - piece.first_line].removesuffix(b"\r")


def free_name(name: str) -> str:
    """The name under which a column passes through: its own, unless a record's own column has it."""
    return f"source_{name}" if name in ("id", "text") else name


def _names(layout: Layout) -> list[str]:
    return [record_field.name for record_field in layout.fields]


def _decode(piece: Slice) -> tuple[str, np.ndarray, list[Rejection]]:
    """The lines that are UTF-8, joined by newlines, their line numbers, and the lines that are not."""
    data = piece.data.removesuffix(b"\n").removesuffix(b"\r").replace(b"\r\n", b"\n")
    numbers = np.arange(piece.first_line, piece.first_line + data.count(b"\n") + 1, dtype=np.int64)
    try:
        return data.decode("utf-8"), numbers, []
    except UnicodeDecodeError:
        pass
    good, kept, rejections = [], [], []
    for number, line in zip(numbers.tolist(), data.split(b"\n"), strict=True):
        try:
            good.append(line.decode("utf-8"))
            kept.append(number)
        except UnicodeDecodeError as error:
            reason = f"not UTF-8: byte 0x{line[error.start]:02x} at byte {error.start + 1} of the line"
            rejections.append(Rejection(number, reason))
    return "\n".join(good), np.array(kept, dtype=np.int64), rejections


def _blank(column: pa.Array) -> np.ndarray:
    """bool [rows]: the text is empty or all whitespace; null is not blank."""
    empty = pc.or_(pc.utf8_is_space(column), pc.equal(pc.binary_length(column), 0))
    return pc.fill_null(empty, False).to_numpy(zero_copy_only=False)


def _split_columns(text: str, numbers: np.ndarray, layout: Layout) -> RowBatch:
    lines = pc.split_pattern(pa.array([text]), "\n").flatten()
    batch = RowBatch(numbers, {"": lines})
    batch.reject(_blank(lines), lambda i: "empty text: the line is blank")
    if layout.format == "tsv":
        names = layout.columns
        batch.columns = {"": pc.split_pattern(batch.columns[""], "\t")}
        counts = pc.list_value_length(batch.columns[""]).to_numpy(zero_copy_only=False)
        batch.reject(counts != len(names), lambda i: _wrong_count(int(counts[i]), names))
        values = [
            pc.list_element(batch.columns[""], i) if len(batch.lines) else None for i in range(len(names))
        ]
        by_column = {
            name: pa.nulls(0, pa.string()) if value is None else value
            for name, value in zip(names, values, strict=True)
        }
    else:
        by_column = {layout.columns[0]: batch.columns[""]}
    return place_columns(batch, by_column, layout)


def _wrong_count(count: int, names: tuple[str, ...]) -> str:
    columns = "1 column" if count == 1 else f"{count} columns"
    hint = "; if tabs belong to the texts, set input.format to lines" if len(names) == 1 else ""
    return f"{columns}, expected {len(names)} ({', '.join(names)}) separated by tabs{hint}"


def place_columns(batch: RowBatch, by_column: dict[str, pa.Array], layout: Layout) -> RowBatch:
    """Give `batch` its field columns out of a file's columns; what is left over passes through where the kind does."""
    used = {record_field.name: name_among(record_field, tuple(by_column)) for record_field in layout.fields}
    nulls = pa.nulls(len(batch.lines), pa.string())
    batch.columns = {name: nulls if column is None else by_column[column] for name, column in used.items()}
    if layout.passes_columns_through:
        taken = set(used.values())
        batch.extra = {free_name(name): column for name, column in by_column.items() if name not in taken}
    return batch


def _load_json(text: str, numbers: np.ndarray, source: Source) -> RowBatch:
    layout = source.layout
    columns: dict[str, list[str | None]] = {name: [] for name in _names(layout)}
    kept: list[int] = []
    extra: list[dict[str, Any]] = []
    rejections: list[Rejection] = []
    text_names = {name for f in layout.fields if f.type == "text" for name in f.names}
    for number, line in zip(numbers.tolist(), text.split("\n"), strict=True):
        try:
            row = _json_object(line)
            record = [_json_value(row, record_field) for record_field in layout.fields]
        except BadRowError as error:
            rejections.append(Rejection(number, str(error)))
            continue
        if layout.kind == "pairs":
            refuse_other_kind(f"{source.file}:{number}", "pairs", tuple(row))
        for column, value in zip(columns.values(), record, strict=True):
            column.append(value)
        kept.append(number)
        if layout.passes_columns_through:
            taken = text_names | {name_among(layout.fields[0], tuple(row))}
            extra.append({free_name(key): value for key, value in row.items() if key not in taken})
    arrays = {name: pa.array(values, pa.string()) for name, values in columns.items()}
    batch = RowBatch(np.array(kept, dtype=np.int64), arrays, extra, rejections)
    if not layout.passes_columns_through:
        batch.extra = {}
    return batch


def _json_object(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
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


def _json_value(row: dict[str, Any], wanted: RecordField) -> str | None:
    for name in wanted.names:
        if name in row:
            value = row[name]
            break
    else:
        if wanted.required:
            raise BadRowError(f"missing key {' or '.join(map(repr, wanted.names))}")
        return None
    if type(value) is str:
        return value
    if value is None:
        if wanted.required:
            raise BadRowError(f"{name!r} is null, must be a {_expected(wanted)}")
        return None
    if wanted.type == "text" or (
        type(value) is not int and (type(value) is not float or wanted.type == "id")
    ):
        raise BadRowError(
            f"{name!r} is of JSON type {_JSON_TYPES[type(value)]}, must be a {_expected(wanted)}"
        )
    return str(value)


def _expected(wanted: RecordField) -> str:
    return {
        "text": "string",
        "id": "string or an integer",
        "number": "number",
        "category": "string or a number",
    }[wanted.type]


def _check_field(batch: RowBatch, wanted: RecordField) -> None:
    label = wanted.names[0]
    if wanted.required:
        nulls = pc.is_null(batch.columns[wanted.name]).to_numpy(zero_copy_only=False)
        batch.reject(nulls, lambda i: f"{label!r} is null, must be a {_expected(wanted)}")
    if not wanted.may_be_blank:
        batch.reject(_blank(batch.columns[wanted.name]), lambda i: f"empty {label}")
    if wanted.type == "id":
        # Nothing that writes ids (run files, C strings) can carry the character.
        has_nul = pc.fill_null(pc.match_substring(batch.columns[wanted.name], "\x00"), False)
        batch.reject(has_nul.to_numpy(zero_copy_only=False), lambda i: f"{label} holds a NUL character")
    if wanted.type == "number":
        texts = batch.columns[wanted.name]
        values = _parse_numbers(texts)
        batch.columns[wanted.name] = pa.array(values)
        batch.reject(
            ~np.isfinite(values), lambda i: f"{label} {texts[i].as_py()[:60]!r} is not a finite number"
        )


def _parse_numbers(texts: pa.Array) -> np.ndarray:
    """float64 [rows]; NaN where the text is no number (`float` alone would also take 1_000 and 'infinity')."""
    trimmed = pc.utf8_trim_whitespace(texts)
    is_number = pc.match_substring_regex(trimmed, _NUMBER).to_pylist()
    values = (
        float(text) if ok else math.nan for text, ok in zip(trimmed.to_pylist(), is_number, strict=True)
    )
    return np.fromiter(values, dtype=np.float64, count=len(texts))


def _join(first: pa.Array, second: pa.Array) -> pa.Array:
    """Both texts with a space between, or the one that is there; a null or blank one is not."""
    no_first = pc.or_(pc.is_null(first), pa.array(_blank(first)))
    no_second = pc.or_(pc.is_null(second), pa.array(_blank(second)))
    # Not null_handling="skip": it leaves out the rows in which every value is null.
    both = pc.binary_join_element_wise(first, second, " ")
    return pc.if_else(no_first, second, pc.if_else(no_second, first, both))


def _make_corpus(batch: RowBatch, layout: Layout, stem: str) -> None:
    """Join the text fields by one space, leaving out missing and blank ones, and fill in ids from line numbers."""
    texts = [batch.columns[name] for name in _names(layout) if name != "id"]
    joined = texts[-1]
    for column in reversed(texts[:-1]):
        joined = _join(column, joined)
    batch.columns["text"] = joined
    batch.reject(_blank(joined), lambda i: "empty text")
    ids = batch.columns["id"]
    if ids.null_count:
        derived = pa.array([f"{stem}:{line}" for line in batch.lines.tolist()], pa.string())
        batch.columns["id"] = pc.coalesce(ids, derived)
