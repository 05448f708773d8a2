"""Checksums of large files, remembered in the cache: a job that is started again reads no gigabytes twice."""

from __future__ import annotations

import hashlib
import json
import os
import time
from contextlib import suppress

from pyarrow import fs as pafs

from raytower.storage import objects
from raytower.storage.location import Location, cache_dir

# Smaller files are hashed in less time than a note is read in.
_NOTED_BYTES = 16 * 2**20
# Clocks of file systems tick in steps: a file that was written moments ago may be written again at the same time.
_SETTLED_NS = 2_000_000_000


def known_sha256(place: Location) -> str:
    """The file's sha256. That of a large file is computed again only where the file was written since.

    Of a local file size, inode, and the times of its content and its entry tell whether it was: whoever sets back the
    first of these times changes the second. Of an object its etag does, which every writing changes. Files of other
    remote storage are read each time.

    Raises:
        InputError: there is no such file. StorageError: it cannot be read.
    """
    info = place.info()  # once: of an object it is a request
    is_worth_it = info.type == pafs.FileType.File and info.size >= _NOTED_BYTES
    before = _state(place) if is_worth_it else None
    if before is None:
        return place.sha256()
    name = os.fsencode(os.path.realpath(place.path)) if place.is_local else str(place).encode()
    note = Location.of(cache_dir() / "sha256" / f"{hashlib.sha256(name).hexdigest()[:32]}.json")
    with suppress(
        OSError, ValueError, KeyError, TypeError
    ):  # whatever the note is worth, the file itself is there
        known = json.loads(note.local_path.read_bytes())
        if known["state"] == before:
            return str(known["sha256"])
    found = place.sha256()
    if before == _state(place) and _is_settled(before):
        with suppress(OSError):  # a cache that cannot be written costs the time of the next reading
            note.write_json({"path": os.fsdecode(name), "state": before, "sha256": found})
    return found


def _state(place: Location) -> dict[str, int | str] | None:
    """What changes whenever the file is written; None where nothing is known to."""
    if not place.is_local:
        is_store = isinstance(place.filesystem, (pafs.S3FileSystem, pafs.GcsFileSystem, pafs.AzureFileSystem))
        return {"etag": objects.etag(place.filesystem, place.path)} if is_store else None
    status = os.stat(os.path.realpath(place.path))
    return {
        "device": status.st_dev,
        "inode": status.st_ino,
        "bytes": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "ctime_ns": status.st_ctime_ns,
    }


def _is_settled(state: dict[str, int | str]) -> bool:
    times = [state[name] for name in ("mtime_ns", "ctime_ns") if name in state]
    return all(time.time_ns() - int(written) > _SETTLED_NS for written in times)
