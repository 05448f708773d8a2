"""Rows become records: every rule that a row must keep is here, and one parser serves both survey and reading.

Lines are decoded, split and checked a slice at a time with Arrow kernels; only rows that break a rule, and JSON, are
looked at one by one.
"""

from __future__ import annotations

import csv
import math

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raytower.data.candidates import make_candidates
from raytower.data.columns import admit, faults, reject_faults
from raytower.data.json_rows import load_json
from raytower.data.layouts import Layout, Source, name_among, refuse_repeated
from raytower.data.records import RecordField, canonical_schema, is_corpus_like
from raytower.data.row_batch import Parsed, Rejection, RowBatch
from raytower.data.slices import MAX_LINE_BYTES, Slice
from raytower.data.visible import describe_unseen, shows_nothing

_SEPARATORS = {"\t": "tabs", ",": "commas", ";": "semicolons"}
# A text is as long as its row may be.
csv.field_size_limit(MAX_LINE_BYTES)
_NUMBER = r"^[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?$"


def parse_slice(piece: Slice, source: Source) -> Parsed:
    """Read the lines of `piece` as records.

    Raises:
        InputError: the file as a whole is of another kind (labelled pairs read as pairs).
    """
    if piece.cut == "quoted":
        refuse_repeated(source.file, source.layout.columns)
        return to_records(_split_quoted(piece, source.layout), source)
    if piece.cut == "elements":
        elements = [row.decode("utf-8") for row in piece.rows()]
        numbers = np.arange(piece.first_line, piece.first_line + len(elements), dtype=np.int64)
        return to_records(load_json(elements, numbers, source), source)
    text, numbers, rejections = _decode(piece)
    if len(numbers) == 0:
        batch = RowBatch(numbers, {f.name: pa.nulls(0, f.read_type) for f in source.layout.fields})
    elif source.layout.format == "jsonl":
        batch = load_json(text.split("\n"), numbers, source)
    else:
        refuse_repeated(source.file, source.layout.columns)
        batch = _split_columns(text, numbers, source.layout)
    batch.rejections = rejections + batch.rejections
    return to_records(batch, source)


def to_records(batch: RowBatch, source: Source) -> Parsed:
    """Check every rule about values and make the canonical columns of the layout's kind.

    Raises:
        InputError: a column that would pass through is of a type that cannot.
    """
    layout = source.layout
    if layout.passes_columns_through:
        # What stands in the names of folders; the file's own columns come first.
        partitions = {
            name: pa.repeat(pa.scalar(value, pa.string() if value is None else None), len(batch.lines))
            for name, value in source.file.partitions
        }
        batch.extra = partitions | batch.extra
    admit(batch, source.file)
    for record_field in layout.fields:
        _check_field(batch, record_field)
    if is_corpus_like(layout.kind):
        _make_corpus(batch, layout, source.file.stem)
    if layout.kind == "candidates":
        make_candidates(batch)
    columns = {name: batch.columns[name] for name in canonical_schema(layout.kind).names}
    batch.rejections.sort(key=lambda rejection: rejection.line)
    return Parsed(columns, batch.extra, batch.lines, batch.rejections, batch.derived_ids)


def raw_line(piece: Slice, line: int) -> bytes:
    """The bytes of one line of `piece`, by its line number in the file."""
    return piece.rows()[line - piece.first_line]


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
            rejections.append(Rejection(number, _not_utf8(line, error)))
    return "\n".join(good), np.array(kept, dtype=np.int64), rejections


def _split_columns(text: str, numbers: np.ndarray, layout: Layout) -> RowBatch:
    lines = pc.split_pattern(pa.array([text]), "\n").flatten()
    batch = RowBatch(numbers, {"": lines})
    is_blank = pc.or_(pc.utf8_is_space(lines), pc.equal(pc.binary_length(lines), 0))
    batch.reject(is_blank.to_numpy(zero_copy_only=False), lambda i: "empty text: the line is blank")
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


def _split_quoted(piece: Slice, layout: Layout) -> RowBatch:
    names = layout.columns
    lines: list[int] = []
    rows: list[list[str]] = []
    rejections: list[Rejection] = []
    for number, row in enumerate(piece.rows(), piece.first_line):
        try:
            values = next(csv.reader([row.decode("utf-8")], delimiter=layout.delimiter, strict=True), [])
        except UnicodeDecodeError as error:
            rejections.append(Rejection(number, _not_utf8(row, error)))
        except csv.Error as error:
            rejections.append(Rejection(number, f"a quote is neither closed nor doubled ({error})"))
        else:
            if len(values) == len(names) and any(values):
                lines.append(number)
                rows.append(values)
            else:
                reason = (
                    _wrong_count(len(values), names, layout.delimiter)
                    if any(values)
                    else "empty text: the line is blank"
                )
                rejections.append(Rejection(number, reason))
    by_column = {name: pa.array([row[i] for row in rows], pa.string()) for i, name in enumerate(names)}
    batch = RowBatch(np.array(lines, dtype=np.int64), {}, rejections=rejections)
    return place_columns(batch, by_column, layout)


def _not_utf8(line: bytes, error: UnicodeDecodeError) -> str:
    return f"not UTF-8: byte 0x{line[error.start]:02x} at byte {error.start + 1} of the line"


def _wrong_count(count: int, names: tuple[str, ...], delimiter: str = "\t") -> str:
    columns = "1 column" if count == 1 else f"{count} columns"
    hint = "; if tabs belong to the texts, give the file the extension .txt" if len(names) == 1 else ""
    return (
        f"{columns}, expected {len(names)} ({', '.join(names)}) separated by {_SEPARATORS[delimiter]}{hint}"
    )


def place_columns(batch: RowBatch, by_column: dict[str, pa.Array], layout: Layout) -> RowBatch:
    """Give `batch` its field columns out of a file's columns; what is left over passes through where the kind does."""
    used = {record_field.name: name_among(record_field, tuple(by_column)) for record_field in layout.fields}
    nulls = pa.nulls(len(batch.lines), pa.string())
    batch.columns = {name: nulls if column is None else by_column[column] for name, column in used.items()}
    if layout.passes_columns_through:
        taken = set(used.values())
        batch.extra = {name: column for name, column in by_column.items() if name not in taken}
    return batch


def _check_field(batch: RowBatch, wanted: RecordField) -> None:
    label = wanted.names[0]
    if wanted.type != "numbers":
        reject_faults(batch, label, faults(batch.columns[wanted.name]))
    if wanted.required:
        nulls = pc.is_null(batch.columns[wanted.name]).to_numpy(zero_copy_only=False)
        batch.reject(nulls, lambda i: f"{label!r} is null, must be a {wanted.expected}")
    if wanted.is_list:
        return  # its elements are checked with the lists that belong to it
    if not wanted.may_be_blank:
        _reject_unseen(batch, wanted.name, label)
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


def _reject_unseen(batch: RowBatch, column: str, label: str) -> None:
    texts = batch.columns[column]
    batch.reject(shows_nothing(texts), lambda i: describe_unseen(label, texts[i].as_py()))


def _parse_numbers(texts: pa.Array) -> np.ndarray:
    """float64 [rows]; NaN where the text is no number (`float` alone would also take 1_000 and 'infinity')."""
    trimmed = pc.utf8_trim_whitespace(texts)
    is_number = pc.match_substring_regex(trimmed, _NUMBER).to_pylist()
    values = (
        float(text) if ok else math.nan for text, ok in zip(trimmed.to_pylist(), is_number, strict=True)
    )
    return np.fromiter(values, dtype=np.float64, count=len(texts))


def _join(first: pa.Array, second: pa.Array) -> pa.Array:
    """Both texts with a space between, or the one that is there; a null one, or one that shows nothing, is not."""
    no_first = pc.or_(pc.is_null(first), pa.array(shows_nothing(first)))
    no_second = pc.or_(pc.is_null(second), pa.array(shows_nothing(second)))
    # Not null_handling="skip": it leaves out the rows in which every value is null.
    both = pc.binary_join_element_wise(first, second, " ")
    return pc.if_else(no_first, second, pc.if_else(no_second, first, both))


def _keep_text_fields(batch: RowBatch, layout: Layout) -> None:
    """Let the text fields pass through as well, the last one only where it is not all of the text."""
    *titles, last = (field for field in layout.fields if field.name != "id")
    for field in titles:
        if batch.columns[field.name].null_count < len(batch.lines):
            batch.extra[field.names[0]] = batch.columns[field.name]
    body, text = batch.columns[last.name], batch.columns["text"]
    differs = pc.fill_null(pc.not_equal(body, text), False)
    if differs.true_count:
        batch.extra[last.names[0]] = pc.if_else(differs, body, pa.scalar(None, pa.string()))


def _make_corpus(batch: RowBatch, layout: Layout, stem: str) -> None:
    """Join the text fields by one space, leaving out missing and blank ones, and fill in ids from line numbers."""
    texts = [batch.columns[field.name] for field in layout.fields if field.name != "id"]
    joined = texts[-1]
    for column in reversed(texts[:-1]):
        joined = _join(column, joined)
    batch.columns["text"] = joined
    if layout.passes_columns_through:
        _keep_text_fields(batch, layout)
    if layout.fields[-1].may_be_blank:  # else that field alone makes sure that there is a text
        _reject_unseen(batch, "text", "text")
    ids = batch.columns["id"]
    if ids.null_count:
        derived = pa.array([f"{stem}:{line}" for line in batch.lines.tolist()], pa.string())
        batch.columns["id"] = pc.coalesce(ids, derived)
        batch.derived_ids = True
