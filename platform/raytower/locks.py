"""Locks between processes on one machine, or on a file system that machines share: flock on a file of its own."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from raytower.storage_errors import StorageError, explaining

_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class LockHeldError(StorageError):
    """Another process is inside."""


@contextmanager
def exclusive(lock: Path, *, wait: bool = True) -> Iterator[None]:
    """One process at a time is inside, for one `lock` file, which is removed behind it; killed, it leaves at once.

    Raises:
        LockHeldError: another process is inside, and `wait` is false.
        StorageError: the file cannot be made, or its file system knows no locks.
    """
    descriptor = _acquire(lock, wait)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # another account's file in a folder where only owners may remove
            lock.unlink()
        os.close(descriptor)


def _acquire(lock: Path, wait: bool) -> int:
    while True:
        with explaining(lock):
            lock.parent.mkdir(parents=True, exist_ok=True)
            # 0666: the umask decides whether a team may share it.
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            _flock(descriptor, lock, wait)
            if _is_still(descriptor, lock):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _flock(descriptor: int, lock: Path, wait: bool) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError as error:
        raise LockHeldError(f"{lock} is held by another process") from error
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        raise StorageError(
            f"{lock} cannot be locked: {error.strerror}. Its file system has no locks (NFS needs lockd, Lustre the "
            "mount option flock); choose a place that has them, for caches by RAYTOWER_CACHE"
        ) from error


def _is_still(descriptor: int, lock: Path) -> bool:
    """Whether the file that was locked has this name yet: whoever was inside before has removed it."""
    try:
        return os.path.samestat(os.fstat(descriptor), lock.stat())
    except FileNotFoundError:
        return False
