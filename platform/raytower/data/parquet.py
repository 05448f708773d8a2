"""Row ranges of Parquet files as records."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raytower.data.arrow_files import ArrowFile
from raytower.data.layouts import Source, parquet_columns
from raytower.data.records import RecordField
from raytower.data.row_batch import Parsed, RowBatch
from raytower.data.rows import to_records
from raytower.data.slices import MAX_SLICE_BYTES
from raytower.errors import InputError

_BATCH_ROWS = 8192
_BATCH_BYTES = MAX_SLICE_BYTES


class RowGroupReader:
    """Reads row ranges of one file; ranges asked for in order decode each row group once."""

    def __init__(self, source: Source):
        """Raises InputError where the file is no Parquet, or lacks a column that the records need."""
        self.source = source
        try:
            stream = source.file.open()
            # Of Spark's INT96 timestamps nanoseconds hold the years 1678 to 2261 only, and wrap around beyond.
            self._file: ArrowFile | pq.ParquetFile = (
                ArrowFile(stream)
                if source.layout.format == "arrow"
                else pq.ParquetFile(stream, coerce_int96_timestamp_unit="us")
            )
        except (pa.ArrowInvalid, OSError) as error:
            name = {"parquet": "Parquet", "arrow": "Arrow"}[source.layout.format]
            raise InputError(f"{source.file} is no readable {name} file: {error}") from error
        self._names = parquet_columns(source.file, source.layout, self._file.schema_arrow)
        self._wanted = [name for name in self._names.values() if name is not None]
        if source.layout.passes_columns_through:
            self._wanted = self._file.schema_arrow.names
        self._group = -1
        self._position = 0
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._rest: pa.RecordBatch | None = None

    def row_counts(self) -> list[int]:
        """Rows of each row group."""
        if isinstance(self._file, ArrowFile):
            return [self._file.num_rows]
        metadata = self._file.metadata
        return [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]

    def read(self, group: int, start: int, num_rows: int) -> pa.Table:
        """`num_rows` rows of row group `group` from its row `start` on; fewer only at the group's end."""
        if group != self._group or start < self._position:
            self._begin(group)
        parts: list[pa.RecordBatch] = []
        try:
            while num_rows > 0:
                batch = self._rest if self._rest is not None else next(self._batches, None)
                self._rest = None
                if batch is None:
                    break
                skip = min(start - self._position, len(batch))
                taken = batch.slice(skip, num_rows)
                self._position += skip + len(taken)
                start, num_rows = start + len(taken), num_rows - len(taken)
                if len(taken):
                    parts.append(taken)
                if skip + len(taken) < len(batch):
                    self._rest = batch.slice(skip + len(taken))
        except (pa.ArrowInvalid, OSError) as error:
            raise InputError(
                f"{self.source.file} cannot be read in row group {group}{self._damaged_column(group)}: {error}"
            ) from error
        schema = pa.schema([self._file.schema_arrow.field(name) for name in self._wanted])
        return pa.Table.from_batches(parts) if parts else schema.empty_table()

    def parse(self, rows: pa.Table, first_row: int) -> Parsed:
        """`rows`, the first of which is row `first_row` of the file (counted from 1), as records."""
        parts = []
        for record in rows.to_batches() or [pa.RecordBatch.from_pylist([], rows.schema)]:
            parts.append(self._parse_batch(record, first_row))
            first_row += len(record)
        return Parsed.joined(parts)

    def _parse_batch(self, rows: pa.RecordBatch, first_row: int) -> Parsed:
        batch = RowBatch(np.arange(first_row, first_row + len(rows), dtype=np.int64), {})
        for wanted in self.source.layout.fields:
            column = self._names[wanted.name]
            values = pa.nulls(len(rows), wanted.read_type) if column is None else rows.column(column)
            batch.columns[wanted.name] = _as_read(values, wanted)
        if self.source.layout.passes_columns_through:
            taken = set(self._names.values())
            batch.extra = {name: rows.column(name) for name in rows.schema.names if name not in taken}
        return to_records(batch, self.source)

    def _begin(self, group: int) -> None:
        self._group, self._position, self._rest = group, 0, None
        try:
            rows = _BATCH_ROWS
            if not isinstance(self._file, ArrowFile):
                size = self._file.metadata.row_group(group)
                rows = min(max(_BATCH_BYTES * size.num_rows // max(size.total_byte_size, 1), 1), rows)
            # Given by name, a column whose name has a dot would be taken for a member of another.
            columns = None if self.source.layout.passes_columns_through else list(dict.fromkeys(self._wanted))
            self._batches = self._file.iter_batches(rows, row_groups=[group], columns=columns)
        except (pa.ArrowInvalid, OSError, IndexError) as error:
            raise InputError(f"{self.source.file} cannot be read in row group {group}: {error}") from error

    def _damaged_column(self, group: int) -> str:
        """Which column it is that cannot be read, for a message."""
        if isinstance(self._file, ArrowFile):
            return ""
        for name in self._wanted:
            try:
                self._file.read_row_group(group, columns=[name])
            except (pa.ArrowInvalid, OSError):
                return f", column {name!r}"
        return ""


def _as_read(array: pa.Array, wanted: RecordField) -> pa.Array:
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    return array.cast(wanted.read_type, safe=not wanted.is_list)  # unsafe: integer scores may be rounded
