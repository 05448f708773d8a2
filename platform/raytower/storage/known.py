"""Checksums of large local files, remembered in the cache: a job that is started again reads no gigabytes twice."""

from __future__ import annotations

import hashlib
import json
import os
import time
from contextlib import suppress

from raytower.storage.location import Location, cache_dir

# Smaller files are hashed in less time than a note is read in.
_NOTED_BYTES = 16 * 2**20
# Clocks of file systems tick in steps: a file that was written moments ago may be written again at the same time.
_SETTLED_NS = 2_000_000_000


def known_sha256(place: Location) -> str:
    """The file's sha256. That of a large local file is computed again only where the file was written since.

    Whether it was is told by size, inode, and the times of its content and its entry: whoever sets back the first of
    these times changes the second. Remote files are read each time.

    Raises:
        InputError: there is no such file. StorageError: it cannot be read.
    """
    if not place.is_local or not place.is_file() or place.size_bytes() < _NOTED_BYTES:
        return place.sha256()
    path = os.path.realpath(place.path)
    note = Location.of(cache_dir() / "sha256" / f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:32]}.json")
    before = _state(path)
    with suppress(
        OSError, ValueError, KeyError, TypeError
    ):  # whatever the note is worth, the file itself is there
        known = json.loads(note.local_path.read_bytes())
        if known["state"] == before:
            return str(known["sha256"])
    found = place.sha256()
    if before == _state(path) and time.time_ns() - max(before["mtime_ns"], before["ctime_ns"]) > _SETTLED_NS:
        with suppress(OSError):  # a cache that cannot be written costs the time of the next reading
            note.write_json({"path": path, "state": before, "sha256": found})
    return found


def _state(path: str) -> dict[str, int]:
    status = os.stat(path)
    return {
        "device": status.st_dev,
        "inode": status.st_ino,
        "bytes": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "ctime_ns": status.st_ctime_ns,
    }
