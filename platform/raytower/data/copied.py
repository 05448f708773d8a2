"""Rows of an input as Arrow files of ours, from which any few thousand of them are read alone.

No way leads into the midst of a compressed file or of a row group: whoever wants rows from there reads all before them.
Rows that are read in no order are copied once.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass

import pyarrow as pa

from raytower.errors import InputError
from raytower.storage import Location

_ROWS = b"raytower.rows"


@dataclass(frozen=True)
class CopiedRows:
    """An Arrow file whose record batches, or runs of them, are the tables of pieces."""

    file: Location

    def read(self, start: int, end: int) -> pa.Table:
        """The rows of the record batches [start, end).

        Raises:
            InputError: the file is gone or damaged.
        """
        with self.file.open_read() as stream:
            try:
                reader = pa.ipc.open_file(stream)
                return pa.Table.from_batches(
                    [reader.get_batch(number) for number in range(start, end)], _without_notes(reader.schema)
                )
            except (pa.ArrowInvalid, OSError) as error:
                raise InputError(
                    f"{self.file}, a copy of training rows, cannot be read: {error}; remove its folder and start the "
                    "job again"
                ) from error

    def extents(self, num_rows: list[int]) -> list[tuple[int, int]] | None:
        """The record batches of each table, where a whole file is there whose tables have these rows; else None."""
        if not self.file.is_file():
            return None
        with self.file.open_read() as stream:
            try:
                notes = json.loads((pa.ipc.open_file(stream).schema.metadata or {})[_ROWS])
            except (pa.ArrowInvalid, KeyError, ValueError):
                return None
        return (
            [(start, end) for start, end, _ in notes] if [rows for _, _, rows in notes] == num_rows else None
        )

    def write(self, tables: Iterable[pa.Table], schema: pa.Schema) -> list[tuple[int, int]]:
        """Write a table after the other; returns the record batches of each. The file appears when it is whole.

        Raises:
            StorageError: the place cannot be written, or has no space left. What iterating over `tables` raises.
        """
        notes: list[tuple[int, int, int]] = []
        batches: list[pa.RecordBatch] = []
        for table in tables:
            own = table.combine_chunks().to_batches()
            notes.append((len(batches), len(batches) + len(own), table.num_rows))
            batches += own
        noted = schema.with_metadata({**(schema.metadata or {}), _ROWS: json.dumps(notes)})
        options = pa.ipc.IpcWriteOptions(compression="zstd")
        with self.file.open_write() as sink, pa.ipc.new_file(sink, noted, options=options) as writer:
            for batch in batches:
                writer.write_batch(batch)
        return [(start, end) for start, end, _ in notes]


def _without_notes(schema: pa.Schema) -> pa.Schema:
    kept = {key: value for key, value in (schema.metadata or {}).items() if key != _ROWS}
    return schema.with_metadata(kept or None)
