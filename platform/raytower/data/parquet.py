"""Row ranges of Parquet files as records."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raytower.data.arrow_files import ArrowFile
from raytower.data.layouts import Source, free_name, parquet_columns
from raytower.data.records import RecordField
from raytower.data.row_batch import Parsed, RowBatch
from raytower.data.rows import to_records
from raytower.errors import InputError

_BATCH_ROWS = 8192


class RowGroupReader:
    """Reads row ranges of one file; ranges asked for in order decode each row group once."""

    def __init__(self, source: Source):
        """Raises InputError where the file is no Parquet, or lacks a column that the records need."""
        self.source = source
        try:
            stream = source.file.open()
            self._file = ArrowFile(stream) if source.layout.format == "arrow" else pq.ParquetFile(stream)
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
            raise InputError(f"{self.source.file} cannot be read in row group {group}: {error}") from error
        schema = pa.schema([self._file.schema_arrow.field(name) for name in self._wanted])
        return pa.Table.from_batches(parts) if parts else schema.empty_table()

    def parse(self, rows: pa.Table, first_row: int) -> Parsed:
        """`rows`, the first of which is row `first_row` of the file (counted from 1), as records."""
        batch = RowBatch(np.arange(first_row, first_row + len(rows), dtype=np.int64), {})
        for wanted in self.source.layout.fields:
            column = self._names[wanted.name]
            values = pa.nulls(len(rows), wanted.read_type) if column is None else rows.column(column)
            batch.columns[wanted.name] = _as_read(values, wanted)
        if self.source.layout.passes_columns_through:
            taken = set(self._names.values())
            batch.extra = {
                free_name(n): rows.column(n).combine_chunks() for n in rows.column_names if n not in taken
            }
        for wanted in self.source.layout.fields:
            _reject_bad_utf8(batch, wanted)
        return to_records(batch, self.source.layout, self.source.file.stem)

    def _begin(self, group: int) -> None:
        self._group, self._position, self._rest = group, 0, None
        try:
            columns = list(dict.fromkeys(self._wanted))
            self._batches = self._file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=columns)
        except (pa.ArrowInvalid, OSError, IndexError) as error:
            raise InputError(f"{self.source.file} cannot be read in row group {group}: {error}") from error


def _as_read(column: pa.ChunkedArray | pa.Array, wanted: RecordField) -> pa.Array:
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    return array.cast(wanted.read_type, safe=not wanted.is_list)  # unsafe: integer scores may be rounded


def _reject_bad_utf8(batch: RowBatch, wanted: RecordField) -> None:
    column = batch.columns[wanted.name]
    try:
        column.validate(full=True)
        return
    except pa.ArrowInvalid:
        pass
    raw = column.cast(pa.list_(pa.binary()) if wanted.is_list else pa.binary()).to_pylist()
    batch.reject(
        np.array([not _is_utf8(value) for value in raw]), lambda i: f"{wanted.names[0]} is not UTF-8"
    )


def _is_utf8(value: bytes | list[bytes | None] | None) -> bool:
    if isinstance(value, list):
        return all(_is_utf8(element) for element in value)
    try:
        (value or b"").decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
