"""From a path, folder or glob to the data files it means, each with a stem that its line-derived ids start with."""

from __future__ import annotations

import fnmatch
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

import pyarrow as pa
from pyarrow import fs as pafs
from pydantic import Field

from raytower.config import Config
from raytower.errors import InputError
from raytower.storage import Location

InputFormat = Literal["auto", "lines", "tsv", "jsonl", "beir", "parquet"]
Compression = Literal["gzip", "zstd"]

# What an extension means under format auto. A .txt or .tsv is looked at more closely once the record kind is known.
FORMAT_BY_SUFFIX = {
    ".txt": "lines",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".pq": "parquet",
}
_COMPRESSION_BY_SUFFIX: dict[str, Compression] = {".gz": "gzip", ".zst": "zstd"}
COMPRESSION_SUFFIXES = tuple(_COMPRESSION_BY_SUFFIX)
_SUFFIXES_BY_FORMAT = {"lines": (".txt", ".tsv"), "tsv": (".tsv", ".txt")}
_GLOB_CHARACTERS = re.compile(r"[*?\[]")
# What our own jobs write beside data files; never data.
_MANIFEST = "manifest.json"


class InputConfig(Config):
    """Where records come from. `path` is a file, a folder or a glob, local or by URI."""

    path: str
    format: InputFormat = "auto"
    text_fields: list[str] = Field(default=["title", "text"], min_length=1)
    """Columns or keys that make up a corpus text, joined by one space; the last is required, the others are not."""
    id_field: str | None = None
    """The column or key that holds a corpus row's id; null takes `id` or `_id` where there is one."""
    split: str | None = None
    """Which qrels/<split>.tsv of a BEIR folder to read; null means train."""


@dataclass(frozen=True)
class SourceFile:
    """One data file. Picklable, so that a worker can open it."""

    location: Location
    stem: str
    suffix: str
    """The extension that tells the format, without a compression extension; may be empty or unknown."""
    compression: Compression | None
    size_bytes: int
    modified_ns: int | None
    """When the file was last written, where the storage tells."""

    def __str__(self) -> str:
        return str(self.location)

    def open(self) -> pa.NativeFile:
        """A stream of the file's bytes, decompressed; seekable only where the file is not compressed.

        Raises:
            InputError: the file is gone, cannot be read, or has another size than when it was found.
        """
        try:
            stream = self.location.open_read()
            size_bytes = stream.size()
        except OSError as error:
            raise InputError(f"{self} cannot be read: {error}") from error
        if size_bytes != self.size_bytes:
            raise InputError(
                f"{self} has changed since it was surveyed: {size_bytes} bytes, {self.size_bytes} before; run the job "
                "again while the file stays as it is"
            )
        return pa.CompressedInputStream(stream, self.compression) if self.compression else stream


@dataclass(frozen=True)
class Found:
    """The data files of one input in name order, and the files passed over because their extension is unknown."""

    files: tuple[SourceFile, ...]
    ignored: tuple[str, ...] = ()


def find_files(path: str, file_format: str = "auto") -> Found:
    """The data files that `path` means.

    A file is taken as it is. A folder gives, at any depth, the files with a known extension (of `file_format` where
    that is not auto); names that begin with `.` or `_` are not data. A glob (`*`, `?`, `[…]`, `**`) gives every match.

    Raises:
        InputError: nothing is there, or nothing that is data.
    """
    base, pattern = _split_glob(path)
    found: list[Location] = []
    ignored: list[Location] = []
    if pattern is None and base.is_file():
        found = [base]
    elif pattern is None and base.is_dir():
        candidates = [place for place in _files_below(base) if not _is_hidden(place, base)]
        wanted = _suffixes(file_format)
        for place in candidates:
            (found if _suffix_of(place.name)[0] in wanted else ignored).append(place)
        if not found:
            raise InputError(
                f"folder {path!r} holds no data file (looked for {', '.join(sorted(wanted))}, also with .gz or .zst); "
                "name the files with a glob such as 'folder/*', or give another folder"
            )
    elif pattern is not None:
        found = [place for place in _files_below(base) if _matches(_parts_below(place, base), pattern)]
        if not found:
            raise InputError(f"no file matches {path!r}; check the pattern")
    else:
        raise InputError(f"no file or folder at {path!r}; check the path")
    root = base.parent if pattern is None and base.is_file() else base
    return Found(_make_files(found, root), tuple(str(place) for place in ignored))


def single_file(location: Location) -> SourceFile:
    """`location` as a data file. Raises InputError where there is no such file."""
    if not location.is_file():
        raise InputError(f"no file at {location}; check the path")
    return _make_files([location], location.parent)[0]


def _make_files(places: Sequence[Location], root: Location) -> tuple[SourceFile, ...]:
    stems = _unique_stems([PurePosixPath(*_parts_below(place, root)) for place in places])
    infos = root.filesystem.get_file_info([place.path for place in places])
    files = []
    for place, stem, info in zip(places, stems, infos, strict=True):
        suffix, compression = _suffix_of(place.name)
        if compression and FORMAT_BY_SUFFIX.get(suffix) == "parquet":
            raise InputError(
                f"{place} is a compressed Parquet file; Parquet compresses inside, so decompress it first"
            )
        files.append(SourceFile(place, stem, suffix, compression, int(info.size), info.mtime_ns))
    return tuple(files)


def _suffix_of(name: str) -> tuple[str, Compression | None]:
    path = PurePosixPath(name)
    compression = _COMPRESSION_BY_SUFFIX.get(path.suffix.lower())
    return (PurePosixPath(path.stem) if compression else path).suffix.lower(), compression


def _suffixes(file_format: str) -> set[str]:
    if file_format == "auto":
        return set(FORMAT_BY_SUFFIX)
    listed = _SUFFIXES_BY_FORMAT.get(file_format)
    return set(listed or (suffix for suffix, name in FORMAT_BY_SUFFIX.items() if name == file_format))


def _unique_stems(paths: Sequence[PurePosixPath]) -> list[str]:
    """A stem for each relative path: its name without extensions, and more of the path only where two would be equal.

    Line-derived ids are `<stem>:<line>`, so equal stems would give two rows one id.
    """

    def bare(path: PurePosixPath) -> PurePosixPath:
        suffix, compression = _suffix_of(path.name)
        shorter = path.with_suffix("") if compression else path
        return shorter.with_suffix("") if suffix in FORMAT_BY_SUFFIX else shorter

    ways: list[Callable[[PurePosixPath], str]] = [lambda p: bare(p).name, lambda p: str(bare(p)), str]
    stems = [ways[0](path) for path in paths]
    for way in ways[1:]:
        groups: dict[str, list[int]] = defaultdict(list)
        for position, stem in enumerate(stems):
            groups[stem].append(position)
        for positions in groups.values():
            if len(positions) > 1:
                for position in positions:
                    stems[position] = way(paths[position])
    return stems if len(set(stems)) == len(stems) else [str(path) for path in paths]


def _files_below(base: Location) -> list[Location]:
    # One listing call: asking storage about each place in turn is slow on object stores.
    selector = pafs.FileSelector(base.path, allow_not_found=True, recursive=True)
    infos = [info for info in base.filesystem.get_file_info(selector) if info.type == pafs.FileType.File]
    return [Location(base.filesystem, path) for path in sorted(info.path for info in infos)]


def _parts_below(place: Location, base: Location) -> tuple[str, ...]:
    return PurePosixPath(place.path).relative_to(base.path).parts


def _is_hidden(place: Location, base: Location) -> bool:
    return place.name == _MANIFEST or any(part.startswith((".", "_")) for part in _parts_below(place, base))


def is_glob(path: str) -> bool:
    """Whether `path` has wildcards and is not itself the name of something that exists."""
    return bool(_GLOB_CHARACTERS.search(path)) and ("://" in path or not Location.of(path).exists())


def _split_glob(path: str) -> tuple[Location, tuple[str, ...] | None]:
    """The place that `path` names, or the folder above its first wildcard and the pattern below that folder."""
    if not is_glob(path):
        return Location.of(path), None
    parts = path.split("/")
    first = next(number for number, part in enumerate(parts) if _GLOB_CHARACTERS.search(part))
    base = "/".join(parts[:first]) or ("/" if path.startswith("/") else ".")
    return Location.of(base), tuple(parts[first:])


def _matches(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_matches(parts[skip:], pattern[1:]) for skip in range(len(parts) + 1))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])
