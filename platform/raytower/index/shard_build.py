"""Building one shard from rows of the table. Runs inside a Ray task, or in the process for few rows.

Shape legend: N rows, D dimension.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from raytower.errors import FormatError
from raytower.index.config import BuiltKind, ExactDtype
from raytower.index.faiss_import import import_faiss
from raytower.index.faiss_index import Vectors, fill, new_index, train
from raytower.index.manifest import EXACT_NAME, ROWS_NAME, SHARDS_NAME, VECTORS_NAME, FileEntry, ShardEntry
from raytower.index.measure import ExactHits, ExactSearch, Wanted
from raytower.index.rowmap import Rows
from raytower.index.table import DocumentTable
from raytower.storage import Location, publish_directory

SHARD_NAME = "shard.json"
_BATCH_ROWS = 8_192


@dataclass(frozen=True, kw_only=True)
class TableRows:
    """Some rows of a version of the table: those at places `first` to `last` of all, or the rows `listed`.

    Small enough to send; a worker reads what it names.
    """

    index: Location
    table_version: int
    unit: bool
    first: int = 0
    last: int = 0
    listed: Rows | None = None

    def rows(self) -> Rows:
        """Their numbers, int64 (n,), rising."""
        return self._in(self.table())

    def table(self) -> DocumentTable:
        return DocumentTable.open(self.index, self.table_version)

    def stream(self) -> Iterator[tuple[Rows, Vectors]]:
        """Row numbers and vectors (N, D), float32, a batch at a time."""
        table = self.table()
        rows = self._in(table)
        for start in range(0, len(rows), _BATCH_ROWS):
            batch = rows[start : start + _BATCH_ROWS]
            yield batch, self._vectors(table, batch)

    def sample(self, count: int, seed: int) -> tuple[Rows, Vectors]:
        """`count` distinct random rows (all where there are fewer), rising, and their vectors (N, D)."""
        table = self.table()
        rows = self._in(table)
        chosen = np.random.default_rng(seed).choice(len(rows), size=min(count, len(rows)), replace=False)
        rows = rows[np.sort(chosen)]
        # Batch by batch into their place: read at once, they would be in memory twice.
        vectors = np.empty((len(rows), table.dim), np.float32)
        for start in range(0, len(rows), _BATCH_ROWS):
            batch = slice(start, start + _BATCH_ROWS)
            vectors[batch] = self._vectors(table, rows[batch])
        return rows, vectors

    def _in(self, table: DocumentTable) -> Rows:
        return self.listed if self.listed is not None else table.row_map.rows(self.first, self.last)

    def _vectors(self, table: DocumentTable, rows: Rows) -> Vectors:
        # Vectors of cosine are stored at unit length; only 16 bits a value leave them off it.
        return table.vectors(rows, unit=self.unit and table.vector_dtype == "float16")


@dataclass(frozen=True, kw_only=True)
class ShardTask:
    """Everything a worker needs to build one shard. `made_of` is JSON that names its content."""

    source: TableRows
    num_rows: int
    kind: BuiltKind
    exact_dtype: ExactDtype | None
    made_of: dict[str, Any]
    placed: bool
    num_threads: int
    num_gpus: float = 0

    @property
    def digest(self) -> str:
        content = {**self.made_of, "kind": self.kind, "exact": self.exact_dtype, "placed": self.placed}
        return digest_of(content)


def digest_of(content: Any) -> str:
    """sha256 of JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def train_template(
    source: TableRows,
    kind: BuiltKind,
    dim: int,
    parameters: dict[str, int],
    train_rows: int,
    seed: int,
    num_threads: int,
) -> NDArray[np.uint8]:
    """A trained empty index (centroids, codebooks, value ranges), serialised: every shard starts from it."""
    faiss = import_faiss()
    faiss.omp_set_num_threads(num_threads)
    index = new_index(kind, dim, parameters)
    if train_rows:
        _, vectors = source.sample(train_rows, seed)
        train(kind, index, vectors)
    return serialise(index)


def serialise(index: Any) -> NDArray[np.uint8]:
    """A FAISS index as bytes, uint8 (bytes,), that travel to workers."""
    serialised: NDArray[np.uint8] = import_faiss().serialize_index(index)
    return serialised


@dataclass(frozen=True)
class BuiltShard:
    """A shard, and the exact hits among its rows of the queries that were asked for."""

    entry: ShardEntry
    exact: ExactHits | None


def build_shard(task: ShardTask, template: NDArray[np.uint8], wanted: Wanted | None = None) -> BuiltShard:
    """Build a shard from the `template`, uint8 (bytes,); it appears under its digest whole or not at all.

    Exact hits are found on the way: the vectors are read once for both.

    Raises:
        FormatError: what reading the table raises.
    """
    faiss = import_faiss()
    faiss.omp_set_num_threads(task.num_threads)
    empty = faiss.deserialize_index(template)
    search = None if wanted is None else ExactSearch(wanted)
    with publish_directory(task.source.index / SHARDS_NAME / task.digest) as folder:
        index = _fill(empty, task, folder, search)
        faiss.write_index(index, str(folder / VECTORS_NAME))
        entry = ShardEntry(
            digest=task.digest,
            rows=int(index.ntotal),
            kind=task.kind,
            exact_dtype=task.exact_dtype,
            placed=task.placed,
            files={path.name: FileEntry.of(Location.of(path)) for path in sorted(folder.iterdir())},  # type: ignore[misc]
        )
        Location.of(folder / SHARD_NAME).write_json(entry.model_dump(mode="json"))
    return BuiltShard(entry, None if search is None else search.hits)


def finished_shard(index: Location, digest: str) -> ShardEntry | None:
    """The entry of a shard that is there already, whole, or None. Its files are checked."""
    folder = index / SHARDS_NAME / digest
    if not (folder / SHARD_NAME).is_file():
        return None
    try:
        entry = ShardEntry.model_validate_json((folder / SHARD_NAME).read_bytes())
    except (ValidationError, FormatError):
        return None
    places = [(folder / name, file) for name, file in entry.files.items()]
    whole = all(place.is_file() and place.sha256() == file.sha256 for place, file in places)
    return entry if whole and entry.digest == digest else None


def _fill(index: Any, task: ShardTask, folder: Path, search: ExactSearch | None) -> Any:
    """The index with the task's rows; their numbers and, where asked, whole vectors beside it. `search` sees them."""
    with ExitStack() as stack:
        numbers = stack.enter_context(open(folder / ROWS_NAME, "wb"))
        _write_array_header(numbers, np.dtype(np.int64), (task.num_rows,))
        exact = None
        if task.exact_dtype is not None:
            exact = stack.enter_context(open(folder / EXACT_NAME, "wb"))
            _write_array_header(exact, np.dtype(task.exact_dtype), (task.num_rows, index.d))

        def batches() -> Iterator[Vectors]:
            for rows, vectors in task.source.stream():
                yield vectors
                numbers.write(np.ascontiguousarray(rows).data)
                if exact is not None:
                    # Written, not mapped: the pages of a mapped file would count as this process's memory.
                    exact.write(vectors.astype(task.exact_dtype).data)
                if search is not None:
                    search.add(rows, vectors)

        filled = fill(
            task.kind,
            index,
            batches(),
            task.num_rows,
            num_threads=task.num_threads,
            num_gpus=task.num_gpus,
        )
    if filled.ntotal != task.num_rows:
        raise FormatError(
            f"a shard was planned for {task.num_rows} rows and the table gave {filled.ntotal}; run it again"
        )
    return filled


def _write_array_header(stream: IO[bytes], dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, header)
