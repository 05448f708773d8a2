"""Limits on the work of one process: deadlines, admission, and forward passes that concurrent requests share."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TypeVar

from raytower.serving.errors import OutOfTimeError

ResultT = TypeVar("ResultT")
ItemT = TypeVar("ItemT")
RowT = TypeVar("RowT")


@dataclass(frozen=True)
class Deadline:
    """A moment on the monotonic clock by which an answer is due."""

    start: float
    timeout_ms: int

    @staticmethod
    def after(timeout_ms: int) -> Deadline:
        return Deadline(time.monotonic(), timeout_ms)

    def earlier(self, milliseconds: int) -> Deadline:
        """One that comes so much sooner, for a stage that others follow."""
        return Deadline(self.start, max(self.timeout_ms - milliseconds, 0))

    def remaining_s(self) -> float:
        """Seconds left; 0 once past."""
        return max(self.start + self.timeout_ms / 1000 - time.monotonic(), 0.0)

    def elapsed_ms(self) -> float:
        return (time.monotonic() - self.start) * 1000

    def check(self) -> None:
        """Raises OutOfTimeError once past."""
        if not self.remaining_s():
            raise self.exceeded()

    def exceeded(self) -> OutOfTimeError:
        return OutOfTimeError(
            f"no answer within {self.timeout_ms} ms; raise timeout_ms, or ask for less: "
            "fewer or shorter texts, a smaller recall_k"
        )
