"""A raytower job with a Ray of its own, ended by SIGKILL in the middle of its work."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

from tests.support.warm import Popen


def kill_once(
    ready: Callable[[], bool], command: Sequence[str], environment: Mapping[str, str], log: Path
) -> None:
    """Start `command`, kill it as soon as `ready`, and return when none of its processes is left."""
    with open(log, "wb") as stream:
        job = Popen(command, env=environment, stdout=stream, stderr=stream, start_new_session=True)
    try:
        deadline = time.monotonic() + 240
        while not ready():
            assert job.poll() is None, log.read_text()
            assert time.monotonic() < deadline, f"not ready after four minutes: {log.read_text()}"
            time.sleep(0.05)
        family = psutil.Process(job.pid).children(recursive=True)
        job.send_signal(signal.SIGKILL)
        job.wait(timeout=30)
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
    # Ray's own processes notice that their parent is gone, and its workers may finish a file until then; a new run must
    # not meet them.
    _, alive = psutil.wait_procs(family, timeout=3)
    for process in alive:
        process.kill()
    psutil.wait_procs(alive, timeout=30)
