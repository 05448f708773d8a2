"""Notice that the workers of a training will be ended: they save a checkpoint after the step that they are in, and end.

It comes by SIGTERM to a worker's process, or from Ray Train's controller (see `elastic`), which knows of a node that is
to go and of room for more workers. Ray Train then starts workers anew from that checkpoint, so no step is lost.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType

from ray.exceptions import RayActorError

_reasons: list[str] = []


class EndedForNow(RayActorError):
    """Ends a worker whose checkpoint is saved; Ray Train starts the workers anew and counts no failure.

    Ray Train counts failures of its workers, and does not count those of workers whose node has been taken away.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(error_msg=message, preempted=True)


def give(reason: str) -> None:
    """Tell this process that it will be ended; of several reasons the first one counts."""
    _reasons.append(reason)


def given() -> str | None:
    """Why this process will be ended; None while nobody has said so."""
    return _reasons[0] if _reasons else None


def take_sigterm() -> None:
    """Have the first SIGTERM be a notice; a second one does what it did before. Called in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("signals are the main thread's; Ray calls this in another one")
    before = signal.getsignal(signal.SIGTERM)

    def on_sigterm(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, before)
        give("SIGTERM has come")

    signal.signal(signal.SIGTERM, on_sigterm)
