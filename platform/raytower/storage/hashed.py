"""A file whose checksum comes of the same reading as its content."""

from __future__ import annotations

import hashlib
import io
from collections import deque

from raytower.storage.errors import explaining
from raytower.storage.location import Location

# Read again from here: a reader of Parquet goes back and forth between the columns of a few thousand rows.
_KEPT_BYTES = 32 * 1024 * 1024


class HashedFile(io.RawIOBase):
    """Reads a file forward in large pieces, hashes each once, and keeps the last 32 MiB for readers that go back a
    little. What lies further back is read from the storage again, so no byte is read more than twice by a reader that
    asks for it once.
    """

    def __init__(self, place: Location) -> None:
        self._place = place
        self._size = place.size_bytes()
        self._stream = place.open_read()
        self._digest = hashlib.sha256()
        self._kept: deque[bytes] = deque()
        self._kept_bytes = 0
        self._hashed = 0
        """Bytes that were read and hashed; those kept are the last of them."""
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = (
            offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        )
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        end = self._size if size is None or size < 0 else min(self._position + size, self._size)
        start, self._position = self._position, max(end, self._position)
        if start >= end:
            return b""
        while self._hashed < end and self._advance():
            pass
        if start >= self._hashed - self._kept_bytes:
            return self._from_kept(start, end)
        with explaining(self._place):
            self._stream.seek(start)
            return bytes(self._stream.read(end - start))

    def sha256(self) -> str:
        """Of the whole file: what was not read yet is read now."""
        while self._advance():
            pass
        return self._digest.hexdigest()

    def close(self) -> None:
        self._stream.close()
        super().close()

    def _advance(self) -> bool:
        """Read and hash one more piece; False at the end."""
        with explaining(self._place):
            self._stream.seek(self._hashed)
        piece = self._place.read_chunk(self._stream)
        if not piece:
            return False
        self._digest.update(piece)
        self._hashed += len(piece)
        self._kept.append(piece)
        self._kept_bytes += len(piece)
        while self._kept_bytes - len(self._kept[0]) >= _KEPT_BYTES:
            self._kept_bytes -= len(self._kept.popleft())
        return True

    def _from_kept(self, start: int, end: int) -> bytes:
        parts: list[bytes] = []
        place = self._hashed - self._kept_bytes
        for piece in self._kept:
            if place < end and place + len(piece) > start:
                parts.append(piece[max(start - place, 0) : end - place])
            place += len(piece)
        return b"".join(parts)
