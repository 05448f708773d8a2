"""Row ranges of Parquet files, and of Arrow's own (its file and its stream format), as records."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raytower.data.layouts import Source, parquet_columns
from raytower.data.row_batch import Chunk, RowBatch
from raytower.data.rows import TextReader, to_records
from raytower.data.slices import MAX_SLICE_BYTES, Extent
from raytower.errors import InputError

_BATCH_ROWS = 8192
_BATCH_BYTES = MAX_SLICE_BYTES


class RowGroupReader:
    """Reads row ranges of one file; ranges asked for in order decode each row group once."""

    def __init__(self, source: Source):
        """Raises InputError where the file is no Parquet, or lacks a column that the records need."""
        self.source = source
        is_parquet = source.layout.format == "parquet"
        try:
            self._file = (_ParquetFile if is_parquet else _ArrowFile)(source.file.open())
        except (pa.ArrowInvalid, OSError) as error:
            name = "Parquet" if is_parquet else "Arrow"
            raise InputError(f"{source.file} is no readable {name} file: {error}") from error
        self._schema = self._file.schema
        self._names = parquet_columns(source.file, source.layout, self._schema)
        self._wanted = list(dict.fromkeys(name for name in self._names.values() if name is not None))
        if source.layout.passes_columns_through:
            self._wanted = self._schema.names
        self._group = -1
        self._position = 0
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._rest: pa.RecordBatch | None = None

    def scan(self, rows_per_chunk: int) -> Iterator[Chunk]:
        """Every row, parsed; chunks end with row groups. Raises InputError where the file cannot be read."""
        try:
            counts = self._file.row_counts()
        except (
            pa.ArrowInvalid,
            OSError,
        ) as error:  # only reading all of an Arrow stream shows that it is whole
            raise InputError(
                f"{self.source.file} is no readable Arrow file: {error}; write it again"
            ) from error
        first_row = 1
        for group, num_rows in enumerate(counts):
            for start in range(0, num_rows, rows_per_chunk):
                yield self.read(
                    Extent(start, min(start + rows_per_chunk, num_rows), first_row + start, group)
                )
            first_row += num_rows

    def read(self, extent: Extent) -> Chunk:
        """The rows of `extent`, fewer at the row group's end. Raises InputError where they cannot be read."""
        schema = pa.schema(map(self._schema.field, self._wanted))
        found = [batch for batch in self._batches_of(extent) if len(batch)]
        batches = found or [pa.RecordBatch.from_pylist([], schema)]
        parts = []
        first_row = extent.first_line
        for batch in batches:
            parts.append(self._parse(batch, first_row))
            first_row += len(batch)
        return Chunk(extent, parts, pa.Table.from_batches(batches))

    def _batches_of(self, extent: Extent) -> list[pa.RecordBatch]:
        group = extent.row_group or 0
        parts: list[pa.RecordBatch] = []
        try:
            if group != self._group or extent.start < self._position:
                self._group, self._position, self._rest = group, 0, None
                # Columns that pass through are not named here: pyarrow takes `a.b` for the member b of column a.
                columns = None if self.source.layout.passes_columns_through else self._wanted
                self._batches = self._file.batches(group, columns)
            while self._position < extent.end:
                batch = self._rest or next(self._batches, None)
                if batch is None:
                    break
                skip = min(max(extent.start - self._position, 0), len(batch))
                used = min(extent.end - self._position, len(batch))
                parts.append(batch.slice(skip, used - skip))
                self._rest, self._position = batch.slice(used), self._position + used
        except (pa.ArrowInvalid, OSError, IndexError) as error:
            raise InputError(
                f"{self.source.file} cannot be read in row group {group}{self._damaged_column(group)}: {error}"
            ) from error
        return parts

    def _parse(self, rows: pa.RecordBatch, first_row: int) -> RowBatch:
        lines = np.arange(first_row, first_row + len(rows), dtype=np.int64)
        batch = RowBatch(lines, {}, unread=frozenset(self._schema.names) - set(self._names.values()))
        for wanted in self.source.layout.fields:
            name = self._names[wanted.name]
            array = pa.nulls(len(rows), wanted.read_type) if name is None else rows.column(name)
            if pa.types.is_dictionary(array.type):
                array = array.dictionary_decode()
            if wanted.type == "category" and pa.types.is_floating(array.type):
                # A label that is no number is missing, and no class called nan.
                array = pc.if_else(pc.is_finite(array), array, pa.scalar(None, array.type))
            # Unsafe: integer scores may be rounded.
            batch.columns[wanted.name] = array.cast(wanted.read_type, safe=not wanted.is_list)
        if self.source.layout.passes_columns_through:
            taken = self._names.values()
            batch.extra = {name: rows.column(name) for name in rows.schema.names if name not in taken}
        return to_records(batch, self.source)

    def _damaged_column(self, group: int) -> str:
        """Names the column that cannot be read, for a message."""
        for name in self._wanted if isinstance(self._file, _ParquetFile) else []:
            try:
                for _ in self._file.batches(group, [name]):
                    pass
            except (pa.ArrowInvalid, OSError, IndexError):
                return f", column {name!r}"
        return ""


class _ParquetFile:
    def __init__(self, stream: pa.NativeFile):
        # Spark writes INT96 timestamps. Read as nanoseconds they would wrap around outside of the years 1678 to 2261.
        self._file = pq.ParquetFile(stream, coerce_int96_timestamp_unit="us")
        self.schema: pa.Schema = self._file.schema_arrow

    def row_counts(self) -> list[int]:
        metadata = self._file.metadata
        return [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]

    def batches(self, group: int, columns: list[str] | None) -> Iterator[pa.RecordBatch]:
        size = self._file.metadata.row_group(group)
        rows = min(max(_BATCH_BYTES * size.num_rows // max(size.total_byte_size, 1), 1), _BATCH_ROWS)
        return self._file.iter_batches(rows, row_groups=[group], columns=columns)


class _ArrowFile:
    """An Arrow file as one row group, whatever batches it was written in."""

    def __init__(self, stream: pa.NativeFile):
        self._stream = stream
        self._is_file = stream.read(6) == b"ARROW1"
        self.schema: pa.Schema = self._open().schema

    def row_counts(self) -> list[int]:
        return [sum(map(len, self.batches(0, None)))]

    def batches(self, group: int, columns: list[str] | None) -> Iterator[pa.RecordBatch]:
        reader = self._open()
        batches = map(reader.get_batch, range(reader.num_record_batches)) if self._is_file else reader
        return (batch if columns is None else batch.select(columns) for batch in batches)

    def _open(self) -> pa.ipc.RecordBatchFileReader | pa.ipc.RecordBatchStreamReader:
        self._stream.seek(0)
        return pa.ipc.open_file(self._stream) if self._is_file else pa.ipc.open_stream(self._stream)


def open_reader(source: Source) -> TextReader | RowGroupReader:
    """Raises InputError where the file cannot be opened, or lacks a column that the records need."""
    return RowGroupReader(source) if source.layout.is_columnar else TextReader(source)
