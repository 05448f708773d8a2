"""A driver that runs, its end within a deadline, and what waits for what where it does not end."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from tests.faults.campaign.jobs import Case
from tests.faults.campaign.plan import MARK
from tests.support.processes import clean_environment
from tests.support.warm import Popen

_POLL_S = 0.02
_KEPT_BY_RAY = (
    "ray::IDLE",
    "ray::ActorLocationTracker",
    "ray::_StatsActor",
    "ray::_AutoscalingCoordinatorActor",
)


class HangError(Exception):
    """A run did not end, or did not come to a point, within its deadline."""


class Run:
    """One start of a job's command."""

    def __init__(
        self,
        case: Case,
        command: Sequence[str],
        values: dict[str, Any],
        environment: Mapping[str, str],
        clock_s: float = 0.0,
    ) -> None:
        number = len(list(case.folder.glob("*.log")))
        self.log = case.folder / f"{number}.log"
        case.log = self.log
        config = case.folder / f"{number}.yaml"
        config.write_text(json.dumps(values))
        self.clock = case.folder / f"{number}.clock"
        if clock_s:
            self.clock.write_text(str(clock_s))
        with open(self.log, "wb") as stream:
            self.process = Popen(
                [
                    sys.executable, "-m", "tests.faults.campaign.driver", str(self.clock),
                    *command, "--config", str(config),
                ],
                env=clean_environment(**environment, TMPDIR=str(case.folder / "tmp")),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                start_new_session=True,
            )  # fmt: skip
        self.began = time.monotonic()
        self.is_killed = False

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def kill(self) -> None:
        self.is_killed = True
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(timeout=30)

    def wait(self, deadline_s: float) -> int:
        """Its exit code. Raises HangError after `deadline_s` from its start."""
        try:
            return self.process.wait(timeout=max(deadline_s - (time.monotonic() - self.began), 0.1))
        except subprocess.TimeoutExpired:
            raise HangError(f"the driver did not end within {deadline_s:.0f} s") from None

    def reached(self, condition: Callable[[], bool], what: str, deadline_s: float) -> bool:
        """Wait until `condition`; False where the run has ended before. Raises HangError after the deadline."""
        while not condition():
            if not self.is_running:
                return False
            if time.monotonic() - self.began > deadline_s:
                raise HangError(f"{what} did not happen within {deadline_s:.0f} s")
            time.sleep(_POLL_S)
        return self.is_running

    def complaint(self) -> str | None:
        """What is wrong with how it has ended by itself: nothing, where a failure was one message and no traceback."""
        code = self.process.returncode
        if code == 0:
            return None
        # A driver whose head is gone is ended by Ray itself, in Ray's words.
        message = re.search(r"^raytower: .+|GCS may have been killed", self.said, re.MULTILINE)
        if message is None:
            return f"it ended with code {code} and without a message"
        if re.search(r"^Traceback ", self.said, re.MULTILINE):
            return f"it ended with code {code} and a traceback"
        return None if code in (1, 2) else f"it ended with code {code}"

    def message(self) -> str:
        found = re.findall(r"^raytower: (.+)", self.said, re.MULTILINE)
        return str(found[-1]) if found else ""


# --- processes -----------------------------------------------------------------------------------------------------


def marked(identity: str) -> list[psutil.Process]:
    """All processes that this campaign has started, itself too; by what stands in their environments."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == identity and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def command_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def working(identity: str, title: str) -> list[psutil.Process]:
    """Ray's workers whose title begins so, without those that wait for work and what Ray Data keeps for all jobs."""
    named = [(process, command_of(process)) for process in marked(identity)]
    return [
        process for process, name in named if name.startswith(title) and not name.startswith(_KEPT_BY_RAY)
    ]


def end_leftovers(
    identity: str, kept: set[int], *, keep_idle: bool = False, patience_s: float = 25.0
) -> list[str]:
    """End what has this campaign's mark and is not in `kept`, once it had time to end by itself; what that was.

    With `keep_idle` Ray's workers that wait for work are left alone, and the actors that Ray Data keeps for all jobs.
    """
    deadline = time.monotonic() + patience_s
    while left := _beside(identity, kept, keep_idle):
        if time.monotonic() > deadline:
            names = [f"{process.pid} {command_of(process)[:100]}" for process in left]
            for process in left:
                process.kill()
            psutil.wait_procs(left, timeout=10)
            return names
        time.sleep(0.2)
    return []


def _beside(identity: str, kept: set[int], keep_idle: bool) -> list[psutil.Process]:
    others = [process for process in marked(identity) if process.pid not in kept]
    return [item for item in others if not (keep_idle and command_of(item).startswith(_KEPT_BY_RAY))]


# --- who waits for what --------------------------------------------------------------------------------------------


def what_waits(identity: str, run: Run | None, cluster: Callable[[], Any], file: Path) -> None:
    """Write for each process its threads and what they wait for in the kernel, the stacks of the driver, the actors."""
    if run is not None and run.is_running:
        os.kill(run.process.pid, signal.SIGUSR1)  # the stacks go to its log
        time.sleep(1)
    lines = []
    for process in sorted(marked(identity), key=lambda item: item.pid):
        try:
            lines.append(f"{process.pid} {process.status()} of {process.ppid()}: {command_of(process)[:200]}")
        except psutil.Error:
            continue
        for task in sorted(Path(f"/proc/{process.pid}/task").glob("*")):
            try:
                comm, wchan = (task / "comm").read_text().strip(), (task / "wchan").read_text().strip()
                lines.append(f"    thread {task.name} {comm}: {wchan}")
            except OSError:
                continue
    try:
        lines.append(json.dumps(cluster(), indent=1))
    except Exception as error:  # a cluster that does not answer is a finding, too
        lines.append(f"the cluster does not say: {error}")
    if run is not None:
        lines.append(run.said[-20_000:])
    file.write_text("\n".join(lines), encoding="utf-8")
