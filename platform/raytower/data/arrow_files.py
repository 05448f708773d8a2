"""Arrow's own files, of its file and of its stream format, read as `pyarrow.parquet.ParquetFile` reads Parquet."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pyarrow as pa


class ArrowFile:
    """One row group, however the rows were written in batches."""

    def __init__(self, stream: pa.NativeFile):
        """Raises ArrowInvalid where the stream holds neither format."""
        self._stream = stream
        self._is_file = stream.read(6) == b"ARROW1"
        self.schema_arrow: pa.Schema = self._open().schema

    @property
    def num_rows(self) -> int:
        return sum(len(batch) for batch in self._batches())

    def iter_batches(
        self, batch_size: int, row_groups: Sequence[int], columns: Sequence[str] | None
    ) -> Iterator[pa.RecordBatch]:
        """The rows of `columns` (all for None), in order and from the first on; `batch_size` is not kept to."""
        names = self.schema_arrow.names if columns is None else list(columns)
        return (batch.select(names) for batch in self._batches())

    def _batches(self) -> Iterator[pa.RecordBatch]:
        reader = self._open()
        if self._is_file:
            return (reader.get_batch(number) for number in range(reader.num_record_batches))
        return iter(reader)

    def _open(self) -> pa.ipc.RecordBatchFileReader | pa.ipc.RecordBatchStreamReader:
        self._stream.seek(0)
        return pa.ipc.open_file(self._stream) if self._is_file else pa.ipc.open_stream(self._stream)
