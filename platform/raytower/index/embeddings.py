"""An embeddings folder as rows for the table: checked, streamed a batch at a time, never the corpus in memory."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from raytower.encoding.manifest import EmbeddingsFile, EmbeddingsManifest
from raytower.errors import FormatError, InputError
from raytower.index.config import ExactDtype
from raytower.index.costs import BATCH_ROWS
from raytower.index.manifest import Origin
from raytower.index.table import is_own, unified
from raytower.storage import HashedFile, Location

_READ_BUFFER_BYTES = 2**20
_FOOTERS_AT_ONCE = 16
# Files written by one task: a fragment of the table, so that what a killed job had written is found again.
_ROWS_PER_GROUP = 1 << 20
_REMEDY = "encode the corpus again"


class Embeddings:
    """The rows of an embeddings folder, files in manifest order. It travels to workers as its folder's name."""

    def __init__(self, folder: Location) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return Embeddings, (self.folder,)

    @cached_property
    def manifest(self) -> EmbeddingsManifest:
        """Raises FormatError where the folder is unfinished or none."""
        return EmbeddingsManifest.read(self.folder)

    @property
    def origin(self) -> Origin:
        made = self.manifest
        same = {name: getattr(made, name) for name in Origin.model_fields if name != "metric"}
        # The metric that these vectors were trained for.
        return Origin(**same, metric="cosine" if made.similarity == "cosine" else "inner_product")

    @property
    def rows(self) -> int:
        return self.manifest.rows

    @property
    def dtype(self) -> ExactDtype:
        return self.manifest.dtype

    @property
    def text_bytes(self) -> int:
        """About what ids, texts and other columns take."""
        vectors = self.rows * self.manifest.dim * np.dtype(self.dtype).itemsize
        return max(sum(item.bytes for item in self.manifest.files) - vectors, 0)

    def identity(self) -> list[list[Any]]:
        """JSON that two folders share only if they hold the same rows."""
        return [[item.name, item.rows, item.sha256] for item in self.manifest.files]

    def groups(self) -> list[tuple[int, int]]:
        """Half-open ranges of files whose rows fit one fragment of the table; a larger file stands alone."""
        groups: list[tuple[int, int]] = []
        start = rows = 0
        for number, entry in enumerate(self.manifest.files):
            if number > start and rows + entry.rows > _ROWS_PER_GROUP:
                groups.append((start, number))
                start, rows = number, 0
            rows += entry.rows
        return [*groups, (start, len(self.manifest.files))] if self.manifest.files else []

    def first_row(self, file: int) -> int:
        return sum(entry.rows for entry in self.manifest.files[:file])

    def documents_schema(self) -> pa.Schema:
        """The documents' columns over all files, from the ends of those files.

        Raises:
            FormatError: a file is missing or no embeddings file. InputError: files whose columns do not agree, or
                columns with names that the table keeps for itself.
        """
        with ThreadPoolExecutor(_FOOTERS_AT_ONCE) as pool:
            schemas = list(pool.map(self._file_schema, self.manifest.files))
        schema = pa.schema([])
        for entry, found in zip(self.manifest.files, schemas, strict=True):
            schema = found if not len(schema) or schema.equals(found) else unified(schema, found, entry.name)
        for name in schema.names:
            if not name or set(name) & set("`.\0"):
                raise InputError(
                    f"{self.folder} has a column {name!r}; names hold no dot and no backtick: rename it"
                )
            if is_own(name):
                raise InputError(
                    f"{self.folder} has a column {name!r}, a name that the index keeps for itself; rename it"
                )
        return schema

    def ids(self) -> pa.Array:
        """The ids of all rows: of an addition, which is small beside its index."""
        parts = []
        for entry in self.manifest.files:
            with self._opened(entry) as file:
                parts += file.read(columns=["id"])["id"].cast(pa.large_string()).chunks
        return pa.concat_arrays(parts) if parts else pa.array([], pa.large_string())

    def stream(self, file: int) -> Iterator[tuple[pa.Table, NDArray[np.float32]]]:
        """Documents and vectors (N, D) of a file, of unit length under cosine.

        The checksum is taken of the same reading, so it is proved behind the last batch: what was made of the batches
        counts only once the stream has ended.

        Raises:
            FormatError: the file is missing, changed, of another row count, or has other columns.
            InputError: a vector that is null, not finite, of the wrong dimension, or zero under cosine; a null id.
        """
        entry = self.manifest.files[file]
        place = self.folder / entry.name
        with self._opened(entry) as described:
            footer = described.metadata
        with HashedFile(place) as content:
            try:
                yield from self._batches(content, footer, place)
            except (pa.ArrowException, OSError, InputError):
                # Of a changed file that is said, and not where it led to.
                place.prove_content(content.sha256(), entry.sha256, _REMEDY)
                raise
            place.prove_content(content.sha256(), entry.sha256, _REMEDY)

    def _batches(
        self, content: HashedFile, footer: pq.FileMetaData, place: Location
    ) -> Iterator[tuple[pa.Table, NDArray[np.float32]]]:
        first = 0
        # Given the footer, the file is read from its beginning on.
        opened = pq.ParquetFile(
            pa.PythonFile(content, mode="r"),
            metadata=footer,
            pre_buffer=False,
            buffer_size=_READ_BUFFER_BYTES,
        )
        for record in opened.iter_batches(batch_size=BATCH_ROWS):
            table = pa.table(record)
            if table["id"].null_count:
                raise InputError(f"{place} has rows without an id; every document needs one")
            yield table.drop_columns(["embedding"]), _vectors_of(table, self.origin, place, first)
            first += table.num_rows

    def _file_schema(self, entry: EmbeddingsFile) -> pa.Schema:
        with self._opened(entry) as file:
            schema = file.schema_arrow
        return schema.remove(schema.get_field_index("embedding")).remove_metadata()

    @contextmanager
    def _opened(self, entry: EmbeddingsFile) -> Iterator[pq.ParquetFile]:
        place = self.folder / entry.name
        if not place.is_file():
            raise FormatError(f"{place} is missing but the manifest beside it lists it; {_REMEDY}")
        with place.open_read() as stream:
            try:
                # A buffer in place of whole row groups read ahead: a third less memory while a table is filled.
                file = pq.ParquetFile(stream, pre_buffer=False, buffer_size=_READ_BUFFER_BYTES)
            except (pa.ArrowInvalid, OSError) as error:
                raise FormatError(f"{place} is no whole Parquet file: {error}; {_REMEDY}") from error
            if file.metadata.num_rows != entry.rows:
                raise FormatError(
                    f"{place} has {file.metadata.num_rows} rows, its manifest says {entry.rows}"
                )
            missing = {"id", "text", "embedding"} - set(file.schema_arrow.names)
            if missing:
                raise FormatError(f"{place} lacks the columns {sorted(missing)}; it is no embeddings file")
            yield file


def _vectors_of(table: pa.Table, made: Origin, place: Location, first_row: int) -> NDArray[np.float32]:
    column = table["embedding"].combine_chunks()
    kind = column.type
    if not pa.types.is_fixed_size_list(kind) or kind.list_size != made.dim:
        raise FormatError(
            f"{place} has embeddings of type {kind}; its manifest says fixed_size_list of {made.dim} dimensions"
        )
    flat = column.flatten()
    if column.null_count or flat.null_count:
        raise InputError(f"{place} has null vectors from row {first_row} on; encode the corpus again")
    values = flat.to_numpy(zero_copy_only=False).reshape(-1, made.dim)
    vectors: NDArray[np.float32] = np.ascontiguousarray(values, dtype=np.float32)
    _refuse(~np.isfinite(vectors).all(axis=1), "that holds NaN or infinity", table, place, first_row)
    if made.metric == "cosine":
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        _refuse(norms[:, 0] == 0, "that is zero, which has no cosine with anything", table, place, first_row)
        vectors = vectors / norms
    return vectors


def _refuse(bad: Any, what: str, table: pa.Table, place: Location, first_row: int) -> None:
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        name = table["id"][row].as_py()
        raise InputError(
            f"{place} row {first_row + row}: id {name!r} has a vector {what} ({int(bad.sum())} such rows near it); "
            "check the encoder and encode the corpus again"
        )
