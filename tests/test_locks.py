"""Locks between processes: who waits, who is refused, and file systems without them."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from pathlib import Path

import pytest

from raytower.locks import LockHeldError, exclusive
from raytower.storage_errors import StorageError


def test_one_at_a_time_is_inside_and_the_file_goes_behind_the_last(tmp_path: Path) -> None:
    lock = tmp_path / "a" / "x.lock"
    inside, most = [0], [0]

    def enter() -> None:
        for _ in range(50):
            with exclusive(lock):
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                inside[0] -= 1

    threads = [threading.Thread(target=enter) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]
    assert not lock.exists()
    with exclusive(lock), pytest.raises(LockHeldError, match=r"x\.lock is held"), exclusive(lock, wait=False):
        pass


def test_the_umask_decides_who_may_share_a_lock(tmp_path: Path) -> None:
    before = os.umask(0o002)
    try:
        with exclusive(tmp_path / "x.lock"):
            assert (tmp_path / "x.lock").stat().st_mode & 0o777 == 0o664
    finally:
        os.umask(before)


def test_a_file_system_without_locks_is_named_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(StorageError, match=r"x\.lock cannot be locked: No locks available.*RAYTOWER_CACHE"):
        exclusive(tmp_path / "x.lock").__enter__()
