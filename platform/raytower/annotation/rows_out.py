"""Writing result rows as TSV with a header or as JSON lines; the file appears only when it is whole."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import IO, Any

import pyarrow as pa

from raytower.annotation.config import FileType
from raytower.data.sources import COMPRESSION_SUFFIXES, FORMAT_BY_SUFFIX
from raytower.errors import InputError
from raytower.storage import Location, check_output

_FIRST_LINE_BYTES = 2**20
# The formats that a name may mean for rows of each type; what a .txt file holds is seen when it is read.
_NAMED_AS: dict[FileType, tuple[str, ...]] = {"tsv": ("tsv", "lines"), "jsonl": ("jsonl",)}


class RowWriter:
    """Writes rows of one set of columns. Made by `open_rows`."""

    def __init__(
        self,
        stream: pa.NativeFile | IO[bytes],
        file_type: FileType,
        columns: Sequence[str],
        *,
        has_header: bool = True,
    ) -> None:
        """Without a header: a part of a TSV that others stand before; see `header_of`."""
        self._stream = stream
        self._file_type = file_type
        self._columns = tuple(columns)
        self.num_rows = 0
        if has_header:
            stream.write(header_of(file_type, columns))

    def write(self, *values: Any, **more: Any) -> None:
        """One row: a value for each column, in order. `more` goes into JSON lines only.

        Raises:
            InputError: a value cannot stand in a TSV, because it holds a tab or a line break.
        """
        row = dict(zip(self._columns, values, strict=True))
        if self._file_type == "jsonl":
            self._write_line(json.dumps({**row, **more}, ensure_ascii=False, allow_nan=False))
        else:
            self._write_line("\t".join(tsv_cell(name, value) for name, value in row.items()))
        self.num_rows += 1

    def _write_line(self, line: str) -> None:
        self._stream.write(line.encode() + b"\n")


def header_of(file_type: FileType, columns: Sequence[str]) -> bytes:
    """What a file of these columns begins with."""
    return "\t".join(columns).encode() + b"\n" if file_type == "tsv" else b""


def refuse_name_of_another_type(output: str, file_type: FileType) -> None:
    """Raise InputError for a file name by which the next job would take the rows for something else."""
    suffix = PurePosixPath(Location.of(output).path).suffix
    if suffix in COMPRESSION_SUFFIXES:
        raise InputError(
            f"output {output!r} ends with {suffix}, and the rows are written as they are; leave {suffix} away, and "
            "compress the file afterwards"
        )
    meant = FORMAT_BY_SUFFIX.get(suffix, file_type)
    if meant not in _NAMED_AS[file_type]:
        raise InputError(
            f"output {output!r} ends with {suffix}, and file_type is {file_type}: the next job would read it as "
            f"{meant}; name a .{file_type} file, or set file_type"
        )


def check_rows_output(output: str, *written: Sequence[str]) -> None:
    """Find before any work that `output` cannot be written, or holds something that this job never writes.

    Args:
        written: the sets of columns that the job writes; a file that begins with one of them is an earlier result.

    Raises:
        InputError: it is a folder, a device, a link that leads nowhere, a file of something else, or below a folder
            where nothing can be made.
    """
    place = check_output(output, is_folder=False)
    if not place.exists():
        return
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


def tsv_cell(name: str, value: Any) -> str:
    """A value as a TSV carries it. Raises InputError where it holds a tab or a line break."""
    text = f"{value:.6f}" if isinstance(value, float) else str(value)
    if any(mark in text for mark in "\t\n\r"):
        raise InputError(
            f"{name} {text[:80]!r} holds a tab or a line break, which a TSV cannot carry (it has no quoting); "
            "set file_type to jsonl"
        )
    return text
