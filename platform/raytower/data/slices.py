"""Cutting a stream of bytes into runs of whole lines, and reading such runs back.

The only line separator is b"\\n": U+2028, form feeds and lone carriage returns are characters of a text.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from raytower.data.sources import SourceFile
from raytower.errors import InputError

_READ_BYTES = 4 * 1024 * 1024
# A slice ends after this many bytes even if it has fewer rows than asked for: it bounds memory and Arrow's offsets.
MAX_SLICE_BYTES = 64 * 1024 * 1024
MAX_LINE_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True)
class Slice:
    """Whole lines of a file. `start` counts (decompressed) bytes, `first_line` counts lines from 1."""

    start: int
    first_line: int
    data: bytes

    @property
    def end(self) -> int:
        return self.start + len(self.data)


def iter_slices(file: SourceFile, start: int, first_line: int, rows_per_slice: int) -> Iterator[Slice]:
    """Cut the lines of `file` from byte `start` on into slices of `rows_per_slice` lines; the last may have fewer.

    One blank line at the very end of the file is left out; slices are never empty and where they are cut does not
    depend on how the stream happens to be read.

    Raises:
        InputError: the file cannot be read or decompressed, or holds a line of more than MAX_LINE_BYTES.
    """
    with RangeReader(file) as reader:
        buffer = reader.read(start, _READ_BYTES)
        at_end = len(buffer) < _READ_BYTES
        while True:
            if at_end:
                buffer = _without_blank_end(buffer)
            used = 0
            newlines = np.flatnonzero(np.frombuffer(buffer, np.uint8) == 10)
            while (end := _slice_end(newlines, len(buffer), used, rows_per_slice, at_end)) is not None:
                data = buffer[used:end]
                yield Slice(start + used, first_line, data)
                first_line += data.count(b"\n")
                used = end
            if at_end:
                return
            buffer, start = buffer[used:], start + used
            if len(buffer) > MAX_LINE_BYTES and b"\n" not in buffer:
                raise InputError(
                    f"{file}:{first_line}: a line of more than {MAX_LINE_BYTES} bytes; is it a text file? "
                    "Lines end with a newline character"
                )
            more = reader.read(start + len(buffer), _READ_BYTES)
            at_end = len(more) < _READ_BYTES
            buffer += more


class RangeReader:
    """Reads byte ranges of one file; ranges of a compressed file are cheap as long as they are asked for in order."""

    def __init__(self, file: SourceFile):
        self.file = file
        self._stream = file.open()
        self._position = 0

    def __enter__(self) -> RangeReader:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stream.close()

    def read(self, start: int, num_bytes: int) -> bytes:
        """Up to `num_bytes` bytes from `start` on; fewer only at the end of the file.

        Raises:
            InputError: the storage fails or the compressed bytes are broken.
        """
        try:
            if start != self._position:
                self._move_to(start)
            parts = []
            while num_bytes > 0:
                part = self._stream.read(num_bytes)
                if not part:
                    break
                parts.append(part)
                num_bytes -= len(part)
        except (OSError, pa.ArrowInvalid) as error:
            remedy = "is it really compressed, and whole?" if self.file.compression else "check the storage"
            raise InputError(f"{self.file} cannot be read at byte {start}: {error}; {remedy}") from error
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        self._position = start + len(data)
        return data

    def _move_to(self, start: int) -> None:
        if self.file.compression is None:
            self._stream.seek(start)
            return
        if start < self._position:
            self._stream.close()
            self._stream = self.file.open()
            self._position = 0
        while self._position < start:
            skipped = self._stream.read(min(_READ_BYTES, start - self._position))
            if not skipped:
                break
            self._position += len(skipped)


def _slice_end(newlines: np.ndarray, length: int, used: int, rows: int, at_end: bool) -> int | None:
    """Where the slice that begins at `used` ends, or None while that cannot be known (or nothing is left)."""
    if used == length:
        return None
    first = int(np.searchsorted(newlines, used))
    last_by_bytes = max(first, int(np.searchsorted(newlines, used + MAX_SLICE_BYTES)) - 1)
    last = min(first + rows - 1, last_by_bytes)
    if last < len(newlines) and (first + rows <= len(newlines) or length - used > MAX_SLICE_BYTES):
        end = int(newlines[last]) + 1
        # With nothing after it, the slice's last line may yet be the blank one that a file may end with.
        return end if end < length or at_end else None
    return length if at_end else None


def _without_blank_end(buffer: bytes) -> bytes:
    line_end = len(buffer) - 1 if buffer.endswith(b"\n") else len(buffer)
    line_start = buffer.rfind(b"\n", 0, line_end) + 1
    return buffer if buffer[line_start:line_end].strip(b" \r") else buffer[:line_start]
