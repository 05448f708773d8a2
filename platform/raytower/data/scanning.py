"""Going through a source chunk by chunk, and reading any of those chunks again on its own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from raytower.data.layouts import Source
from raytower.data.parquet import RowGroupReader
from raytower.data.row_batch import Parsed
from raytower.data.rows import parse_slice, raw_line
from raytower.data.slices import RangeReader, Slice, iter_elements, iter_slices


@dataclass(frozen=True)
class Extent:
    """A run of rows of one file: decompressed bytes [start, end), or rows [start, end) of a Parquet row group."""

    start: int
    end: int
    first_line: int
    """Line number (Parquet: row number) of the first row, counted from 1."""
    row_group: int | None = None


@dataclass(frozen=True)
class Chunk:
    """One extent with its rows parsed."""

    extent: Extent
    parsed: Parsed
    content: Slice | pa.Table

    def raw(self, line: int) -> bytes:
        """The row's bytes as they stand in the file; for Parquet the row as JSON."""
        if isinstance(self.content, Slice):
            return raw_line(self.content, line)
        row = self.content.slice(line - self.extent.first_line, 1)
        values = {name: _plain_value(row.column(name)[0]) for name in row.column_names}
        return json.dumps(values, ensure_ascii=False, default=str).encode("utf-8")


def scan(source: Source, rows_per_chunk: int) -> Iterator[Chunk]:
    """Every row of `source`, parsed, in chunks of at most `rows_per_chunk` rows; chunks of Parquet end with row groups.

    Raises:
        InputError: the file cannot be read.
    """
    chunks = _scan_columnar if source.layout.is_columnar else _scan_text
    return chunks(source, rows_per_chunk)


class ExtentReader:
    """Reads extents of one source; in file order each byte is read once, compressed or not."""

    def __init__(self, source: Source):
        self.source = source
        self._parquet = RowGroupReader(source) if source.layout.is_columnar else None
        self._text = None if self._parquet else RangeReader(source.file)

    def read(self, extent: Extent) -> Chunk:
        """Raises InputError where the file can no longer be read."""
        if self._parquet is not None and extent.row_group is not None:
            rows = self._parquet.read(extent.row_group, extent.start, extent.end - extent.start)
            return Chunk(extent, self._parquet.parse(rows, extent.first_line), rows)
        assert self._text is not None
        data = self._text.read(extent.start, extent.end - extent.start)
        content = Slice(extent.start, extent.first_line, data, self.source.layout.cut)
        return Chunk(extent, parse_slice(content, self.source), content)


def _plain_value(cell: pa.Scalar) -> Any:
    """The value of `cell`; strings that are no UTF-8 with their odd bytes escaped, dates beyond Python's as numbers."""
    try:
        return cell.as_py()
    except (ValueError, OverflowError):
        if isinstance(cell, pa.StructScalar):
            return {name: _plain_value(member) for name, member in cell.items()}
        if isinstance(cell, pa.DictionaryScalar):
            return _plain_value(cell.value)
        if isinstance(cell, pa.ListScalar | pa.LargeListScalar | pa.FixedSizeListScalar):
            return [_plain_value(element) for element in cell.values]
        if isinstance(cell, pa.TimestampScalar | pa.Date32Scalar | pa.Date64Scalar):
            return cell.value
        return cell.as_buffer().to_pybytes().decode("utf-8", errors="backslashreplace")


def _scan_text(source: Source, rows_per_chunk: int) -> Iterator[Chunk]:
    layout = source.layout
    slices = (
        iter_elements(source.file, layout.body_start, rows_per_chunk)
        if layout.cut == "elements"
        else iter_slices(
            source.file, layout.body_start, layout.first_line, rows_per_chunk, quoted=layout.cut == "quoted"
        )
    )
    for content in slices:
        extent = Extent(content.start, content.end, content.first_line)
        yield Chunk(extent, parse_slice(content, source), content)


def _scan_columnar(source: Source, rows_per_chunk: int) -> Iterator[Chunk]:
    reader = RowGroupReader(source)
    first_row = 1
    for group, num_rows in enumerate(reader.row_counts()):
        for start in range(0, num_rows, rows_per_chunk):
            end = min(start + rows_per_chunk, num_rows)
            rows = reader.read(group, start, end - start)
            extent = Extent(start, end, first_row + start, group)
            yield Chunk(extent, reader.parse(rows, extent.first_line), rows)
        first_row += num_rows
