"""Folders of the cache, made once and trusted by checksum; a model directory on remote storage is fetched into one."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath

from pyarrow import fs as pafs

from raytower.errors import FormatError, InputError
from raytower.storage import Location, cache_dir, explaining, fsync_dir, known_sha256, locked

_CHECKSUMS = ".checksums.json"
_COPY_BYTES = 16 * 1024 * 1024


def fetch_model(place: Location) -> Path:
    """The local copy of the directory at `place`, as it is there now: names, sizes and times of its files tell.

    Any number of processes may ask: one downloads, the others wait. A copy that was changed is fetched again.

    Raises:
        InputError: nothing is there. StorageError: the storage failed, or the cache has no room.
    """
    files = _listing(place)
    if not files:
        raise InputError(f"model {str(place)!r} does not exist or is empty; check the URI")
    state = [[name, info.size, info.mtime_ns] for name, info in sorted(files.items())]
    key = hashlib.sha256(json.dumps([str(place), state]).encode()).hexdigest()
    return cached_folder(cache_dir() / "models" / key, lambda beside: _download(place, files, beside))


def cached_folder(folder: Path, fill: Callable[[Path], object]) -> Path:
    """`folder` of the cache, whole: where it is not there, or is not what was put there, `fill` makes it anew.

    Any number of processes may ask: one fills, the others wait.

    Args:
        folder: named after all that decides its content.
        fill: given an empty place beside it, which need not exist yet; what it raises leaves nothing behind.

    Raises:
        StorageError: the cache cannot be written. Also what `fill` raises.
    """
    with locked(folder.with_name(f"{folder.name}.lock")):
        if not _is_intact(folder):
            beside = folder.with_name(f".{folder.name}.tmp")  # one at a time: the lock is ours
            shutil.rmtree(beside, ignore_errors=True)
            try:
                fill(beside)
                _keep(beside, folder)
            finally:
                shutil.rmtree(beside, ignore_errors=True)
    return folder


def _is_intact(folder: Path) -> bool:
    """Whether a folder of the cache holds exactly what was put there, by the checksums in it."""
    try:
        return bool(json.loads((folder / _CHECKSUMS).read_text(encoding="utf-8")) == checksums(folder))
    except (OSError, ValueError):
        return False


def _keep(beside: Path, folder: Path) -> None:
    """Make the finished folder `beside` the folder `folder` of the cache, in place of whatever is there."""
    with explaining(folder):
        (beside / _CHECKSUMS).write_text(json.dumps(checksums(beside)), encoding="utf-8")
        for file in beside.rglob("*"):
            fsync_dir(file)  # takes files as well
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(beside, folder)
        fsync_dir(folder.parent)


def checksums(folder: Path) -> dict[str, str]:
    """The sha256 of each file below `folder`, by its name from there."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != _CHECKSUMS)
    return {path.relative_to(folder).as_posix(): known_sha256(Location.of(path)) for path in files}


def sha256_of(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _listing(place: Location) -> dict[str, pafs.FileInfo]:
    """The files below `place` by their name from there."""
    files = {
        PurePosixPath(info.path).relative_to(place.path): info
        for info in place.infos(recursive=True)
        if info.type == pafs.FileType.File
    }
    for name in files:
        if ".." in name.parts:
            raise FormatError(f"{place} holds the name {str(name)!r}, which would lead outside of the cache")
    return {str(name): info for name, info in files.items()}


def _download(place: Location, names: Iterable[str], folder: Path) -> None:
    for name in names:
        with (place / name).open_read() as stream, Location.of(folder / name).open_write() as sink:
            while chunk := stream.read(_COPY_BYTES):
                sink.write(chunk)
