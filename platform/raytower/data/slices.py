"""Cutting a stream of bytes into runs of whole lines, and reading such runs back.

The only line separator is b"\\n": U+2028, form feeds and lone carriage returns are characters of a text. In CSV a row
ends with a newline that no quote encloses; since quotes within quotes are doubled, those before it are even in number.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa

from raytower.data.sources import SourceFile
from raytower.errors import InputError

_READ_BYTES = 4 * 1024 * 1024
# A slice ends after this many bytes even if it has fewer rows than asked for: it bounds memory and Arrow's offsets.
MAX_SLICE_BYTES = 64 * 1024 * 1024
MAX_LINE_BYTES = 256 * 1024 * 1024
_JSON_SPACE = re.compile(r"[ \t\r\n]*")

Cut = Literal["lines", "quoted", "elements"]
"""A row ends with a newline; a newline outside quotes; the end of an element of a JSON array."""


@dataclass(frozen=True)
class Extent:
    """A run of rows of one file: decompressed bytes [start, end), or rows [start, end) of a Parquet row group."""

    start: int
    end: int
    first_line: int
    """Line number (Parquet: row number) of the first row, counted from 1."""
    row_group: int | None = None


@dataclass(frozen=True)
class Slice:
    """Whole rows of a file. `start` counts (decompressed) bytes, `first_line` counts rows from 1."""

    start: int
    first_line: int
    data: bytes
    cut: Cut = "lines"

    @property
    def extent(self) -> Extent:
        return Extent(self.start, self.start + len(self.data), self.first_line)

    def edges(self) -> list[int]:
        """The byte at which each row begins, and the end of the last: b"a\\nbc\\n" gives 0 2 5."""
        edges = [0, *row_ends(self.data, self.cut).tolist()]
        return edges if edges[-1] == len(self.data) else [*edges, len(self.data)]

    def rows(self) -> list[bytes]:
        """The bytes of each row, without what ends it."""
        if self.cut == "elements":
            text = f"[{self.data.decode('utf-8')}]"
            return [text[start:end].encode("utf-8") for start, end in json_elements(text)]
        if self.cut == "quoted":
            rows = [
                self.data[start:end].removesuffix(b"\n") for start, end in itertools.pairwise(self.edges())
            ]
        else:
            rows = self.data.removesuffix(b"\n").split(b"\n")
        return [row.removesuffix(b"\r") for row in rows]


def json_elements(text: str) -> Iterator[tuple[int, int]]:
    """Where each element of a JSON array begins and ends. Raises ValueError where `text` is no whole array."""
    decode = json.JSONDecoder().raw_decode
    place = _after_space(text, _after_space(text, 0) + 1)
    is_open = text[place : place + 1] != "]"
    while is_open:
        _, end = decode(text, place)
        yield place, end
        place = _after_space(text, end)
        is_open = text[place : place + 1] != "]"
        if is_open:
            if text[place : place + 1] != ",":
                raise ValueError(f"a comma was expected at character {place + 1}")
            place = _after_space(text, place + 1)
    if text[place + 1 :].strip():
        raise ValueError(f"something follows the array at character {place + 2}")


def _after_space(text: str, place: int) -> int:
    return _JSON_SPACE.match(text, place).end()  # type: ignore[union-attr]  # it matches the empty string too


def row_ends(data: bytes, cut: Cut) -> np.ndarray:
    """The byte after each newline that ends a row, int64 [ends]: b"a\\nbc\\n" gives 2 5. `data` begins a row."""
    content = np.frombuffer(data, np.uint8)
    newlines = np.flatnonzero(content == 10)
    if cut == "quoted":
        quotes = np.flatnonzero(content == 34)
        newlines = newlines[np.searchsorted(quotes, newlines) % 2 == 0]
    return newlines + 1


def iter_slices(
    file: SourceFile, start: int, first_line: int, rows_per_slice: int, cut: Cut = "lines"
) -> Iterator[Slice]:
    """Cut the rows of `file` from byte `start` on into slices of `rows_per_slice` rows; the last may have fewer.

    One blank line at the very end of the file is left out. No slice is empty. The cuts do not depend on how many bytes
    a read happens to return. Memory holds the whole of a file of elements.

    Raises:
        InputError: the file cannot be read or decompressed, or holds a line of more than MAX_LINE_BYTES; elements: it
            is no whole array of UTF-8, or has more than that.
    """
    with RangeReader(file) as reader:
        if cut == "elements":
            yield from _iter_elements(reader, start, rows_per_slice)
            return
        buffer, at_end = b"", False
        while not at_end:
            more = reader.read(start + len(buffer), _READ_BYTES)
            at_end = len(more) < _READ_BYTES
            buffer = _without_blank_end(buffer + more) if at_end else buffer + more
            ends = row_ends(buffer, cut)
            used = done = 0  # bytes of the buffer and rows that slices were made of
            while used < len(buffer):
                within = int(np.searchsorted(ends, used + MAX_SLICE_BYTES, side="right"))
                stop = min(done + rows_per_slice, max(within, done + 1))
                is_full = done + rows_per_slice <= len(ends) or len(buffer) - used > MAX_SLICE_BYTES
                # As long as nothing follows, the slice's last line may be the blank line at the file's end.
                if is_full and stop <= len(ends) and (at_end or ends[stop - 1] < len(buffer)):
                    end = int(ends[stop - 1])
                elif at_end:
                    end = len(buffer)
                else:
                    break
                yield Slice(start + used, first_line + done, buffer[used:end], cut)
                used, done = end, stop
            buffer, start, first_line = buffer[used:], start + used, first_line + done
            if len(buffer) > MAX_LINE_BYTES and done >= len(ends):
                raise InputError(
                    f"{file}:{first_line}: a line of more than {MAX_LINE_BYTES} bytes; is it a text file? "
                    "Lines end with a newline character"
                )


def _iter_elements(reader: RangeReader, start: int, rows_per_slice: int) -> Iterator[Slice]:
    data = reader.read(start, MAX_LINE_BYTES + 1)
    if len(data) > MAX_LINE_BYTES:
        raise InputError(
            f"{reader.file} is one JSON array of more than {MAX_LINE_BYTES} bytes; write one object a line (.jsonl)"
        )
    number = characters = 0
    try:
        text = data.decode("utf-8")
        spans = json_elements(text)
        while some := list(itertools.islice(spans, rows_per_slice)):
            first, last = some[0][0], some[-1][1]
            start += len(text[characters:first].encode("utf-8"))
            content = Slice(start, number + 1, text[first:last].encode("utf-8"), "elements")
            yield content
            start, characters, number = content.extent.end, last, number + len(some)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{reader.file} is no whole JSON array, after element {number}: {error}; correct the file"
        ) from error


class RangeReader:
    """Reads byte ranges of one file; ranges of a compressed file are cheap only if they are asked for in order."""

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


def _without_blank_end(buffer: bytes) -> bytes:
    line_end = len(buffer) - 1 if buffer.endswith(b"\n") else len(buffer)
    line_start = buffer.rfind(b"\n", 0, line_end) + 1
    return buffer if buffer[line_start:line_end].strip(b" \r") else buffer[:line_start]
