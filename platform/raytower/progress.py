"""Lines of progress for people to read, and the progress of a job that goes through rows."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

from raytower import escapes

# In front of a line that a Ray worker logs: the driver shows these, and keeps what others write there.
MARK = "raytower| "
_LOG_EVERY_SECONDS = 5.0


def log(message: str) -> None:
    """A line of progress for people. It goes to stderr: stdout belongs to the result."""
    mark = MARK if _is_worker() else ""
    # Not print(): Ray Train's workers patch it and show each line twice.
    sys.stderr.write("".join(f"{mark}{line}\n" for line in escapes.lines(message).split("\n")))
    sys.stderr.flush()


def _is_worker() -> bool:
    """Whether this process is a worker of Ray; asks only where Ray is imported already."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray._private.worker.global_worker.mode == ray.WORKER_MODE)


class Progress:
    """Rate and time left: a bar on a terminal, else a line every few seconds and at the end."""

    def __init__(self, verb: str, unit: str, total: int) -> None:
        self._verb = verb
        self._unit = unit
        self._total = total
        self._done = 0
        self._started = self._reported = time.perf_counter()
        self._bar: tqdm | None = None
        if sys.stderr.isatty():
            self._bar = tqdm(desc=verb, unit=f" {unit}", total=total, leave=False, dynamic_ncols=True)

    def advance(self, rows: int) -> None:
        """Count `rows` more as done."""
        self._done += rows
        now = time.perf_counter()
        if self._bar is not None:
            self._bar.update(rows)
        if self._done == self._total or (self._bar is None and now - self._reported > _LOG_EVERY_SECONDS):
            if self._bar is not None:
                self._bar.close()
            self._reported = now
            rate = self._done / max(now - self._started, 1e-9)
            left = (self._total - self._done) / rate
            counted = f"{self._verb} {self._done:,}/{self._total:,} {self._unit}"
            log(f"{counted}  {rate:.1f} {self._unit}/s  {left:.0f} s left")
