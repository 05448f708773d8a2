"""One writer at a time: a lock on a local disk, an object that expires on an object store."""

from __future__ import annotations

import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime

from raytower.errors import RaytowerError
from raytower.storage import objects
from raytower.storage.errors import StorageError, as_storage_error, is_full
from raytower.storage.local import is_locked, is_still, locked
from raytower.storage.location import Location

_POLL_SECONDS = 0.2


class Lease:
    """The right to write. Call `check()` before each step that no other writer may do at the same time."""

    def __init__(self, place: Location, is_held: Callable[[], bool]) -> None:
        self._place = place
        self._is_held = is_held

    def check(self) -> None:
        """Raises RaytowerError where the lease was lost: another writer may be at work."""
        if not self._is_held():
            raise RaytowerError(
                f"the lease {self._place} was lost: it could not be renewed in time, or somebody removed it; nothing "
                "more is written. Run the command again"
            )


@contextmanager
def writer_lease(
    place: Location, *, owner: str, seconds: float = 60.0, wait_seconds: float = 0.0
) -> Iterator[Lease]:
    """Be the one writer while the block runs.

    On a local disk the lease ends with the process that holds it. On an object store the holder renews it in the
    background. If the holder dies, others wait until they have seen it unchanged for 1.5 times `seconds`, whatever
    `wait_seconds` says: that is for a holder who lives.

    Raises:
        RaytowerError: somebody else holds it, renews it, and did not let go within `wait_seconds`.
        InputError: the storage has neither locks nor conditional writes.
    """
    mine = {
        "owner": owner,
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
        "token": uuid.uuid4().hex,
    }
    if place.is_local:
        with _local_lease(place, mine, wait_seconds) as lease:
            yield lease
        return
    held = _ObjectLease(place, mine, seconds)
    held.acquire(wait_seconds)
    try:
        yield Lease(place, held.is_held)
    finally:
        held.release()


def lease_holder(place: Location) -> str | None:
    """Who holds the lease of a place now, by the name that was given as `owner`; None where nobody does.

    Nothing is written.

    Raises:
        StorageError: the storage fails. InputError: the storage has neither locks nor conditional writes.
    """
    if place.is_local:
        held = is_locked(place.local_path)
        content = place.read_bytes() if held and place.is_file() else b"{}"
    else:
        found = objects.read(place.filesystem, place.path)
        content = b"{}" if found is None else found[0]
        held = time.time() <= _expiry(content)
    return _read(content).get("owner", "another process") if held else None


@contextmanager
def _local_lease(place: Location, mine: dict[str, str], wait_seconds: float) -> Iterator[Lease]:
    path = place.local_path
    with locked(path, wait_seconds) as descriptor:
        if descriptor is None:
            # The holder may have let go a moment ago and removed the file.
            raise _taken(place, path.read_bytes() if path.is_file() else b"{}")
        os.ftruncate(descriptor, 0)
        _describe(descriptor, mine, place)
        # A lock on a removed file excludes no other process, so the file must still have its name.
        lease = Lease(place, lambda: is_still(descriptor, path))
        lease.check()
        yield lease


def _describe(descriptor: int, mine: dict[str, str], place: Location) -> None:
    """Write into the file who holds it, for those who wait. A full disk is no error: jobs that make room must run."""
    try:
        os.pwrite(descriptor, json.dumps(mine).encode(), 0)
    except OSError as error:
        if not is_full(error):
            raise as_storage_error(error, str(place)) from error


class _ObjectLease:
    """An object with its owner, written only where it is absent, given up, left alone for long, or ours.

    Nobody compares clocks: a clock that is set meanwhile, or is hours off, neither takes a living holder's lease nor
    keeps a dead one's. The holder counts by its own monotonic clock from before it wrote, others by theirs from when
    they first saw what is there. A holder writes every third of `seconds`, so whoever has seen one object unchanged
    for 1.5 times `seconds` knows that the holder's time has passed (Kubernetes elects leaders in the same way).
    """

    def __init__(self, place: Location, mine: dict[str, str], seconds: float) -> None:
        self._place, self._mine, self._seconds = place, mine, seconds
        self._etag = ""
        self._valid_until = 0.0  # by this process's monotonic clock
        self._seen = ("", 0.0)  # the etag of another's object, and when it was first seen
        self._holder_lives = False
        self._ended = threading.Event()
        self._renewal = threading.Thread(target=self._renew, name="raytower-lease", daemon=True)

    def acquire(self, wait_seconds: float) -> None:
        deadline = time.monotonic() + wait_seconds
        while (held_by := self._try()) is not None:
            # Beyond the deadline it is a dead holder alone that is waited for.
            if time.monotonic() >= deadline and self._holder_lives:
                raise _taken(self._place, held_by)
            time.sleep(_POLL_SECONDS)
        self._renewal.start()

    def is_held(self) -> bool:
        return time.monotonic() < self._valid_until

    def release(self) -> None:
        """Mark it as expired if it is still ours. An unconditional delete could remove another holder's lease."""
        self._ended.set()
        self._renewal.join()
        if self.is_held():
            with suppress(StorageError):  # if this fails, it expires by itself
                self._replace(self._etag, expires=0.0)

    def _try(self) -> bytes | None:
        """None where the lease is ours now, else what its holder wrote."""
        found = self._read()
        if found is None:
            self._place.put_if_absent(self._content())
        elif self._is_free(*found):
            self._replace(found[1])
        else:
            return found[0]
        return None if self._adopt() else (self._read() or (b"", ""))[0]

    def _is_free(self, content: bytes, etag: str) -> bool:
        if not _expiry(content):
            return True
        before, since = self._seen
        if etag != before:
            self._holder_lives = bool(before)
            self._seen = etag, time.monotonic()
            return False
        return time.monotonic() > since + 1.5 * self._seconds

    def _renew(self) -> None:
        while not self._ended.wait(self._seconds / 3):
            try:
                self._replace(self._etag)
                # Read it back in any case: an earlier renewal may have succeeded although its answer was lost.
                if not self._adopt():
                    self._valid_until = 0.0
                    return
            except StorageError:
                continue  # tried again until the lease ends

    def _adopt(self) -> bool:
        """Whether the object is ours; if so it counts for `seconds` from before it was written."""
        found = self._read()
        if found is None or _read(found[0]).get("token") != self._mine["token"]:
            return False
        self._etag = found[1]
        self._valid_until = float(_read(found[0])["written_at"]) + self._seconds
        return True

    def _read(self) -> tuple[bytes, str] | None:
        return objects.read(self._place.filesystem, self._place.path)

    def _replace(self, etag: str, expires: float | None = None) -> None:
        objects.replace(self._place.filesystem, self._place.path, self._content(expires), etag)

    def _content(self, expires: float | None = None) -> bytes:
        # `expires` is for people and for former versions, which went by it; `written_at` for this process alone.
        until = time.time() + self._seconds if expires is None else expires
        return json.dumps({**self._mine, "expires": until, "written_at": time.monotonic()}).encode()


def _read(content: bytes) -> dict[str, str]:
    try:
        value = json.loads(content)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _expiry(content: bytes) -> float:
    # No holder wrote content that cannot be parsed.
    try:
        return float(_read(content).get("expires", 0.0))
    except (TypeError, ValueError):
        return 0.0


def _taken(place: Location, content: bytes) -> RaytowerError:
    holder = _read(content)
    return RaytowerError(
        f"{place} is held by {holder.get('owner', 'another process')} since {holder.get('since', 'a moment ago')}; "
        "wait until it ends, or end it"
    )
