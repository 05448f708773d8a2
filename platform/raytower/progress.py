"""Lines of progress for people to read, and the progress of a job that goes through rows."""

from __future__ import annotations

import sys
import time

_LOG_EVERY_SECONDS = 5.0


def log(message: str) -> None:
    """A line of progress for people. It goes to stderr: stdout belongs to the result."""
    # Not print(): Ray Train's workers patch it and show each line twice.
    sys.stderr.write(f"{message}\n")
    sys.stderr.flush()


class Progress:
    """Logs rate and time left, every few seconds and at the end."""

    def __init__(self, verb: str, unit: str, total: int) -> None:
        self._verb = verb
        self._unit = unit
        self._total = total
        self._done = 0
        self._started = self._reported = time.perf_counter()

    def advance(self, rows: int) -> None:
        """Count `rows` more as done."""
        self._done += rows
        now = time.perf_counter()
        if now - self._reported > _LOG_EVERY_SECONDS or self._done == self._total:
            self._reported = now
            rate = self._done / max(now - self._started, 1e-9)
            left = (self._total - self._done) / rate
            counted = f"{self._verb} {self._done:,}/{self._total:,} {self._unit}"
            log(f"{counted}  {rate:.1f} {self._unit}/s  {left:.0f} s left")
