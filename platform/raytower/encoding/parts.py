"""One output file of the encoding job: written block by block, hashed on its way, visible only when it is whole."""

from __future__ import annotations

import hashlib
import io
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from raytower.data.pieces import Piece
from raytower.encoding.manifest import EmbeddingsFile
from raytower.storage import Location

_SUFFIX = ".parquet"


def part_name(piece: Piece) -> str:
    """The output file of a piece; its number is the piece's place in the corpus."""
    return f"part-{piece.index:08d}{_SUFFIX}"


def is_left_over(name: str) -> bool:
    """Whether a file of this name is what a killed writer of a part, or of its record, left behind."""
    return name.startswith((".part-", "..part-")) and name.endswith(".tmp")


@dataclass(frozen=True, kw_only=True)
class PartFigures:
    """A finished file with what it took: tokens, and tokens computed with padding counted."""

    file: EmbeddingsFile
    tokens: int
    padded_tokens: int

    @staticmethod
    def of(values: dict[str, Any]) -> PartFigures:
        """The figures again that `asdict` made `values` of."""
        return PartFigures(**{**values, "file": EmbeddingsFile(**values["file"])})


class PartWriter:
    """Takes blocks of rows with their vectors; each is written in a thread while the next is computed."""

    def __init__(
        self, name: str, sink: IO[bytes] | pa.NativeFile, dtype: str, thread: ThreadPoolExecutor
    ) -> None:
        self.seconds = 0.0
        self._name = name
        self._sink = _HashingSink(sink)
        self._dtype = dtype
        self._writer: pq.ParquetWriter | None = None
        self._rows = 0
        self._thread = thread
        self._pending: Future[None] | None = None

    def write(self, table: pa.Table, vectors: NDArray[np.float32]) -> None:
        """Add the rows of `table` with `vectors` (rows, dim); what writing raises comes with the next call."""
        self._wait()
        self._pending = self._thread.submit(self._write, table, vectors)

    def finish(self, tokens: int, padded_tokens: int) -> PartFigures:
        """Write the footer; the file's bytes are final afterwards."""
        self._wait()
        started = time.perf_counter()
        assert self._writer is not None, "a part has at least one block"
        self._writer.close()
        self.seconds += time.perf_counter() - started
        file = EmbeddingsFile(
            name=self._name, rows=self._rows, bytes=self._sink.num_bytes, sha256=self._sink.hexdigest()
        )
        return PartFigures(file=file, tokens=tokens, padded_tokens=padded_tokens)

    def _wait(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write(self, table: pa.Table, vectors: NDArray[np.float32]) -> None:
        started = time.perf_counter()
        whole = _with_vectors(table, vectors.astype(self._dtype, copy=False))
        if self._writer is None:
            self._writer = _open_parquet(self._sink, whole.schema)
        self._writer.write_table(whole, row_group_size=len(whole))
        self._rows += len(whole)
        self.seconds += time.perf_counter() - started


@contextmanager
def open_part(place: Location, dtype: str) -> Iterator[PartWriter]:
    """A writer for the file at `place`, with vectors as `dtype`; the file appears when the block ends well."""
    with place.open_write() as sink, ThreadPoolExecutor(max_workers=1, thread_name_prefix="write") as thread:
        yield PartWriter(place.name, sink, dtype, thread)


def write_part(place: Location, table: pa.Table, vectors: NDArray[Any], metadata: dict[bytes, bytes]) -> None:
    """Write id, text, embedding (rows, dim) and the other columns of `table` as one Parquet file, atomically."""
    whole = _with_vectors(table, vectors)
    with place.open_write() as sink, _open_parquet(sink, whole.schema) as writer:
        writer.write_table(whole)
        writer.add_key_value_metadata(metadata)


def _open_parquet(sink: Any, schema: pa.Schema) -> pq.ParquetWriter:
    # Vectors do not compress; trying, and dictionaries or statistics on them, only costs time.
    others = [path for path in _leaf_columns(schema) if not path.startswith("embedding.")]
    return pq.ParquetWriter(
        sink,
        schema,
        compression=dict.fromkeys(others, "zstd"),
        use_dictionary=False,
        write_statistics=others,
    )


def _leaf_columns(schema: pa.Schema) -> list[str]:
    """Parquet's names for the columns, those inside of lists and structs included."""
    sample = io.BytesIO()
    pq.write_table(schema.empty_table(), sample)
    columns = pq.ParquetFile(sample).schema
    return [columns.column(number).path for number in range(len(columns))]


def _with_vectors(table: pa.Table, vectors: NDArray[Any]) -> pa.Table:
    """`table` without its metadata, and with the column `embedding` behind `text`."""
    flat = pa.array(np.ascontiguousarray(vectors).reshape(-1))
    embedding = pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
    position = table.schema.get_field_index("text") + 1
    return table.add_column(position, "embedding", embedding).replace_schema_metadata(None)


class _HashingSink(io.RawIOBase):
    """Passes bytes on and hashes them, so that a finished file need not be read again."""

    def __init__(self, sink: IO[bytes] | pa.NativeFile) -> None:
        self.num_bytes = 0
        self._sink = sink
        self._digest = hashlib.sha256()

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.num_bytes

    def write(self, content: Any) -> int:
        self._sink.write(content)
        self._digest.update(content)
        self.num_bytes += len(content)
        return len(content)

    def hexdigest(self) -> str:
        return self._digest.hexdigest()
