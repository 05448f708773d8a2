"""Writing result rows as TSV with a header or as JSON lines; the file appears only when it is whole."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any

import pyarrow as pa

from raytower.annotation.config import FileType
from raytower.errors import InputError
from raytower.storage import Location, writable_place

_FIRST_LINE_BYTES = 2**20


class RowWriter:
    """Writes rows of one set of columns. Made by `open_rows`."""

    def __init__(
        self, stream: pa.NativeFile | IO[bytes], file_type: FileType, columns: Sequence[str]
    ) -> None:
        self._stream = stream
        self._file_type = file_type
        self._columns = tuple(columns)
        self.num_rows = 0
        if file_type == "tsv":
            self._write_line("\t".join(self._columns))

    def write(self, *values: Any, **more: Any) -> None:
        """One row: a value for each column, in order. `more` goes into JSON lines only.

        Raises:
            InputError: a value cannot stand in a TSV, because it holds a tab or a line break.
        """
        row = dict(zip(self._columns, values, strict=True))
        if self._file_type == "jsonl":
            self._write_line(json.dumps({**row, **more}, ensure_ascii=False, allow_nan=False))
        else:
            self._write_line("\t".join(_tsv_cell(name, value) for name, value in row.items()))
        self.num_rows += 1

    def _write_line(self, line: str) -> None:
        self._stream.write(line.encode() + b"\n")


def check_rows_output(output: str, *written: Sequence[str]) -> None:
    """Find before any work that `output` cannot be written, or holds something that this job never writes.

    Args:
        written: the sets of columns that the job writes; a file that begins with one of them is an earlier result.

    Raises:
        InputError: it is a folder, a file of something else, or below a folder where nothing can be made.
    """
    place = writable_place(output)
    if place.is_dir():
        raise InputError(f"output {output!r} is a folder; name a file")
    if place.exists():
        with place.open_read() as stream:
            lines = stream.read(_FIRST_LINE_BYTES).decode("utf-8", errors="replace").split("\n")
        first = next((line for line in lines if line.strip()), "")
        if first and not any(_begins_with(first, columns) for columns in written):
            raise InputError(
                f"output {output!r} exists and is no result of this job (it begins with {first[:60]!r}); remove it, or "
                "name another file"
            )


def _begins_with(line: str, columns: Sequence[str]) -> bool:
    """Whether the first line of a file is a header of these columns, or a JSON object that has them all."""
    if line.rstrip("\r") == "\t".join(columns):
        return True
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(row, dict) and row.keys() >= set(columns)


@contextmanager
def open_rows(place: Location, file_type: FileType, columns: Sequence[str]) -> Iterator[RowWriter]:
    """A writer of `place`; nothing appears there if the block fails."""
    with place.open_write() as stream:
        yield RowWriter(stream, file_type, columns)


def _tsv_cell(name: str, value: Any) -> str:
    text = f"{value:.6f}" if isinstance(value, float) else str(value)
    if any(mark in text for mark in "\t\n\r"):
        raise InputError(
            f"{name} {text[:80]!r} holds a tab or a line break, which a TSV cannot carry (it has no quoting); "
            "set file_type to jsonl"
        )
    return text
