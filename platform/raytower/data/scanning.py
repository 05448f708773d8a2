"""Going through a source chunk by chunk, and reading any of those chunks again on its own."""

from __future__ import annotations

from collections.abc import Iterator

from raytower.data.layouts import Source
from raytower.data.parquet import RowGroupReader
from raytower.data.row_batch import Chunk
from raytower.data.rows import parse_slice
from raytower.data.slices import Extent, RangeReader, Slice, iter_slices


class TextReader:
    """Reads extents of a text file; in file order each byte is read once, compressed or not."""

    def __init__(self, source: Source):
        self.source = source
        self._bytes = RangeReader(source.file)

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
        return Chunk(content.extent, parse_slice(content, self.source), content)


def open_reader(source: Source) -> TextReader | RowGroupReader:
    """Raises InputError where the file cannot be opened, or lacks a column that the records need."""
    return RowGroupReader(source) if source.layout.is_columnar else TextReader(source)
