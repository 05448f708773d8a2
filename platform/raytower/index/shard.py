"""One opened shard: a FAISS index over some rows of the table.

Shape legend: N rows of the shard, Q queries, D dimension, K hits a query.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raytower.errors import FormatError
from raytower.index.allowed import AllowedRows
from raytower.index.config import BuiltKind
from raytower.index.faiss_import import import_faiss
from raytower.index.faiss_index import GpuIndex
from raytower.index.hits import Hits
from raytower.index.kinds import Searchable, Vectors
from raytower.index.manifest import EXACT_NAME, ROWS_NAME, SHARDS_NAME, VECTORS_NAME, FileEntry, ShardEntry
from raytower.index.rowmap import RowMap, Rows
from raytower.storage import Location, cache_dir


class Shard:
    """One shard, memory-mapped. Safe for concurrent searches.

    FAISS knows positions 0 to N - 1; position i is row `rows[i]` of the table. Rows that the table no longer holds are
    never hits.
    """

    def __init__(
        self,
        kind: BuiltKind,
        index: Any,
        rows: Rows,
        row_map: RowMap,
        exact: NDArray[Any] | None = None,
        digest: str = "",
    ) -> None:
        self.kind = kind
        self.rows = rows
        self.digest = digest
        self._index = index
        self._exact = exact
        self._searchable = Searchable(kind, index, exact)
        self._numbers = np.asarray(rows)  # indexing a memmap goes through its slow subclass
        live = row_map.live_mask(rows)
        self._live = None if live is None else AllowedRows.of(live)

    @classmethod
    def open(cls, index: Location, entry: ShardEntry, dim: int, row_map: RowMap) -> Shard:
        """Open a shard, fetching what lies remotely.

        Raises:
            FormatError: a file is missing or of another size, or what it holds does not fit the entry.
        """
        place = index / SHARDS_NAME / entry.digest
        paths = {name: local_file(place / name, file) for name, file in entry.files.items()}
        faiss = import_faiss()
        try:
            vectors = faiss.read_index(str(paths[VECTORS_NAME]), faiss.IO_FLAG_MMAP_IFC)
            rows = open_array(paths[ROWS_NAME])
            exact = open_array(paths[EXACT_NAME]) if entry.exact_dtype else None
        except (KeyError, RuntimeError, ValueError, OSError) as error:
            raise FormatError(f"shard {place} cannot be read: {error}; build the index again") from error
        _check_content(place, entry, vectors, rows, exact, dim)
        return cls(entry.kind, vectors, rows, row_map, exact, entry.digest)

    @classmethod
    def in_memory(cls, vectors: Vectors, rows: Rows, row_map: RowMap) -> Shard:
        """Vectors (N, D) of some rows, searched exactly."""
        index = import_faiss().IndexFlatIP(vectors.shape[1])
        index.add(vectors)
        return cls("flat", index, rows, row_map)

    @property
    def num_live(self) -> int:
        """Rows that can be hits."""
        return len(self.rows) if self._live is None else self._live.count

    def live_rows(self) -> Rows:
        """The rows (live,) that can be hits, rising."""
        return np.asarray(self.rows) if self._live is None else np.asarray(self.rows)[self._live.rows]

    def allowed(self, matching: Rows) -> AllowedRows:
        """Which positions hold one of some rising rows (n,) of the table."""
        mask = np.zeros(len(self.rows), np.bool_)
        if len(self.rows):
            wanted = matching[slice(*np.searchsorted(matching, (self.rows[0], self.rows[-1] + 1)))]
            if self._is_range:
                mask[wanted - self.rows[0]] = True
            else:
                places = np.searchsorted(self.rows, wanted)
                mask[places[self.rows[places] == wanted]] = True
        return AllowedRows.of(mask)

    def search(
        self, vectors: Vectors, k: int, parameters: Mapping[str, int], allowed: AllowedRows | None = None
    ) -> Hits:
        """The min(k, rows that may be found) hits of each query vector (Q, D) that `prepare_queries` made.

        Raises:
            FormatError: the shard's file is damaged.
        """
        scores, positions = self._searchable.search(vectors, k, parameters, allowed or self._live)
        # One look finds -1, which is the largest then, and positions beyond the end.
        if positions.size == 0 or positions.view(np.uint64).max() < len(self._numbers):
            return Hits(scores, self._numbers.take(positions))
        if positions.max() >= len(self._numbers):
            raise FormatError(
                f"shard {self.digest} gave position {positions.max()} of {len(self.rows)} rows: its file is damaged; "
                "compact the index, or build it again"
            )
        return Hits(scores, np.where(positions >= 0, self._numbers[positions], -1))

    def use_gpu(self) -> bool:
        """Put a copy on the GPU that FAISS sees, where it can hold one; says whether it does."""
        gpu = GpuIndex.of(self.kind, self._index)
        self._searchable = Searchable(self.kind, self._index, self._exact, gpu)
        return gpu is not None

    @cached_property
    def _is_range(self) -> bool:
        return int(self.rows[-1]) - int(self.rows[0]) + 1 == len(self.rows)


def local_file(place: Location, file: FileEntry) -> Path:
    """A local path with this file, fetched and checked where it is remote; local files are checked by size.

    Raises FormatError where it is missing, or of another size or checksum.
    """
    if not place.is_local:
        return place.fetch(cache_dir(), file.sha256, file.bytes)
    path = place.local_path
    check_size(place, path.stat().st_size if path.is_file() else None, file)
    return path


def check_size(place: Location, found: int | None, file: FileEntry) -> None:
    """Raises FormatError where a file is missing (its size None) or of another size than a version says."""
    if found is None:
        raise FormatError(f"{place} is missing; the index is damaged: roll back or build it again")
    if found != file.bytes:
        raise FormatError(
            f"{place} has {found} bytes, the version says {file.bytes}: it was truncated or changed; roll back or "
            "build it again"
        )


def open_array(path: Path) -> NDArray[Any]:
    """An array of a shard, (rows,) or (rows, dim), mapped. Raises ValueError or OSError where it is damaged."""
    try:
        array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (EOFError, TokenError) as error:  # NumPy reads the head as Python source
        raise ValueError(f"{path.name} does not begin as an array does: {error}") from error
    return array


def shard_rows(index: Location, entry: ShardEntry) -> Rows:
    """The rising rows (rows,) that a shard holds, mapped. Raises FormatError where their file is damaged."""
    path = local_file(index / SHARDS_NAME / entry.digest / ROWS_NAME, entry.files[ROWS_NAME])
    try:
        rows = open_array(path)
    except (ValueError, OSError) as error:
        raise FormatError(f"{path} is damaged: {error}; build the index again") from error
    _check_rows(index / SHARDS_NAME / entry.digest, entry, rows)
    return rows


def _check_content(
    place: Location, entry: ShardEntry, index: Any, rows: NDArray[Any], exact: NDArray[Any] | None, dim: int
) -> None:
    if index.ntotal != entry.rows:
        raise FormatError(f"shard {place} has {index.ntotal} vectors; its version says {entry.rows} rows")
    _check_rows(place, entry, rows)
    if index.d != dim:
        raise FormatError(f"shard {place} has dimension {index.d}; its version says {dim}")
    if exact is not None and (exact.shape != (entry.rows, dim) or exact.dtype != entry.exact_dtype):
        raise FormatError(
            f"shard {place} has exact vectors {exact.dtype} {exact.shape}, its version says {entry.exact_dtype} "
            f"{(entry.rows, dim)}"
        )


def _check_rows(place: Location, entry: ShardEntry, rows: NDArray[Any]) -> None:
    if rows.shape != (entry.rows,) or rows.dtype != np.int64:
        raise FormatError(
            f"shard {place} has row numbers {rows.dtype} {rows.shape}; its version says {entry.rows} rows"
        )
    if (rows[:1] < 0).any() or (rows[1:] <= rows[:-1]).any():
        raise FormatError(f"shard {place} has row numbers that do not rise; build the index again")
