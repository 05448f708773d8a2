"""Injections, one after the other, on a cluster that is completed or started anew between them."""

from __future__ import annotations

import os
import shutil
import time
import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import psutil

from tests.faults.campaign.faults import AWAY_S, Faults, MissedError, SmallDisk, Store, can_mount
from tests.faults.campaign.jobs import JOBS, Case, Content, Job, Prepared, differences, upload
from tests.faults.campaign.nodes import Cluster
from tests.faults.campaign.plan import MARK, Injection
from tests.faults.campaign.report import Outcome
from tests.faults.campaign.runs import HangError, Run, end_leftovers, what_waits
from tests.faults.campaign.serving import Service, prepare_served
from tests.support import warm
from tests.support.s3_server import s3_server

DEADLINE_S = 400.0  # for one run; where other work keeps the machine busy most of it is waiting for a core
_MAX_STARTS = 4
_MISSES = 3
_ON_S3 = ("s3", "clock")


class Campaign:
    """What all injections share: what is prepared, an object store, the cluster, what undisturbed runs left."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder, self._seed, self._identity = folder, seed, os.environ[MARK]
        self._prepared = folder / "prepared"
        self._prepared.mkdir()
        Prepared(self._prepared)
        self._can_mount = can_mount(folder / "probe")
        self._wanted: dict[str, tuple[Content, dict[str, int]]] = {}
        self._service: Service | None = None
        self._run: Run | None = None
        self._starts = self._numbers = 0
        plan = folder / "s3-faults.json"
        self._store = Store(plan)
        with ExitStack() as stack:
            self._s3 = stack.enter_context(s3_server(folder, plan))
            for name in ("corpus.jsonl", "questions.tsv", "pairs.tsv", "vectors", "index"):
                upload(self._s3, self._prepared / name, f"prepared/{name}")
            warm.address()
            # What lives as long as the campaign: it, the store, the warm interpreter, helpers of Python.
            self._own = {os.getpid(), *(child.pid for child in psutil.Process().children())}
            self._stack = stack.pop_all()
        self._started: Cluster | None = None

    @property
    def _cluster(self) -> Cluster:
        """Started when it is first needed."""
        if self._started is None:
            self._started = Cluster({MARK: self._identity}, str(self._folder / "cluster.log"))
        return self._started

    def _stop_cluster(self) -> None:
        if self._started is not None:
            self._started.stop()
        self._started = None

    def _replace_cluster(self) -> Cluster:
        self._stop_cluster()
        return self._cluster

    def close(self) -> list[str]:
        """End everything; what was left over."""
        self._end_run()
        if self._service is not None:
            self._service.stop()
        self._stop_cluster()
        self._stack.close()
        return end_leftovers(self._identity, self._own)

    def inject(self, injection: Injection) -> Outcome:
        """One injection, and what became of it; whatever goes wrong is what became of it."""
        began = time.monotonic()
        done, faults = "", [""]
        self._starts, self._run = 1, None
        try:
            for attempt in range(_MISSES):
                try:
                    done, faults = self._try(injection, injection.moment / (1 + attempt))
                    break
                except MissedError as error:
                    self._end_run()
                    done, faults = f"missed: {error}", [f"there was nothing to hit, {_MISSES} times"]
        except HangError as error:
            faults = [f"hang: {error}; {self._say_what_waits(injection)} says what waits for what"]
        except Exception as error:
            traceback.print_exc()
            self._end_run()
            faults = [f"{type(error).__name__}: {error}"]
        self._store.be_well()
        try:
            if self._started is not None:
                self._started.ask("complete")
        except (RuntimeError, OSError):
            self._stop_cluster()
        if injection.job != "serving":
            family = self._started.family() if self._started is not None else set()
            left = end_leftovers(self._identity, self._own | family, keep_idle=True)
            faults = [*faults, *(f"a process is left: {name}" for name in left)]
        return Outcome(injection, done, self._starts, time.monotonic() - began, tuple(faults))

    def _say_what_waits(self, injection: Injection) -> Path:
        file = self._folder / f"hang-{injection.kind}-{injection.job}-{self._numbers}.txt"
        run = self._service.run if injection.job == "serving" and self._service else self._run
        what_waits(self._identity, run, lambda: self._cluster.ask("actors"), file)
        if run is not None and run.is_running:
            run.kill()
        return file

    def _end_run(self) -> None:
        if self._run is not None and self._run.is_running:
            self._run.kill()

    def _try(self, injection: Injection, moment: float) -> tuple[str, list[str]]:
        """What was done, and what is wrong with what came of it. Raises HangError, MissedError."""
        if injection.job == "serving":
            if self._service is None:
                prepare_served(self._prepared)
                self._service = Service(self._prepared, self._folder, self._seed)
            return self._service.inject(injection.kind, injection.way, self._cluster, self._replace_cluster)
        if self._service is not None:
            self._service.stop()
        job = JOBS[injection.job]
        wanted, sizes = self._undisturbed(job)
        case = self._case(job, on_s3=injection.kind in _ON_S3)
        with ExitStack() as stack:
            disk = None
            if injection.kind == "disk":
                disk = self._small_disk(job, case, sizes, moment)
                stack.callback(disk.remove)
            if job.changes:
                case.bring(job.changes)
            done, faults = self._disturb(injection, job, case, moment, sizes, disk)
            if not faults:
                faults = differences(job.read(case.fetched()), wanted)
        if not faults:
            shutil.rmtree(case.folder)
        return done, faults

    def _small_disk(self, job: Job, case: Case, sizes: dict[str, int], moment: float) -> SmallDisk:
        """Room for a share of what the job writes."""
        if not self._can_mount:
            raise MissedError("no small file system can be mounted here")
        there = self._prepared / job.changes if job.changes else None
        files = [path.stat().st_size for path in there.rglob("*") if path.is_file()] if there else []
        before = sum(-(-size // 4096) * 4096 + 4096 for size in files)  # a page at least for each name, too
        grown = max(sum(sizes.values()) - sum(files), 0)
        return SmallDisk(case.folder / "out", before + int(grown * moment) // 4096 * 4096 + 16384)

    def _disturb(
        self,
        injection: Injection,
        job: Job,
        case: Case,
        moment: float,
        sizes: dict[str, int],
        disk: SmallDisk | None,
    ) -> tuple[str, list[str]]:
        kind, way = injection.kind, injection.way
        if kind == "s3" and way == 0:
            self._store.blip()
        run = self._start(job, case)
        second = None
        if kind == "disk":
            done = "the disk was full"
        elif kind == "s3" and way == 0:
            done = "every seventh request failed"
        else:
            whole = sizes.get(job.bytes_of, 0)
            if not run.reached(
                lambda: job.done(case, whole) >= moment, f"{moment:.0%} of the job", DEADLINE_S
            ):
                raise MissedError(f"the job ended before {moment:.0%} of it: {run.message()}")
            if kind == "s3":
                done = self._away(run)
            else:
                seed = self._seed + self._numbers
                done = Faults(self._identity, lambda: self._cluster, seed).do(kind, job, run, way)
            if kind == "clock" and not job.changes:  # a second compaction would make one more version
                second = self._beside(job, case)
        faults = self._to_the_end(job, case, run, kind, disk)
        if second is not None:
            second.wait(2 * DEADLINE_S)
            if complaint := second.complaint():
                faults.append(f"the second job: {complaint}: {second.said[-300:]}")
            done += f"; a second job with another clock: {second.message()[:90] or 'done'}"
        return done, faults

    def _to_the_end(self, job: Job, case: Case, run: Run, kind: str, disk: SmallDisk | None) -> list[str]:
        """Start the job again until it is done; what is wrong with how it ended."""
        while run.wait(DEADLINE_S) != 0 or run.is_killed:
            if not run.is_killed and (complaint := run.complaint()):
                return [f"{complaint}: {run.said[-300:]}"]
            if self._starts == _MAX_STARTS:
                return [f"it failed {self._starts} times: {run.message()}"]
            if disk is not None:
                disk.make_room()
            self._store.be_well()
            if kind == "head":
                self._replace_cluster()
            self._starts += 1
            run = self._start(job, case)
        return []

    def _away(self, run: Run) -> str:
        self._store.go_away()
        began = time.monotonic()
        while run.is_running and time.monotonic() - began < AWAY_S:
            time.sleep(0.1)
        self._store.be_well()
        return f"the store was away for {time.monotonic() - began:.0f} s"

    def _beside(self, job: Job, case: Case) -> Run:
        """The same command beside the first, by a clock that is two hours ahead."""
        own = case.log
        run = Run(case, job.command, job.values(case), self._environment(job), clock_s=7200.0)
        case.log = own
        return run

    def _start(self, job: Job, case: Case) -> Run:
        self._run = Run(case, job.command, job.values(case), self._environment(job))
        return self._run

    def _environment(self, job: Job) -> dict[str, str]:
        return self._cluster.environment if job.works_in else {MARK: self._identity}

    def _case(self, job: Job, on_s3: bool = False) -> Case:
        self._numbers += 1
        return Case(self._prepared, self._folder / f"{job.name}-{self._numbers}", self._s3 if on_s3 else None)

    def _undisturbed(self, job: Job) -> tuple[Content, dict[str, int]]:
        """What the job leaves where nothing happens to it, and the sizes of its files."""
        if job.name not in self._wanted:
            case = self._case(job)
            if job.changes:
                case.bring(job.changes)
            run = self._start(job, case)
            if run.wait(DEADLINE_S) != 0:
                raise RuntimeError(f"the undisturbed run failed: {run.said[-3000:]}")
            print(f"undisturbed {job.name}: {time.monotonic() - run.began:.0f} s", flush=True)
            self._wanted[job.name] = job.read(case.fetched()), case.sizes()
        return self._wanted[job.name]


def run_all(injections: Sequence[Injection], seed: int, folder: Path) -> list[Outcome]:
    """Make the injections, with a line for each; a process that is left at the end counts against the last."""
    campaign = Campaign(folder, seed)
    outcomes: list[Outcome] = []
    left: list[str] = []
    try:
        for injection in injections:
            outcomes.append(campaign.inject(injection))
            print(outcomes[-1].line(), flush=True)
    finally:
        left = campaign.close()
    if left:
        last = outcomes.pop()
        faults = (*last.faults, f"left at the end: {left}")
        outcomes.append(Outcome(last.injection, last.done, last.starts, last.seconds, faults))
        print(outcomes[-1].line(), flush=True)
    return outcomes
