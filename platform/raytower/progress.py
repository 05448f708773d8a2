"""Progress of a job that goes through rows, for people to read."""

from __future__ import annotations

import time

from raytower.runtime import log

_LOG_EVERY_SECONDS = 5.0


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
