"""From a path, folder or glob to the data files it means, each with a stem that its line-derived ids start with."""

from __future__ import annotations

import fnmatch
import itertools
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal
from urllib.parse import unquote

import pyarrow as pa
from pyarrow import fs as pafs

from raytower.errors import InputError
from raytower.storage import Location

Compression = Literal["gzip", "zstd"]

# What an extension means under format auto. Text is looked at more closely once the record kind is known.
FORMAT_BY_SUFFIX = {
    ".txt": "lines",
    ".tsv": "tsv",
    ".csv": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
}
_COMPRESSION_BY_SUFFIX: dict[str, Compression] = {".gz": "gzip", ".zst": "zstd"}
COMPRESSION_SUFFIXES = tuple(_COMPRESSION_BY_SUFFIX)
_SUFFIXES_BY_FORMAT = {"lines": (".txt", ".tsv"), "tsv": (".tsv", ".txt", ".csv")}
_GLOB_CHARACTERS = re.compile(r"[*?\[]")
# Files that say what a folder holds, and are no data: those of our own jobs, which also mark a folder as an output of
# ours, and those that lie beside published data sets.
_OUR_FILES = frozenset({"manifest.json", "job.json", "raytower.json", "shard.json"})
_SAVED_DATASET, _SAVED_SPLITS = "state.json", "dataset_dict.json"
_ABOUT = _OUR_FILES | {
    _SAVED_DATASET, _SAVED_SPLITS, "dataset_info.json", "dataset_infos.json", "readme.txt", "license.txt"
}  # fmt: skip
# `<output>` with this suffix is the folder of the rows that the job rejected.
QUARANTINE_SUFFIX = ".quarantine"
_SPLIT_WORDS = {
    "train": "train", "training": "train", "训练": "train", "训练集": "train", "dev": "dev", "开发集": "dev",
    "valid": "validation", "validation": "validation", "val": "validation", "验证": "validation",
    "验证集": "validation", "test": "test", "testing": "test", "测试": "test", "测试集": "test", "eval": "eval",
    "evaluation": "eval",
}  # fmt: skip
_INDEX_VERSION = re.compile(r"/versions/[0-9]{6,}\.json$")
_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,17}")
_NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"


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
    partitions: tuple[tuple[str, str | int | None], ...] = ()
    """Columns that stand in the names of the folders above (`lang=zh`), from the outermost on."""

    def __str__(self) -> str:
        return str(self.location)

    def changed(self, what: str) -> InputError:
        """The error for a file that changed after its survey; `what` names the difference."""
        return InputError(
            f"{self} has changed since it was surveyed: {what}; run the job again while the file stays as it is"
        )

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
            raise self.changed(f"{size_bytes} bytes, {self.size_bytes} before")
        return pa.CompressedInputStream(stream, self.compression) if self.compression else stream


@dataclass(frozen=True)
class Found:
    """The data files of one input in name order, and what was passed over, each with the reason."""

    files: tuple[SourceFile, ...]
    ignored: tuple[str, ...] = ()


def find_files(path: str, file_format: str = "auto") -> Found:
    """The data files that `path` means.

    A file is taken as it is. A folder gives, at any depth, the files with a known extension (of `file_format` where
    that is not auto). A glob (`*`, `?`, `[…]`, `**`) gives every match; a part of it that exists as written is no
    pattern. Links are followed, and each file is taken once. Names that begin with `.` or `_`, files about other
    files and folders that our own jobs wrote are no data.

    Raises:
        InputError: nothing is there, or nothing that is data; a link leads nowhere, or a name is not UTF-8.
    """
    base, pattern = split_glob(path)
    if pattern is None and base.is_file():
        return Found(_make_files([base], base.parent))
    if pattern is None and not base.is_dir():
        raise InputError(f"no file or folder at {path!r}; check the path")
    if pattern is None and (saved := _saved_dataset(base)):
        return Found(_make_files(saved, base))
    wanted = _suffixes(file_format)
    listing = _files_below(base, None if pattern is None or "**" in pattern else len(pattern))
    outputs = _our_outputs(listing, base)
    saved_below = {
        place.parent.path: _saved_dataset(place.parent) for place in listing if place.name == _SAVED_DATASET
    }
    found: dict[str, Location] = {}
    ignored: list[str] = []
    for place in listing:
        parts = _parts_below(place, base)
        if pattern is not None and not _matches(parts, pattern):
            continue
        is_data = _suffix_of(place.name)[0] in wanted
        reason = _no_data_reason(parts, outputs, pattern, is_data)
        if reason is None and (listed := saved_below.get(place.parent.path)) and place not in listed:
            reason = f"{_SAVED_DATASET} beside it does not list it"
        if reason is not None:
            ignored += [f"{_shown(str(place))} ({reason})"] if is_data or reason == _UNKNOWN else []
            continue
        real = _real_path(place)
        if (known := found.setdefault(real, place)) is not place:
            ignored.append(f"{place} (the same file as {known})")
    if not found:
        passed_over = f"; passed over: {', '.join(ignored[:3])}" if ignored else ""
        if pattern is not None:
            raise InputError(f"no file matches {path!r}; check the pattern{passed_over}")
        raise InputError(
            f"folder {path!r} holds no data file (looked for {', '.join(sorted(wanted))}, also with .gz or .zst); "
            f"name the files with a glob such as 'folder/*', or give another folder{passed_over}"
        )
    return Found(_make_files(list(found.values()), base), tuple(ignored))


def refuse_several_splits(path: str, file_format: str = "auto") -> None:
    """Raise InputError for a folder whose files, or folders, are called train, dev, test: it would be read as one.

    A glob is taken by its word.
    """
    base, pattern = split_glob(path)
    if pattern is not None or not base.is_dir():
        return
    splits: dict[str, list[str]] = defaultdict(list)
    for file in find_files(path, file_format).files:
        *folders, _ = _parts_below(file.location, base)
        split = next(filter(None, map(_split_of, [PurePosixPath(file.stem).name, *reversed(folders)])), None)
        if split is not None:
            splits[split].append("/".join(_parts_below(file.location, base)))
    if len(splits) > 1:
        found = "; ".join(f"{split}: {', '.join(names[:3])}" for split, names in splits.items())
        wanted = f"{path.rstrip('/')}/{(splits.get('train') or next(iter(splits.values())))[0]}"
        raise InputError(
            f"folder {path!r} holds files of more than one split ({found}), which would all be read as one; name the "
            f"file that is wanted, such as {wanted!r}, or a glob"
        )


def _split_of(name: str) -> str | None:
    """The split that a file or folder is named after, by its first or last word: `train-00000-of-00002`, `faq_dev`."""
    words = re.findall(r"[^\W\d_]+", name.lower())
    return next((_SPLIT_WORDS[word] for word in (*words[:1], *words[-1:]) if word in _SPLIT_WORDS), None)


def refuse_output_inside(output: str, path: str, *, is_folder: bool = False) -> None:
    """Raise InputError where a job would write below a folder, or over a file, that it reads from.

    Args:
        output: what it writes.
        path: its input, as `find_files` takes it.
        is_folder: whether the output is a folder of files that no input counts as data.
    """
    if would_read(path, output, is_folder=is_folder):
        raise InputError(
            f"output {output!r} lies inside the input {path!r}, where the next run would read it as data; give an "
            "output outside"
        )


def would_read(path: str, output: str, *, is_folder: bool = False) -> bool:
    """Whether an input takes what lies at `output`: it is that, a folder above it, or a glob that matches it.

    A glob without `**` takes no folder, but for the files that it matches in it.
    """
    base, pattern = split_glob(path)
    place = Location.of(output)
    # By their real names: one place may be named by a link, or with `..`.
    below, above = (
        PurePosixPath(os.path.realpath(each.path) if each.is_local else each.path) for each in (place, base)
    )
    if place.filesystem != base.filesystem or not below.is_relative_to(above):
        return False
    if pattern is None or "**" in pattern:
        return True
    return not is_folder and _matches(below.relative_to(above).parts, pattern)


def single_file(location: Location) -> SourceFile:
    """`location` as a data file. Raises InputError where there is no such file."""
    if not location.is_file():
        raise InputError(f"no file at {location}; check the path")
    return _make_files([location], location.parent)[0]


def _make_files(places: Sequence[Location], root: Location) -> tuple[SourceFile, ...]:
    below = [_parts_below(place, root) for place in places]
    stems = _unique_stems([PurePosixPath(*parts) for parts in below])
    partitions = _partitions([parts[:-1] for parts in below])
    infos = root.filesystem.get_file_info([place.path for place in places])
    files = []
    for place, stem, columns, info in zip(places, stems, partitions, infos, strict=True):
        suffix, compression = _suffix_of(place.name)
        if compression and FORMAT_BY_SUFFIX.get(suffix) in ("parquet", "arrow"):
            raise InputError(
                f"{place} is a compressed {suffix[1:]} file; such files compress inside, so decompress it first"
            )
        files.append(SourceFile(place, stem, suffix, compression, int(info.size), info.mtime_ns, columns))
    return tuple(files)


def _partitions(folders_of: Sequence[Sequence[str]]) -> list[tuple[tuple[str, str | int | None], ...]]:
    """The columns that each file's folders name; a column holds integers if its value is one for every file."""
    pairs = [
        [folder.split("=", 1) for folder in folders if re.fullmatch(r"[^=]+=.+", folder)]
        for folders in folders_of
    ]
    texts: dict[str, list[str]] = defaultdict(list)
    for name, value in itertools.chain.from_iterable(pairs):
        texts[name] += [unquote(value)] if value != _NULL_PARTITION else []
    numbers = {name for name, found in texts.items() if found and all(map(_INTEGER.fullmatch, found))}

    def typed(name: str, value: str) -> str | int | None:
        if value == _NULL_PARTITION:
            return None
        return int(unquote(value)) if name in numbers else unquote(value)

    return [tuple((name, typed(name, value)) for name, value in columns) for columns in pairs]


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

    stems = [bare(path).name for path in paths]
    for longer in (lambda path: str(bare(path)), str):
        counts = Counter(stems)
        stems = [longer(path) if counts[stem] > 1 else stem for path, stem in zip(paths, stems, strict=True)]
    return stems if len(set(stems)) == len(stems) else [str(path) for path in paths]


def _files_below(base: Location, depth: int | None) -> list[Location]:
    """Every file of a folder in name order, `depth` levels deep; on this machine links too, even dead ones."""
    if base.is_local:
        return [Location(base.filesystem, path) for path in sorted(_walk(base.path, depth, set()))]
    # One listing call: a call for each folder is slow on object stores.
    selector = pafs.FileSelector(base.path, allow_not_found=True, recursive=True)
    infos = [info for info in base.filesystem.get_file_info(selector) if info.type == pafs.FileType.File]
    return [Location(base.filesystem, path) for path in sorted(info.path for info in infos)]


def _walk(folder: str, depth: int | None, seen: set[tuple[int, int]]) -> Iterator[str]:
    """Paths of the files below `folder`; a folder that links lead to more than once is entered once."""
    try:
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            return
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(folder) as listing:
            # Real folders first, so that a folder which links lead to is entered under its own name.
            entries = sorted(listing, key=lambda entry: (entry.is_symlink(), entry.name))
    except OSError as error:
        raise InputError(
            f"{_shown(folder)} cannot be listed: {error.strerror}; check its permissions"
        ) from error
    for entry in entries:
        if not entry.is_dir():
            yield entry.path
        elif depth is None or depth > 1:
            yield from _walk(entry.path, None if depth is None else depth - 1, seen)


def _parts_below(place: Location, base: Location) -> tuple[str, ...]:
    return PurePosixPath(place.path).relative_to(base.path).parts


_UNKNOWN = "its extension is no data file's"


def _no_data_reason(
    parts: tuple[str, ...], outputs: set[tuple[str, ...]], pattern: tuple[str, ...] | None, is_data: bool
) -> str | None:
    """Why the file at `parts` below an input folder is not data, or None where it is."""
    if any(part.startswith((".", "_")) for part in parts if pattern is None or part not in pattern):
        return "its name or a folder's begins with . or _"
    if any(parts[:length] in outputs for length in range(1, len(parts))):
        return "it lies in an output of a raytower job"
    if any(part.endswith(QUARANTINE_SUFFIX) for part in parts[:-1] if pattern is None or part not in pattern):
        return "it lists rows that a raytower job rejected"
    if parts[-1].lower() in _ABOUT and (pattern is None or parts[-1] not in pattern):
        return "it is about other files"
    return None if is_data or pattern is not None else _UNKNOWN


def _our_outputs(listing: Sequence[Location], base: Location) -> set[tuple[str, ...]]:
    """Folders below `base` that a job of ours wrote, by their parts."""
    marks = [place for place in listing if place.name in _OUR_FILES]
    found = {_parts_below(place, base)[:-1] for place in marks if _is_ours(place)}
    versions = [place for place in listing if _INDEX_VERSION.search(place.path)]
    return found | {_parts_below(place, base)[:-2] for place in versions if _is_ours(place)}


def _is_ours(place: Location) -> bool:
    try:
        with place.open_read() as stream:
            return b'"fingerprint"' in stream.read(65_536) or place.name == "raytower.json"
    except (OSError, InputError):
        return False


def _real_path(place: Location) -> str:
    """The name under which the storage holds a file. Raises InputError for a dead link or a name that is not UTF-8."""
    if not place.is_local:
        return place.path
    refuse_other_than_utf8(place.path)
    if not os.path.exists(place.path):
        raise InputError(
            f"{place} is a link to {os.readlink(place.path)!r}, where nothing is; bring the file back, or remove the "
            "link"
        )
    return os.path.realpath(place.path)


def refuse_other_than_utf8(path: str) -> None:
    """Raise InputError for a path whose bytes are not UTF-8: no storage library accepts it."""
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"the file name {_shown(path)} is not UTF-8 (GBK, perhaps, from an archive made on Windows); rename it, "
            "for instance with `convmv -f gbk -t utf-8`"
        ) from error


def _shown(path: str) -> str:
    return os.fsencode(path).decode("utf-8", errors="backslashreplace")


def _saved_dataset(folder: Location) -> list[Location]:
    """The Arrow files of a Hugging Face data set that `save_to_disk` wrote to `folder`; empty where it is none."""
    if (folder / _SAVED_SPLITS).is_file():
        splits = (folder / _SAVED_SPLITS).read_json().get("splits", [])
        raise InputError(
            f"{folder} holds the splits {', '.join(splits)} of a data set; name the folder of one of them"
        )
    if not (folder / _SAVED_DATASET).is_file():
        return []
    state = (folder / _SAVED_DATASET).read_json()
    listed = state.get("_data_files") if isinstance(state, dict) else None
    names = []
    for name in (file.get("filename") for file in listed or [] if isinstance(file, dict)):
        if not isinstance(name, str) or PurePosixPath(name).name != name or name == "..":
            raise InputError(
                f"{folder / _SAVED_DATASET} lists {name!r}, which is no file of its folder; save the data set again"
            )
        names.append(name)
    # Other Arrow files beside them are caches.
    return [single_file(folder / name).location for name in names]


def is_glob(path: str) -> bool:
    """Whether `path` has wildcards and is not itself the name of something that exists."""
    name, _ = _split_options(path)
    return bool(_GLOB_CHARACTERS.search(name)) and ("://" in name or not Location.of(path).exists())


def _split_options(path: str) -> tuple[str, str]:
    """A path or URI and its options: in `s3://bucket/key?region=x` the question mark is no wildcard."""
    found = re.search(r"\?[a-z_]+=[^*?]*$", path) if "://" in path else None
    return (path[: found.start()], found[0]) if found else (path, "")


def split_glob(path: str) -> tuple[Location, tuple[str, ...] | None]:
    """The place that `path` names, or the folder above its first wildcard and the pattern below that folder."""
    refuse_other_than_utf8(path)
    if not is_glob(path):
        return Location.of(path), None
    name, options = _split_options(path)
    parts = name.split("/")
    for number, part in enumerate(parts):
        base = "/".join(parts[:number]) or ("/" if name.startswith("/") else ".")
        if _GLOB_CHARACTERS.search(part) and not (
            "://" not in name and os.path.exists(os.path.join(base, part))
        ):
            break
    return Location.of(base + options), tuple(parts[number:])


def _matches(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_matches(parts[skip:], pattern[1:]) for skip in range(len(parts) + 1))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])
