"""Operations of a local disk beyond open and rename: durable renames, exchange, atomic creation, locks."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from raytower.storage.errors import StorageRefusedError, explaining

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_POLL_SECONDS = 0.05
# Errors of file systems that have no hard links, no exchange of names, or no locks.
_UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def fsync_dir(path: Path) -> None:
    """Make a rename inside `path`, or the content of a file of that name, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_dirs(path: Path) -> None:
    """Make `path` and its parents, so that the new names survive a power cut."""
    if not path.is_dir():
        make_dirs(path.parent)
        path.mkdir(exist_ok=True)
        fsync_dir(path.parent)


def beside(path: Path, suffix: str = "tmp") -> Path:
    """A hidden name in the same folder that no other file has."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.{suffix}")


def create_file(path: Path, content: bytes) -> bool:
    """Make a whole file under a name that is not taken; False where it is."""
    make_dirs(path.parent)
    temporary = beside(path)
    try:
        _write_new(temporary, content)
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        # No hard links here (FAT, some FUSE): the name is still given once, but a crash may leave it with half a file.
        try:
            _write_new(path, content)
        except FileExistsError:
            return False
    finally:
        temporary.unlink(missing_ok=True)
    fsync_dir(path.parent)
    return True


def _write_new(path: Path, content: bytes) -> None:
    with open(path, "xb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def exchange(first: Path, second: Path) -> bool:
    """Exchange two names in one step; False where the system or the file system cannot.

    Raises:
        OSError: it failed for another reason.
    """
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _UNSUPPORTED:
        return False
    raise OSError(number, os.strerror(number), str(second))


@contextmanager
def locked(path: Path, wait_seconds: float | None = None) -> Iterator[int | None]:
    """Hold the lock file `path` and yield its descriptor, or None if `wait_seconds` pass first.

    The lock of a killed process ends at once. The file has the permissions that the umask gives, so that a team can
    share it. The holder removes it at the end.

    Raises:
        StorageRefusedError: the file system has no locks, or the file may not be opened.
    """
    deadline = None if wait_seconds is None else time.monotonic() + wait_seconds
    while True:
        with explaining(path):
            make_dirs(path.parent)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            held = _lock(descriptor, path, deadline)
            # The holder before us has removed the file we waited for; its name may belong to a new file by now.
            if held and not is_still(descriptor, path):
                continue
            try:
                yield descriptor if held else None
            finally:
                if held:
                    with contextlib.suppress(OSError):  # another account's file where only owners may remove
                        path.unlink()
            return
        finally:
            os.close(descriptor)


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock file `path` now. Nothing is made where there is none.

    It is asked for a shared lock that is given back at once; whoever wants the lock in that moment has to ask twice.
    """
    with explaining(path):
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False
    finally:
        os.close(descriptor)


def is_still(descriptor: int, path: Path) -> bool:
    """Whether the opened file still has the name `path`."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _lock(descriptor: int, path: Path, deadline: float | None) -> bool:
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if deadline is None else fcntl.LOCK_NB))
            return True
        except BlockingIOError:
            if deadline is None or time.monotonic() >= deadline:
                return False
            time.sleep(_POLL_SECONDS)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            raise StorageRefusedError(
                f"{path} cannot be locked: its file system has no locks ({error.strerror}); mount it with them "
                "(NFS: run lockd or use version 4; Lustre: -o flock), or use a local disk or an object store"
            ) from error
