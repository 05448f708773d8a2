"""A cluster on this machine whose nodes come with demand and go when they are idle, and what is seen of them.

Ray's autoscaler, of version 2 as with `ray up`, starts and ends the nodes by Ray's own provider for tests: a node is a
raylet of this machine with the CPUs and GPUs that its kind says, GPUs that no library finds among them. The head has no
CPU, so that all work waits for nodes. Everything listens on loopback and asks for a token.

Nodes are watched from outside, by the table of processes: a node is there while its raylet runs, and works while one of
the raylet's children has the title of a task or an actor. Ray is not asked.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from tests.support.processes import clean_environment, free_port, wait_for

# Names that Ray's provider gives the head, and by which version 2 knows it again.
_HEAD_ID = "f" * 51 + "00000"
_HEAD_KIND = "ray.head.default"
_PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
# Little more than the least that Ray takes, of the memory that all nodes of this machine share.
_STORE_BYTES = 80 * 2**20
_LOOK_S = 0.25
_TITLE = re.compile(r"ray::([\w.]+)(\(.*\))?")
# Processes of every node, which run no work.
_OWN = ("IDLE", "DashboardAgent", "RuntimeEnvAgent")


@dataclass(frozen=True)
class Kind:
    """A node type: what each node has, its labels, and how many there are at least and at most."""

    cpus: int
    gpus: int = 0
    labels: Mapping[str, str] = field(default_factory=dict)
    least: int = 0
    most: int = 2


@dataclass(frozen=True)
class Seen:
    """A node at one moment: its kind, and the titles of the tasks and actors that have a process there."""

    kind: str
    work: tuple[str, ...]


@dataclass(frozen=True)
class Sight:
    """What changed at a second since the watch began: the nodes then, by their ids, and the jobs that run."""

    second: float
    nodes: Mapping[str, Seen]
    jobs: tuple[str, ...]


@dataclass(frozen=True)
class Stay:
    """A node from its coming to its going, in seconds since the watch began; None is not yet, or never."""

    name: str
    kind: str
    came: float
    began: float | None
    """When it first had work, and below when it last had some."""
    ended: float | None
    went: float | None
    jobs: tuple[str, ...]
    """Those during which it had work, in the order of their beginning."""


def stays(sights: Sequence[Sight]) -> list[Stay]:
    """The nodes by their coming, each named by its kind and a number: `cpu 1`, `cpu 2`, `gpu 1`."""
    found: dict[str, Stay] = {}
    counts: Counter[str] = Counter()
    until = [sight.second for sight in sights[1:]] + [sights[-1].second] if sights else []
    for sight, end in zip(sights, until, strict=True):
        for node, seen in sight.nodes.items():
            if node not in found:
                counts[seen.kind] += 1
                found[node] = Stay(
                    f"{seen.kind} {counts[seen.kind]}", seen.kind, sight.second, None, None, None, ()
                )
            if seen.work:
                stay = found[node]
                jobs = tuple(dict.fromkeys((*stay.jobs, *sight.jobs)))
                began = sight.second if stay.began is None else stay.began
                found[node] = replace(stay, began=began, ended=end, jobs=jobs)
        for node, stay in found.items():
            if node not in sight.nodes and stay.went is None:
                found[node] = replace(stay, went=sight.second)
    return list(found.values())


def most_at_once(sights: Sequence[Sight], job: str, title: str) -> int:
    """On how many nodes at one moment, during a job, a process had a title that holds `title`."""
    working = (
        sum(any(title in work for work in seen.work) for seen in sight.nodes.values())
        for sight in sights
        if job in sight.jobs
    )
    return max(working, default=0)


def table(sights: Sequence[Sight], kinds: Sequence[str]) -> list[str]:
    """A line for each sight: second, nodes alive by kind, jobs, and what runs on which node."""
    names = {node: stay.name for node, stay in zip(_by_coming(sights), stays(sights), strict=True)}
    lines = [f"{'second':>7}  {'  '.join(f'{kind:>4}' for kind in kinds)}  {'job':<16} what runs"]
    for sight in sights:
        alive = Counter(seen.kind for seen in sight.nodes.values())
        runs = [f"{names[node]}: {', '.join(seen.work)}" for node, seen in sight.nodes.items() if seen.work]
        counted = "  ".join(f"{alive[kind]:>4}" for kind in kinds)
        lines.append(
            f"{sight.second:>7.1f}  {counted}  {', '.join(sight.jobs) or '-':<16} {'; '.join(runs) or '-'}"
        )
    return lines


def comings_and_goings(sights: Sequence[Sight]) -> list[str]:
    """A line for each node: when it came, had work, and went, and by which jobs it was used."""
    lines = [f"{'node':<8} {'came':>7} {'worked from':>12} {'to':>7} {'went':>7}  {'idle':>5}  for"]
    for stay in stays(sights):
        idle = stay.went - (stay.ended or stay.came) if stay.went is not None else None
        cells = [
            f"{stay.name:<8}",
            *(
                f"{'-' if value is None else f'{value:.1f}':>{width}}"
                for value, width in ((stay.came, 7), (stay.began, 12), (stay.ended, 7), (stay.went, 7))
            ),
            f"{'-' if idle is None else f'{idle:.1f}':>6}",
            f" {', '.join(stay.jobs) or '-'}",
        ]
        lines.append(" ".join(cells))
    return lines


def _by_coming(sights: Sequence[Sight]) -> list[str]:
    return list(dict.fromkeys(node for sight in sights for node in sight.nodes))


def look(session: int) -> dict[str, Seen]:
    """The nodes whose raylets belong to a session of processes, without the head, by their ids."""
    found = {}
    for process in _of_session(session):
        with suppress(psutil.Error):
            if process.name() != "raylet" or process.status() == psutil.STATUS_ZOMBIE:
                continue
            kind = process.environ().get("RAY_NODE_TYPE_NAME")
            if kind:
                titles = {_title(child) for child in process.children()}
                node = process.environ()["RAY_OVERRIDE_NODE_ID_FOR_TESTING"]
                found[node] = Seen(kind, tuple(sorted(titles - {""})))
    return dict(sorted(found.items()))


def _of_session(session: int) -> Iterator[psutil.Process]:
    for pid in psutil.pids():
        with suppress(OSError, psutil.Error):
            if os.getsid(pid) == session:
                yield psutil.Process(pid)


def _title(process: psutil.Process) -> str:
    """What a worker of Ray runs, without arguments and the method of an actor; "" for any other process."""
    try:
        words = process.cmdline()
    except psutil.Error:
        return ""
    match = _TITLE.match(words[0]) if words else None
    if match is None or match[1].startswith(_OWN):
        return ""
    return f"{match[1].rpartition('.')[2] if match[2] is None else match[1]}{match[2] or ''}"


class Watch:
    """Looks at a cluster's nodes four times a second, and keeps what has changed."""

    def __init__(self, session: int) -> None:
        self.sights: list[Sight] = []
        self._session = session
        self._began = time.monotonic()
        self._jobs: list[str] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    @contextmanager
    def during(self, job: str) -> Iterator[None]:
        """Write down that a job runs while the block does."""
        self._jobs.append(job)
        try:
            yield
        finally:
            self._jobs.remove(job)

    @property
    def second(self) -> float:
        return round(time.monotonic() - self._began, 2)

    @property
    def nodes(self) -> Mapping[str, Seen]:
        """Those that were there at the last look."""
        return self.sights[-1].nodes if self.sights else {}

    def end(self) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(_LOOK_S):
            sight = Sight(self.second, look(self._session), tuple(self._jobs))
            if not self.sights or (sight.nodes, sight.jobs) != (self.sights[-1].nodes, self.sights[-1].jobs):
                self.sights.append(sight)


def autoscaling_config(
    kinds: Mapping[str, Kind], gcs_address: str, *, idle_s: float, most: int
) -> dict[str, Any]:
    """What `ray start --autoscaling-config` reads; all keys that Ray completes for the clouds are given.

    The provider is named as an external one: under its own name Ray looks for defaults that its wheel does not have.
    """
    types = {
        name: {
            "resources": {
                "CPU": kind.cpus,
                **({"GPU": kind.gpus} if kind.gpus else {}),
                "object_store_memory": _STORE_BYTES,
            },
            "labels": dict(kind.labels),
            "min_workers": kind.least,
            "max_workers": kind.most,
            "node_config": {},
        }
        for name, kind in kinds.items()
    }
    head = {"resources": {"CPU": 0}, "max_workers": 0, "node_config": {}}
    commands = (
        *("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands"),
        *("head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files"),
    )
    return {
        "cluster_name": "here",
        "max_workers": most,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": idle_s / 60,
        "provider": {
            "type": "external",
            "module": _PROVIDER,
            "gcs_address": gcs_address,
            "head_node_id": _HEAD_ID,
            "launch_multiple": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "available_node_types": {_HEAD_KIND: head, **types},
        "head_node_type": _HEAD_KIND,
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "rsync_exclude": [],
        "rsync_filter": [],
        **{name: [] for name in commands},
    }


class AutoscaledCluster:
    """The head of such a cluster, its autoscaler and a watch; all end with the block."""

    def __init__(
        self, kinds: Mapping[str, Kind], *, idle_s: float = 6, most: int = 3, dashboard: bool = False
    ) -> None:
        self.kinds = kinds
        # Short, because the names of Ray's sockets lie below it and may have 107 bytes at most.
        self.folder = Path(tempfile.mkdtemp(prefix="rt", dir="/tmp"))
        self._port, self._dashboard_port = free_port(), free_port()
        self.address = f"127.0.0.1:{self._port}"
        self.dashboard = f"http://127.0.0.1:{self._dashboard_port}" if dashboard else None
        # What its processes and the drivers of its jobs have in common.
        self._common = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # has Ray take loopback for the address of every node
            "RAY_USAGE_STATS_ENABLED": "0",
            "GLOO_SOCKET_IFNAME": "lo",
            "TOKENIZERS_PARALLELISM": "false",
        }
        config = autoscaling_config(kinds, self.address, idle_s=idle_s, most=most)
        (self.folder / "autoscaling.yaml").write_text(json.dumps(config))
        self.log = self.folder / "head.log"

    @property
    def environment(self) -> dict[str, str]:
        """That of a driver."""
        return clean_environment(**self._common, RAY_ADDRESS=self.address)

    def __enter__(self) -> AutoscaledCluster:
        environment = clean_environment(
            **self._common,
            RAY_FAKE_CLUSTER="1",
            RAY_enable_autoscaler_v2="1",
            RAY_CLOUD_INSTANCE_ID=_HEAD_ID,
            RAY_OVERRIDE_NODE_ID_FOR_TESTING=_HEAD_ID,
            AUTOSCALER_UPDATE_INTERVAL_S="1",
            AUTOSCALER_METRIC_PORT=str(free_port()),
            # Workers that nothing has asked for yet take their time to start from those that work.
            RAY_prestart_worker_first_driver="0",
            RAY_enable_worker_prestart="0",
            RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.5",
        )
        # `raytower` of a submitted job is that of this Python.
        environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
        command = ["ray", "start", "--head", "--block", "--num-cpus=0", "--node-ip-address=127.0.0.1"]
        command += [f"--port={self._port}", f"--autoscaling-config={self.folder}/autoscaling.yaml"]
        command += [f"--temp-dir={self.folder}/s", f"--object-store-memory={_STORE_BYTES}"]
        command += [f"--include-dashboard={'true' if self.dashboard else 'false'}"]
        command += [f"--dashboard-port={self._dashboard_port}", f"--ray-client-server-port={free_port()}"]
        command += [f"--dashboard-agent-listen-port={free_port()}"]
        with self.log.open("wb") as output:
            self._head = subprocess.Popen(
                command, env=environment, stdout=output, stderr=output, start_new_session=True
            )
        try:
            wait_for(self._is_up, "the start of the head")
        except BaseException:
            self._stop()
            raise
        self.watch = Watch(self._head.pid)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.watch.end()
        self._stop()

    def _start(self, *arguments: str, log: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "raytower.cli", *arguments]
        with log.open("wb") as output:
            return subprocess.Popen(
                command, env=self.environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )

    def run(self, job: str, *arguments: str, limit_s: float = 400) -> str:
        """`raytower ARGUMENTS…` to its end, as a driver beside the head that the watch calls `job`; what it said.

        Raises:
            RuntimeError: it failed, or did not end within `limit_s`; with what it said.
        """
        log = self.folder / f"{job.replace(' ', '-')}.log"
        with self.watch.during(job):
            driver = self._start(*arguments, log=log)
            try:
                code: int | None = driver.wait(timeout=limit_s)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                if driver.poll() is None:
                    driver.kill()
                    driver.wait()
        said = log.read_text(errors="replace")
        if code != 0:
            how = f"did not end within {limit_s:g} s" if code is None else f"ended with code {code}"
            raise RuntimeError(f"{job} {how}:\n{said}")
        return said

    def taken_as_idle(self) -> set[str]:
        """Ids of the nodes that their raylets let go because they had nothing to do; by the autoscaler's log."""
        said = (self.folder / "s" / "session_latest" / "logs" / "monitor.log").read_text(errors="replace")
        return set(re.findall(r"Drained ray on (\w+)\(success=True", said))

    def wait_until_nodes(self, count: int, seconds: float = 120) -> None:
        """Until so many nodes are there beside the head; fails after `seconds`."""
        wait_for(lambda: len(self.watch.nodes) == count, f"a cluster of {count} nodes", seconds)

    def _is_up(self) -> bool:
        said = self.log.read_text(errors="replace")
        if self._head.poll() is not None:
            raise RuntimeError(f"the head ended with code {self._head.returncode}:\n{said}")
        return "Ray runtime started" in said

    def _stop(self) -> None:
        # A head drains for half a minute before it ends by itself; nothing here needs that.
        for _ in range(3):  # what was being started meanwhile
            family = list(_of_session(self._head.pid))
            for process in family:
                with suppress(psutil.Error):
                    process.kill()
            psutil.wait_procs(family, timeout=10)
        self._head.wait()
        shutil.rmtree(self.folder, ignore_errors=True)
