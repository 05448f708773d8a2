"""How a process ends: SIGTERM and Ctrl-C unwind it within a limit of time, and its private folders go with it.

Knows neither Ray nor configs, so that the command line can set it up before it imports anything heavy.
"""

from __future__ import annotations

import atexit
import faulthandler
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import psutil

# docker, and orchestrators like it, kill after 10 seconds.
GRACE_S = 8.0
INTERRUPTED = 128 + signal.SIGINT
TERMINATED = 128 + signal.SIGTERM

_folders: list[tuple[int, Path]] = []


class Terminated(SystemExit):
    """SIGTERM has come. It unwinds the main thread as KeyboardInterrupt does; the exit code is 143."""

    def __init__(self) -> None:
        super().__init__(TERMINATED)


def raise_terminated(number: int, frame: FrameType | None) -> None:
    """A handler of SIGTERM."""
    raise Terminated


@contextmanager
def bounded_ending(grace_s: float = GRACE_S) -> Iterator[None]:
    """Have the first SIGINT or SIGTERM unwind the block, and end the process `grace_s` later in any case.

    After SIGTERM to a whole process group Ray's own processes are gone, and the calls that would end them in order
    wait a minute for an answer. Signals that follow the first are ignored: `timeout` sends two.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return
    came: list[int] = []

    def on_signal(number: int, frame: FrameType | None) -> None:
        came.append(number)
        for later in (signal.SIGINT, signal.SIGTERM):
            signal.signal(later, signal.SIG_IGN)
        # Now, while they can be found: children of one that has ended are nobody's descendants.
        _end_later(grace_s, 128 + number, psutil.Process().children(recursive=True))
        if number == signal.SIGTERM:
            raise Terminated
        raise KeyboardInterrupt

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        if not came:  # else what runs at exit is still to be bounded, and not to be disturbed
            for number, handler in before.items():
                signal.signal(number, handler)


def remove_at_end(folder: Path) -> None:
    """Have `folder` removed when this process ends, or is ended by `bounded_ending`."""
    if not _folders:
        atexit.register(_remove_folders)
    _folders.append((os.getpid(), folder))


def _end_later(grace_s: float, code: int, descendants: list[psutil.Process]) -> None:
    def end() -> None:
        for process in descendants:
            with suppress(psutil.Error):
                process.kill()
        _remove_folders()
        os._exit(code)

    limit = threading.Timer(grace_s, end)
    limit.daemon = True
    limit.start()
    # A call into Ray that holds the interpreter would keep `end` waiting too; this needs none.
    faulthandler.dump_traceback_later(grace_s + 1, exit=True, file=open(os.devnull, "w"))  # noqa: SIM115 - until the end


def _remove_folders() -> None:
    for owner, folder in _folders:
        if owner == os.getpid():  # a forked child leaves its parent's alone
            shutil.rmtree(folder, ignore_errors=True)
