"""How a process ends: SIGTERM and Ctrl-C unwind it within a limit of time, and its private folders go with it.

Knows neither Ray nor configs, so that the command line can set it up before it imports anything heavy.
"""

from __future__ import annotations

import atexit
import faulthandler
import json
import os
import shutil
import signal
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import NoReturn

import psutil

# docker, and orchestrators like it, kill after 10 seconds.
GRACE_S = 8.0
_OWNER = "owner.json"
_CLOCK_SECONDS = 60.0
INTERRUPTED = 128 + signal.SIGINT
TERMINATED = 128 + signal.SIGTERM


@dataclass
class _Ending:
    """What the first signal has left for the end."""

    code: int | None = None
    descendants: list[psutil.Process] = field(default_factory=list)


_ending = _Ending()
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

    def on_signal(number: int, frame: FrameType | None) -> None:
        _first_signal(number, grace_s)
        if number == signal.SIGTERM:
            raise Terminated
        raise KeyboardInterrupt

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        if _ending.code is None:  # else what runs at exit is still to be bounded, and not to be disturbed
            for number, handler in before.items():
                signal.signal(number, handler)


def remove_at_end(folder: Path) -> None:
    """Have `folder` removed when this process ends, or is ended by `bounded_ending`.

    It gets a file that names this process: after a SIGKILL another process may remove it by `remove_left_behind`.
    """
    if not _folders:
        atexit.register(_remove_folders)
    _folders.append((os.getpid(), folder))
    owner = {**_host(), "pid": os.getpid(), "started": psutil.Process().create_time()}
    (folder / _OWNER).write_text(json.dumps(owner), encoding="utf-8")


def remove_left_behind(place: Path, prefix: str) -> None:
    """Remove this user's folders in `place` that `remove_at_end` was told of by processes that are gone."""
    for folder in place.glob(f"{prefix}*"):
        if _is_left_behind(folder):
            shutil.rmtree(folder, ignore_errors=True)


def _is_left_behind(folder: Path) -> bool:
    try:
        status = folder.lstat()  # of a link itself, whoever has set it
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
            return False
        owner = json.loads((folder / _OWNER).read_text(encoding="utf-8"))
        host = {name: owner[name] for name in _host()}
        pid, started = int(owner["pid"]), float(owner["started"])
    except (OSError, ValueError, KeyError, TypeError):  # being made or removed, or no folder of ours
        return False
    if host != _host():
        return False
    try:
        # A clock that is set right moves the time of every start: only one well after the owner's is another process's.
        return psutil.Process(pid).create_time() > started + _CLOCK_SECONDS
    except psutil.NoSuchProcess:
        return True
    except psutil.Error:
        return False


def _host() -> dict[str, str]:
    """What numbers processes here: the machine, and the container where there is one. Others may share the folder."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return {"node": os.uname().nodename, "namespace": namespace}


def call_at_end(function: Callable[[], None], grace_s: float = GRACE_S) -> None:
    """Have `function` called when this process ends; signals meanwhile give it `grace_s`, as it is ending already.

    `bounded_ending` is over by then, and by default a signal would leave folders and children behind.
    """
    atexit.register(_call, function, grace_s)


def _call(function: Callable[[], None], grace_s: float) -> None:
    def on_signal(number: int, frame: FrameType | None) -> None:
        _first_signal(number, grace_s)

    if not has_begun():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, on_signal)
    function()


def has_begun() -> bool:
    """Whether a signal has come."""
    return _ending.code is not None


def signal_code() -> int | None:
    """The exit code of the first signal that has come, or None.

    It tells more than what unwinds the main thread: in the midst of a call into Ray, `Terminated` becomes another
    exception.
    """
    return _ending.code


def leave() -> NoReturn:
    """End at once, with all descendants: by the code of the signal that has come, or 1."""
    for process in _ending.descendants:
        with suppress(psutil.Error):
            process.kill()
    _remove_folders()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(_ending.code or 1)


def _first_signal(number: int, grace_s: float) -> None:
    for later in (signal.SIGINT, signal.SIGTERM):
        signal.signal(later, signal.SIG_IGN)
    _ending.code = 128 + number
    # Now, while they can be found: children of one that has ended are nobody's descendants.
    _ending.descendants = psutil.Process().children(recursive=True)
    _leave_later(grace_s)


def _leave_later(grace_s: float) -> None:
    limit = threading.Timer(grace_s, leave)
    limit.daemon = True
    limit.start()
    # A call into Ray that holds the interpreter would keep `leave` waiting too; this needs none.
    faulthandler.dump_traceback_later(grace_s + 1, exit=True, file=open(os.devnull, "w"))  # noqa: SIM115 - until the end


def _remove_folders() -> None:
    for owner, folder in _folders:
        if owner == os.getpid():  # a forked child leaves its parent's alone
            shutil.rmtree(folder, ignore_errors=True)
