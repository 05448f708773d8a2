"""Finding ids that occur twice, in eight bytes a row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

_BUCKETS = 16


@dataclass(frozen=True)
class Duplicate:
    """A row whose id an earlier row has. Chunks count from 0, in the order of `IdHashes.add`."""

    id: str
    chunk: int
    line: int
    first_chunk: int
    first_line: int


class IdHashes:
    """64-bit hashes of all ids, chunk by chunk.

    Python's keyed string hash is the same all through the one process that scans.
    """

    def __init__(self) -> None:
        self._chunks: list[np.ndarray] = []

    def add(self, ids: pa.Array) -> None:
        """Take in the ids of the next chunk."""
        hashes = map(hash, ids.to_pylist())
        self._chunks.append(np.fromiter(hashes, dtype=np.int64, count=len(ids)))

    def duplicates(self, rows_of_chunk: Callable[[int], tuple[pa.Array, np.ndarray]]) -> Iterator[Duplicate]:
        """Every row whose id came before, in order.

        Only chunks with a repeated hash are asked for again (`rows_of_chunk` gives their ids and line numbers), and the
        ids themselves are compared, so that two ids with one hash are no duplicates.
        """
        repeated = self._repeated()
        if len(repeated) == 0:
            return
        first_places: dict[str, tuple[int, int]] = {}
        for chunk, chunk_hashes in enumerate(self._chunks):
            suspects = np.flatnonzero(np.isin(chunk_hashes, repeated))
            if len(suspects) == 0:
                continue
            ids, lines = rows_of_chunk(chunk)
            for position in suspects.tolist():
                identifier, line = ids[position].as_py(), int(lines[position])
                first_chunk, first_line = first_places.setdefault(identifier, (chunk, line))
                if (first_chunk, first_line) != (chunk, line):
                    yield Duplicate(identifier, chunk, line, first_chunk, first_line)

    def _repeated(self) -> np.ndarray:
        """Hashes that occur more than once, looked for bucket by bucket: sorted at once they would need three times
        the memory that they take."""
        found = [np.zeros(0, dtype=np.int64)]
        for bucket in range(_BUCKETS if self._chunks else 0):
            hashes = np.concatenate([chunk[chunk % _BUCKETS == bucket] for chunk in self._chunks])
            hashes.sort()
            found.append(hashes[1:][hashes[1:] == hashes[:-1]])
        return np.unique(np.concatenate(found))
