"""How the rows of one file are to be read: its format, its columns, and where its rows begin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

from raytower.data.records import (
    EXPECTED_HEADER,
    HEADERLESS,
    RecordField,
    RecordKind,
    fields_of,
    is_corpus_like,
)
from raytower.data.slices import RangeReader
from raytower.data.sources import FORMAT_BY_SUFFIX, InputConfig, SourceFile
from raytower.errors import InputError

FileFormat = Literal["lines", "tsv", "jsonl", "parquet"]

_BOM = b"\xef\xbb\xbf"
_FIRST_LINE_BYTES = 1024 * 1024


@dataclass(frozen=True)
class Layout:
    """What to read from a file, and from where on. Picklable."""

    kind: RecordKind
    format: FileFormat
    fields: tuple[RecordField, ...]
    columns: tuple[str, ...] = ()
    """TSV and lines: the name of each column, from the header or from what the kind says. Empty elsewhere."""
    body_start: int = 0
    """Byte at which the first row begins, after a byte order mark and a header."""
    first_line: int = 1

    @property
    def passes_columns_through(self) -> bool:
        return self.kind == "corpus"

    @property
    def has_ids(self) -> bool:
        """Whether rows may bring ids of their own."""
        return is_corpus_like(self.kind) and (not self.columns or self.column_of(self.fields[0]) is not None)

    def column_of(self, field: RecordField) -> str | None:
        """The TSV column that `field` is read from, or None."""
        return name_among(field, self.columns)


@dataclass(frozen=True)
class Source:
    """A file and how to read it."""

    file: SourceFile
    layout: Layout


def name_among(field: RecordField, columns: Sequence[str]) -> str | None:
    """The best of the field's names that is one of `columns`, or None."""
    return next((name for name in field.names if name in columns), None)


def detect_layout(file: SourceFile, kind: RecordKind, config: InputConfig) -> Layout:
    """Decide from the config, the extension and the first line how `file` is read as records of `kind`.

    Raises:
        InputError: the format cannot be told or does not fit the kind, a header is missing, or `id_field` names a
            column that the file does not have.
    """
    file_format = _detect_format(file, kind, config)
    fields = fields_of(kind, tuple(config.text_fields), config.id_field)
    if file_format not in ("jsonl", "parquet") and any(field.is_list for field in fields):
        raise InputError(
            f"{file}: {kind} records hold lists, which format {file_format} cannot carry; give JSON lines or Parquet "
            "(input.format jsonl or parquet)"
        )
    if file_format == "parquet":
        return Layout(kind, "parquet", fields)
    line, body_start, after_line = first_line(file)
    if file_format == "jsonl":
        return Layout(kind, "jsonl", fields, body_start=body_start)
    if file_format == "lines":
        if not is_corpus_like(kind):
            raise InputError(
                f"{file}: format lines holds one text a row, and {kind} records need more; set input.format to tsv, "
                "jsonl or parquet"
            )
        columns: tuple[str, ...] = (config.text_fields[-1],)
        has_header = False
    else:
        columns, has_header = _tsv_columns(file, kind, config, tuple(line.split("\t")), fields)
    layout = Layout(
        kind,
        "lines" if file_format == "lines" else "tsv",
        fields,
        columns,
        after_line if has_header else body_start,
        2 if has_header else 1,
    )
    if config.id_field and is_corpus_like(kind) and not layout.has_ids:
        raise InputError(
            f"{file}: input.id_field is {config.id_field!r}, but the file has no such column "
            f"(columns: {', '.join(columns)}); remove id_field or name a column of the file"
        )
    return layout


def refuse_repeated(file: SourceFile, columns: Sequence[str]) -> None:
    """Raise InputError where a file has two columns of one name: only one of them could be read."""
    for name in columns:
        if columns.count(name) > 1:
            raise InputError(f"{file}: two columns are named {name!r}; give each a name of its own")


def refuse_other_kind(place: str, kind: RecordKind, columns: Sequence[str]) -> None:
    """Raise InputError where pairs are asked for and the columns say that the file holds judged texts."""
    if kind != "pairs":
        return
    for column, other in (("label", "scored"), ("neg_title", "triples"), ("negative", "triples")):
        if column in columns:
            raise InputError(
                f"{place}: the file has {column!r}, so its rows are {other} and not pairs (every row would count as "
                f"a match); read it as {other}"
            )


def _detect_format(file: SourceFile, kind: RecordKind, config: InputConfig) -> str:
    if config.format == "beir":
        raise InputError(
            f"{file}: format beir needs a folder with corpus.jsonl, not a file; give the folder's path"
        )
    if config.format != "auto":
        return config.format
    if not file.suffix:
        return _sniff_format(file, kind)
    known = FORMAT_BY_SUFFIX.get(file.suffix)
    if known is None:
        raise InputError(
            f"{file}: the extension {file.suffix!r} tells no format (known: {', '.join(FORMAT_BY_SUFFIX)}, also "
            "with .gz or .zst); set input.format"
        )
    return "tsv" if known == "lines" and not is_corpus_like(kind) else known


def _sniff_format(file: SourceFile, kind: RecordKind) -> str:
    with RangeReader(file) as reader:
        head = reader.read(0, 4)
    if head == b"PAR1":
        return "parquet"
    line = first_line(file)[0]
    if line.lstrip().startswith("{"):
        return "jsonl"
    return "tsv" if "\t" in line or not is_corpus_like(kind) else "lines"


def first_line(file: SourceFile) -> tuple[str, int, int]:
    """The first line, the byte at which it begins and the byte after it. It is only looked at, so bad bytes pass."""
    with RangeReader(file) as reader:
        head = reader.read(0, _FIRST_LINE_BYTES)
    start = len(_BOM) if head.startswith(_BOM) else 0
    newline = head.find(b"\n", start)
    end = len(head) if newline < 0 else newline
    line = head[start:end].removesuffix(b"\r").decode("utf-8", errors="replace")
    return line, start, len(head) if newline < 0 else newline + 1


def _tsv_columns(
    file: SourceFile,
    kind: RecordKind,
    config: InputConfig,
    first: tuple[str, ...],
    fields: tuple[RecordField, ...],
) -> tuple[tuple[str, ...], bool]:
    """The columns of a TSV whose first line is `first`, and whether that line is a header."""
    refuse_other_kind(f"{file}:1", kind, first if len(first) > 2 else ())
    if is_corpus_like(kind):
        return _corpus_columns(config, first, fields)
    expected = EXPECTED_HEADER.get(kind)
    required = [name_among(field, first) for field in fields if field.required]
    known = {name_among(field, first) for field in fields}
    names_all = None not in required and len(set(required)) == len(required)
    # Where a header is not the rule, a line is one only if every column bears a known name.
    if names_all and (expected is not None or known >= set(first)):
        return first, True
    if expected is not None:
        raise InputError(
            f"{file}:1: no header; the first line of a {kind} file names its columns: {'<TAB>'.join(expected)}. "
            f"It is {'<TAB>'.join(first)[:120]!r}; add the header, or check that the file holds {kind}"
        )
    return HEADERLESS[kind], False


def _corpus_columns(
    config: InputConfig, first: tuple[str, ...], fields: tuple[RecordField, ...]
) -> tuple[tuple[str, ...], bool]:
    identifier, *texts = fields
    named_texts = [field for field in texts if name_among(field, first) is not None]
    has_id = name_among(identifier, first) is not None
    if len(first) > 1 and name_among(texts[-1], first) is not None and (has_id or len(named_texts) > 1):
        return first, True
    text_name = config.text_fields[-1]
    if len(first) == 1 and config.format == "auto":
        return (text_name,), False
    return (identifier.names[0], text_name), False


def parquet_columns(file: SourceFile, layout: Layout, schema: pa.Schema) -> dict[str, str | None]:
    """The Parquet column that each field is read from; None for an optional field that the file does not have.

    Raises:
        InputError: a required column is missing or of a type that cannot be read as what the field holds.
    """
    refuse_repeated(file, schema.names)
    refuse_other_kind(str(file), layout.kind, schema.names)
    chosen: dict[str, str | None] = {}
    for field in layout.fields:
        name = name_among(field, schema.names)
        if name is None and field.required:
            raise InputError(
                f"{file}: no column {' or '.join(map(repr, field.names))}; {layout.kind} records need one. "
                f"The file has: {', '.join(schema.names)}"
            )
        if name is not None and not _fits(schema.field(name).type, field):
            raise InputError(
                f"{file}: column {name!r} is {schema.field(name).type}, which is no "
                f"{'list of ' if field.is_list else ''}{field.type}"
            )
        chosen[field.name] = name
    return chosen


def _fits(data_type: pa.DataType, field: RecordField) -> bool:
    if field.is_list:
        return _is_list(data_type) and _holds(data_type.value_type, field)
    return _holds(data_type, field)


def _is_list(data_type: pa.DataType) -> bool:
    kinds = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return any(is_kind(data_type) for is_kind in kinds)


def _holds(data_type: pa.DataType, field: RecordField) -> bool:
    """Whether values of `data_type` can be read as values, or list elements, of the field."""
    if pa.types.is_dictionary(data_type):
        data_type = data_type.value_type
    is_text = (
        pa.types.is_string(data_type)
        or pa.types.is_large_string(data_type)
        or pa.types.is_string_view(data_type)
        or pa.types.is_null(data_type)
    )
    is_number = pa.types.is_integer(data_type) or pa.types.is_floating(data_type)
    if field.type == "numbers":
        return is_number or pa.types.is_null(data_type)
    by_type = {
        "text": False,
        "texts": False,
        "id": pa.types.is_integer(data_type),
        "number": is_number,
        "category": is_number,
    }
    return is_text or by_type[field.type]
