"""What Ray's workers write: our own lines are shown as they are, the rest is kept for the case that the job fails.

Knows no Ray: the runtime hands over what Ray's driver has received from its workers.
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raytower import ending, escapes
from raytower.progress import MARK

_KEPT_LINES = 10_000
# Of a line that Ray itself writes; some have a paragraph of advice behind what happened.
_SHOWN_CHARACTERS = 300
# Processes of Ray Serve itself. They tell of requests whose client went away, by tracebacks; what matters of them we
# say ourselves.
_SERVES_OWN = ("ProxyActor", "ServeController")
# Lines of a worker that failed come this much later than its failure.
_LATE_SECONDS = 1.0


class WorkerOutput:
    """Takes the lines of all workers; `show_all` shows other lines than ours too, behind the name of their process.

    One process may run several jobs on one Ray, whose lines come late: a job that asks for no Ray has none.
    """

    def __init__(self) -> None:
        self.show_all = False
        self._expected = False
        self._kept: deque[str] = deque(maxlen=_KEPT_LINES)
        self._lock = threading.Lock()

    def begin(self) -> None:
        """A job begins: what the workers of an earlier one wrote is not its own."""
        with self._lock:
            self._expected = False
            self._kept.clear()

    def expect(self) -> None:
        """The job has asked for Ray, so that what workers write from now on may tell why it fails."""
        self._expected = True

    def take(self, data: Mapping[str, Any]) -> None:
        """One message of Ray's log monitor: `lines`, `pid`, and the `actor_name` or `task_name` of a worker.

        Nothing is shown after a signal: a worker that is killed while it starts dumps its native stack.
        """
        name = data.get("actor_name") or data.get("task_name") or ""
        source = f"{name} {data.get('pid')}".strip()
        for line in map(escapes.without_colours, data["lines"]):
            if line.startswith(MARK):
                shown: str | None = line.removeprefix(MARK)
            elif _is_of_note(data.get("pid"), line):
                shown = f"({source}) {line[:_SHOWN_CHARACTERS]}"
            else:
                with self._lock:
                    self._kept.append(f"({source}) {line}\n")
                is_rays_own = data.get("pid") == "raylet" or name in _SERVES_OWN
                shown = f"({source}) {line}" if self.show_all and not is_rays_own else None
            if shown is not None and not ending.has_begun():
                sys.stderr.write(f"{shown}\n")
        sys.stderr.flush()

    def keep(self) -> Path | None:
        """Write what was not shown to a file that only its owner reads; None where there is nothing."""
        if not self._expected:
            return None
        time.sleep(_LATE_SECONDS)
        with self._lock:
            lines = list(self._kept)
        if not lines:
            return None
        number, name = tempfile.mkstemp(prefix="raytower-workers-", suffix=".log")
        with os.fdopen(number, "w", encoding="utf-8") as file:
            file.writelines(lines)
        return Path(name)


def _is_of_note(pid: object, line: str) -> bool:
    """Whether a line that Ray itself writes tells what a user can do something about: memory, or nodes that lack."""
    return pid == "autoscaler" or (pid == "raylet" and "memory" in line.lower())


OUTPUT = WorkerOutput()
