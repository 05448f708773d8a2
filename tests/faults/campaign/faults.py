"""Each kind of fault, put into a run that has come to its moment."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults.campaign.jobs import Job
from tests.faults.campaign.nodes import LOST_AFTER_S, Cluster
from tests.faults.campaign.runs import Run, working
from tests.support.failing_s3 import FAULTS

HOUR_S = 3600.0
# One stall that is forgiven, and one after which the node counts as lost.
STALLS_S = (4.0, LOST_AFTER_S + 8)
AWAY_S = 12.0
BLIP_EVERY = 7
_ACTORS = {"training": ("RayTrainWorker",), "encoding": ("PieceEncoder", "MapWorker")}


class MissedError(Exception):
    """There was nothing to hit: the job had ended, or it was not there yet."""


class Faults:
    """What can be done to a run on a cluster. Every method says in words what it has done."""

    def __init__(self, identity: str, cluster: Callable[[], Cluster], seed: int) -> None:
        self._identity, self._ask = identity, lambda *what: cluster().ask(*what)
        self._random = random.Random(seed)

    def do(self, kind: str, job: Job, run: Run, way: int) -> str:
        method: Callable[[Job, Run, int], str] = getattr(self, f"_{kind}")
        return method(job, run, way)

    def _worker(self, job: Job, run: Run, way: int) -> str:
        def look() -> bool:
            found[:] = working(self._identity, job.works_in)
            return bool(found)

        found: list[Any] = []
        _until(look, run, "no process works")
        process = self._random.choice(found)
        title = " ".join(process.cmdline())
        os.kill(process.pid, signal.SIGKILL)
        return f"SIGKILL to {title}"

    def _actor(self, job: Job, run: Run, way: int) -> str:
        def look() -> bool:
            living = self._ask("actors")
            found[:] = [a for a in living if any(name in a["class"] for name in _ACTORS[job.name])]
            return bool(found)

        found: list[Any] = []
        _until(look, run, "no actor lives")
        actor = self._random.choice(found)
        self._ask("kill_actor", actor["id"])
        return f"actor {actor['class']} killed"

    def _node(self, job: Job, run: Run, way: int) -> str:
        busy: list[str] = []

        def look() -> bool:
            busy[:] = self._ask("busy")
            return bool(busy)

        _until(look, run, "no node works")
        self._ask("lose", busy[0])
        return f"a node with work lost ({len(busy)} had some)"

    def _blocks(self, job: Job, run: Run, way: int) -> str:
        held: dict[str, int] = {}

        def look() -> bool:
            held.update(self._ask("blocks"))
            return any(held.values())

        _until(look, run, "no node holds blocks")
        node = max(held, key=lambda name: held[name])
        self._ask("lose", node)
        return f"a node with {held[node]} blocks lost"

    def _driver(self, job: Job, run: Run, way: int) -> str:
        run.kill()
        return "SIGKILL to the driver"

    def _head(self, job: Job, run: Run, way: int) -> str:
        self._ask("lose_head")
        return "head lost"

    def _stall(self, job: Job, run: Run, way: int) -> str:
        seconds = STALLS_S[way]
        if not job.works_in:
            pid, what = run.process.pid, "the driver"
        elif way == 0:
            found = working(self._identity, job.works_in)
            if not found:
                raise MissedError("no process works")
            process = self._random.choice(found)
            pid, what = process.pid, " ".join(process.cmdline())
        else:
            busy = self._ask("busy")
            if not busy:
                raise MissedError("no node works")
            pid, what = self._ask("nodes")[busy[0]], "the raylet of a node with work"
        os.kill(pid, signal.SIGSTOP)
        try:
            time.sleep(seconds)
        finally:
            os.kill(pid, signal.SIGCONT)
        return f"{what} stood still for {seconds:.0f} s"

    def _clock(self, job: Job, run: Run, way: int) -> str:
        off_s = (HOUR_S, -HOUR_S)[way]
        run.clock.write_text(str(off_s))
        return f"the driver's clock set by {off_s:+.0f} s"


def _until(look: Callable[[], bool], run: Run, otherwise: str) -> None:
    deadline = time.monotonic() + 60
    while not look():
        if not run.is_running or time.monotonic() > deadline:
            raise MissedError(otherwise)
        time.sleep(0.02)


# --- storage -------------------------------------------------------------------------------------------------------


class SmallDisk:
    """A file system of a few bytes at a folder, as root can mount one."""

    def __init__(self, folder: Path, num_bytes: int) -> None:
        self._folder = folder
        command = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(folder)]
        subprocess.run(command, check=True, capture_output=True)

    def make_room(self) -> None:
        subprocess.run(["mount", "-o", "remount,size=256m", str(self._folder)], check=True)

    def remove(self) -> None:
        subprocess.run(["umount", str(self._folder)], check=True)


def can_mount(folder: Path) -> bool:
    """Whether a small file system can be mounted here."""
    folder.mkdir()
    try:
        SmallDisk(folder, 65536).remove()
    except (subprocess.CalledProcessError, FileNotFoundError):
        return False
    return True


class Store:
    """When the object store fails: what failing_s3.py reads."""

    def __init__(self, plan: Path) -> None:
        self._plan = plan

    def blip(self) -> None:
        self._write({"every": BLIP_EVERY, "faults": FAULTS})

    def go_away(self) -> None:
        self._write({"every": 1, "faults": ["503", "reset", "500"]})

    def be_well(self) -> None:
        self._plan.unlink(missing_ok=True)

    def _write(self, plan: dict[str, object]) -> None:
        beside = self._plan.with_suffix(".new")
        beside.write_text(json.dumps(plan))
        beside.replace(self._plan)
