"""Rows become records: every rule that a row must keep is here, and one parser serves both survey and reading.

Lines are decoded, split and checked a slice at a time with Arrow kernels; only rows that break a rule, and JSON, are
looked at one by one.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raytower.data.candidates import make_candidates
from raytower.data.columns import admit, faults, reject_faults
from raytower.data.json_rows import load_json
from raytower.data.layouts import Layout, Source, name_among, refuse_repeated
from raytower.data.normalised import normalised
from raytower.data.plain_labels import EXPONENT, SPACES, UNSEEN_IN_LABELS, WHOLE_NUMBER, written_out
from raytower.data.records import HEADERLESS, RecordField, is_corpus_like
from raytower.data.row_batch import Chunk, Rejection, RowBatch, mask_of
from raytower.data.slices import MAX_LINE_BYTES, Extent, RangeReader, Slice, iter_slices
from raytower.data.visible import describe_unseen, shows_nothing

_SEPARATORS = {"\t": "tabs", ",": "commas", ";": "semicolons"}
# A field may be as long as a whole row.
csv.field_size_limit(MAX_LINE_BYTES)
_NUMBER = r"^[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?$"


@dataclass
class TextReader:
    """Reads extents of a text file; in file order each byte is read once, compressed or not."""

    source: Source

    @cached_property
    def _bytes(self) -> RangeReader:
        return RangeReader(self.source.file)

    def read(self, extent: Extent) -> Chunk:
        """Raises InputError where the file can no longer be read."""
        data = self._bytes.read(extent.start, extent.end - extent.start)
        return self._chunk(Slice(extent.start, extent.first_line, data, self.source.layout.cut))

    def scan(self, rows_per_chunk: int) -> Iterator[Chunk]:
        """Every row, parsed. Raises InputError where the file cannot be read."""
        file, layout = self.source.file, self.source.layout
        cut = iter_slices(file, layout.body_start, layout.first_line, rows_per_chunk, layout.cut)
        return map(self._chunk, cut)

    def _chunk(self, content: Slice) -> Chunk:
        return Chunk(content.extent, [parse_slice(content, self.source)], content)


def parse_slice(piece: Slice, source: Source) -> RowBatch:
    """Read the rows of `piece` as records.

    Raises:
        InputError: the file as a whole is of another kind (labelled pairs read as pairs).
    """
    texts, numbers, rejections = [], [], []
    for number, row in enumerate(piece.rows(), piece.first_line):
        try:
            texts.append(row.decode("utf-8"))
            numbers.append(number)
        except UnicodeDecodeError as error:
            found = f"byte 0x{row[error.start]:02x} at byte {error.start + 1} of the line"
            rejections.append(Rejection(number, f"not UTF-8: {found}"))
    read = load_json if source.layout.format in ("jsonl", "json") else _split
    batch = read(texts, numbers, source)
    batch.rejections += rejections
    return to_records(batch, source)


def to_records(batch: RowBatch, source: Source) -> RowBatch:
    """Check every rule about values of `batch`, and make its columns the canonical ones of the layout's kind.

    Raises:
        InputError: a column that would pass through is of a type that cannot.
    """
    layout = source.layout
    if layout.passes_columns_through:
        # Values from the names of folders (`lang=zh`). A column of the file with the same name wins.
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
    if layout.kind == "triples":
        _reject_equal_sides(batch)
    batch.columns = {name: batch.columns[name] for name in layout.schema.names}
    batch.rejections.sort(key=lambda rejection: rejection.line)
    return batch


def _split(texts: Sequence[str], numbers: Sequence[int], source: Source) -> RowBatch:
    """Cut `texts`, whose line numbers are `numbers`, into the columns of the layout."""
    layout = source.layout
    refuse_repeated(source.file, layout.columns)
    lines: list[int] = []
    rows: list[list[str]] = []
    rejections: list[Rejection] = []
    # Of one column a row may well say what the header says.
    has_header = layout.first_line > 1 and len(layout.columns) > 1
    for number, text in zip(numbers, texts, strict=True):
        try:
            values = _values(text, layout)
        except csv.Error as error:
            rejections.append(Rejection(number, f"a quote is neither closed nor doubled ({error})"))
            continue
        if not values:
            rejections.append(Rejection(number, "empty text: the line is blank"))
        elif len(values) != len(layout.columns):
            rejections.append(Rejection(number, _wrong_count(len(values), layout)))
        elif has_header and tuple(values) == layout.columns:
            rejections.append(
                Rejection(number, "the header once more, as where files were joined; remove the line")
            )
        else:
            lines.append(number)
            rows.append(values)
    columns = zip(*rows, strict=True) if rows else [()] * len(layout.columns)
    by_name = dict(zip(layout.columns, (pa.array(column, pa.string()) for column in columns), strict=True))
    used = {wanted.name: name_among(wanted, layout.columns) for wanted in layout.fields}
    nulls = pa.nulls(len(rows), pa.string())
    batch = RowBatch(
        np.array(lines, dtype=np.int64),
        {name: nulls if column is None else by_name[column] for name, column in used.items()},
        rejections=rejections,
        unread=frozenset(layout.columns) - set(used.values()),
    )
    if layout.passes_columns_through:
        batch.extra = {name: column for name, column in by_name.items() if name not in used.values()}
    return batch


def _values(text: str, layout: Layout) -> list[str]:
    """The columns of one row; none of a blank one."""
    if layout.format == "csv":
        values = next(csv.reader([text], delimiter=layout.delimiter, strict=True), [])
        return values if any(values) else []
    if not text or text.isspace():
        return []
    return text.split("\t") if layout.format == "tsv" else [text]


def _wrong_count(count: int, layout: Layout) -> str:
    names = layout.columns
    columns = "1 column" if count == 1 else f"{count} columns"
    separators = _SEPARATORS[layout.delimiter]
    hint = "; if tabs belong to the texts, give the file the extension .txt" if len(names) == 1 else ""
    if layout.kind in HEADERLESS and layout.first_line == 1 and count > len(names):
        hint = f"; if the others are to be left out, name all columns in a first line, {' and '.join(names)} among them"
    return f"{columns}, expected {len(names)} ({', '.join(names)}) separated by {separators}{hint}"


def _check_field(batch: RowBatch, wanted: RecordField) -> None:
    name, label = wanted.name, wanted.names[0]
    if wanted.type != "numbers":
        reject_faults(batch, label, faults(batch.columns[name]))
    if wanted.required:
        nulls = mask_of(batch.columns[name].is_null())
        batch.reject(nulls, lambda i: f"{label!r} is null, must be a {wanted.expected}")
    if wanted.is_list:
        return  # its elements are checked with the lists that belong to it
    if wanted.type == "category":
        batch.columns[name] = _plain_labels(batch.columns[name])
    if not wanted.may_be_blank:
        _reject_unseen(batch, name, label)
    if wanted.type == "id":
        # Run files and C strings, which carry ids, cannot hold the character.
        has_nul = mask_of(pc.match_substring(batch.columns[name], "\x00"))
        batch.reject(has_nul, lambda i: f"{label} holds a NUL character")
    if wanted.type == "number":
        texts = batch.columns[name]
        values = _parse_numbers(texts)
        missing = mask_of(texts.is_null())  # where it must be there, such rows are rejected above
        batch.columns[name] = pa.array(values, mask=missing)
        wrong = ~np.isfinite(values) & ~missing
        batch.reject(wrong, lambda i: f"{label} {texts[i].as_py()[:60]!r} is not a finite number")


def _reject_unseen(batch: RowBatch, column: str, label: str) -> None:
    texts = batch.columns[column]
    batch.reject(shows_nothing(texts), lambda i: describe_unseen(label, texts[i].as_py()))


def _plain_labels(labels: pa.Array) -> pa.Array:
    """Each label in its normal form; see data/plain_labels.py."""
    seen = pc.replace_substring_regex(pc.utf8_normalize(labels, form="NFC"), UNSEEN_IN_LABELS, "")
    trimmed = pc.utf8_trim_whitespace(pc.replace_substring_regex(seen, SPACES, " "))
    has_exponent = pc.fill_null(pc.match_substring_regex(trimmed, EXPONENT), False)
    if has_exponent.true_count:
        numbers = pa.array(map(written_out, trimmed.filter(has_exponent).to_pylist()), pa.string())
        trimmed = pc.replace_with_mask(trimmed, has_exponent, numbers)
    whole = pc.replace_substring_regex(trimmed, WHOLE_NUMBER, r"\1")
    whole = pc.if_else(pc.equal(whole, "-0"), "0", whole)
    return pc.if_else(pc.equal(whole, ""), labels, whole)  # what shows nothing stays, to be told so


def _reject_equal_sides(batch: RowBatch) -> None:
    """Reject the triples whose negative is their document: they would train it as relevant and irrelevant at once."""
    document, negative = (batch.columns[name] for name in ("document", "negative"))
    batch.reject(
        mask_of(pc.equal(normalised(document), normalised(negative))),
        lambda i: (
            f"negative is the document itself, {document[i].as_py()[:60]!r}; a negative is another text"
        ),
    )


def _parse_numbers(texts: pa.Array) -> np.ndarray:
    """float64 [rows]; NaN where the text is no number (`float` alone would also take 1_000 and 'infinity')."""
    trimmed = pc.utf8_trim_whitespace(texts)
    is_number = pc.match_substring_regex(trimmed, _NUMBER)
    return pc.if_else(is_number, trimmed, "nan").cast(pa.float64()).to_numpy(zero_copy_only=False)


def _join(first: pa.Array, second: pa.Array) -> pa.Array:
    """Both texts with a space between. A text that is null or shows nothing is left out."""
    no_first = pc.or_(pc.is_null(first), pa.array(shows_nothing(first)))
    no_second = pc.or_(pc.is_null(second), pa.array(shows_nothing(second)))
    # Not null_handling="skip": it leaves out the rows in which every value is null.
    both = pc.binary_join_element_wise(first, second, " ")
    return pc.if_else(no_first, second, pc.if_else(no_second, first, both))


def _keep_text_fields(batch: RowBatch, layout: Layout) -> None:
    """Pass the text fields through as columns too; the last one only where it is not the whole text."""
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
    if layout.fields[-1].may_be_blank:  # otherwise the check of that field has made sure of a text
        _reject_unseen(batch, "text", "text")
    ids = batch.columns["id"]
    if ids.null_count:
        derived = pa.array([f"{stem}:{line}" for line in batch.lines.tolist()], pa.string())
        batch.columns["id"] = pc.coalesce(ids, derived)
        batch.derived_ids = True
