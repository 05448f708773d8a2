"""A server under load, on the campaign's cluster: what it answers while replicas, nodes and its head go."""

from __future__ import annotations

import http.client
import json
import os
import random
import signal
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from raytower.models.encoder import Encoder
from raytower.models.forward import ForwardEngine
from tests.faults.campaign.faults import STALLS_S, MissedError, SmallDisk
from tests.faults.campaign.jobs import Case
from tests.faults.campaign.nodes import Cluster
from tests.faults.campaign.runs import HangError, Run
from tests.support.asking import TwoClients
from tests.support.processes import free_port
from tests.support.served_index import TEXTS, write_version
from tests.support.tiny_models import build_tiny_reranker

QUERIES = ["moon 3", "大地 1"]
VERSION = "000001"
TIMEOUT_MS = 20_000
LAYOUTS = ("together", "split", "sharded")
# Whose replica is killed in each layout.
_HIT = {"together": "search", "split": "reranker", "sharded": "shards-0"}
_REPLICA = "SERVE_REPLICA::raytower#"
# Answers that say that the same request may be asked again.
_COME_AGAIN = {429, 503}
# No answer at all, which a client meets while the machine that listens is gone.
NOTHING = 0
_START_S = 400.0
_RECOVERY_S = 300.0
_RIGHT_IN_A_ROW = 20


def prepare_served(folder: Path) -> None:
    write_version(folder / "served", VERSION, folder / "encoder")
    build_tiny_reranker(folder / "reranker")


def expected_ids(folder: Path) -> list[list[str]]:
    """All documents in the order of their inner products with each of QUERIES."""
    vectors = ForwardEngine(Encoder.load(str(folder / "encoder"))).encode([*TEXTS, *QUERIES])
    orders = [(-(vectors[: len(TEXTS)] @ query)).argsort(kind="stable") for query in vectors[len(TEXTS) :]]
    return [[f"{VERSION}/{row}" for row in order] for order in orders]


class Load(TwoClients):
    """Two clients that ask without a pause until the block ends, and count what they are answered."""

    def __init__(self, url: str, expected: list[list[str]]) -> None:
        super().__init__()
        self._url, self._expected = url, expected
        self.statuses: Counter[int] = Counter()
        self.wrong: list[str] = []
        self.partial = 0
        self.right_in_a_row = 0
        self._lock = threading.Lock()

    def _ask(self) -> None:
        body = json.dumps({"queries": QUERIES, "k": len(TEXTS), "rerank": False, "timeout_ms": TIMEOUT_MS})
        request = urllib.request.Request(
            f"{self._url}/v1/search", body.encode(), {"Content-Type": "application/json"}
        )
        while not self._stop.is_set():
            try:
                with urllib.request.urlopen(request, timeout=60) as reply:
                    status, answer = reply.status, json.load(reply)
            except urllib.error.HTTPError as error:
                status, answer = error.code, None
            except (OSError, ValueError, http.client.HTTPException):
                status, answer = NOTHING, None
            with self._lock:
                self._count(status, answer)
            self._stop.wait(0.02 if status == 200 else 0.3)

    def _count(self, status: int, answer: dict[str, Any] | None) -> None:
        self.statuses[status] += 1
        if answer is None:
            self.right_in_a_row = 0
        elif answer["partial"]:  # it says that documents of a shard may be missing
            self.partial += 1
            self.right_in_a_row = 0
        elif [[hit["id"] for hit in hits] for hits in answer["results"]] == self._expected:
            self.right_in_a_row += 1
        else:
            self.wrong.append(json.dumps(answer)[:300])
            self.right_in_a_row = 0

    def reset(self) -> None:
        with self._lock:
            self.right_in_a_row = 0


class Service:
    """A server that is started when it is first needed, and kept from one injection to the next."""

    def __init__(self, prepared: Path, folder: Path, seed: int) -> None:
        self._prepared, self._folder = prepared, folder
        self._random = random.Random(seed)
        self._expected = expected_ids(prepared)
        self.run: Run | None = None
        self._layout, self._starts = "", 0
        # One for all starts: Serve outlives a command that was killed, and listens where it did.
        self._url = f"http://127.0.0.1:{free_port()}"

    def inject(
        self, kind: str, way: int, cluster: Cluster, new_cluster: Callable[[], Cluster]
    ) -> tuple[str, list[str]]:
        """What was done and how it was answered, and what is wrong with that.

        Raises:
            HangError: the server did not start, or did not recover. MissedError: there was nothing to hit.
        """
        layout = LAYOUTS[way] if kind == "replica" else "together"
        log = self._folder / "access"
        disk = None
        if kind == "disk":
            self.stop()
            log.mkdir(exist_ok=True)
            disk = SmallDisk(log, 16384)
        try:
            if not (self.run and self.run.is_running and self._layout == layout):
                self._start(layout, cluster, log / "log.jsonl" if disk else None)
            with Load(self._url, self._expected) as load:
                self._await(lambda: load.right_in_a_row >= _RIGHT_IN_A_ROW, "right answers before the fault")
                before = self._replicas(cluster)
                done = self._hit(kind, layout, way, cluster, new_cluster)
                load.reset()
                if kind != "head":
                    self._await(
                        lambda: self._is_replaced(cluster, before), "replicas, as many as before the fault"
                    )
                self._await(lambda: load.right_in_a_row >= _RIGHT_IN_A_ROW, "right answers after the fault")
        finally:
            if disk is not None:
                self.stop()
                disk.remove()
        allowed = {200, *_COME_AGAIN} | ({NOTHING} if kind == "head" else set())
        faults = [f"a wrong answer: {text}" for text in load.wrong[:1]]
        if others := {status: n for status, n in load.statuses.items() if status not in allowed}:
            faults.append(f"answers with other codes: {others}")
        shown = ", ".join(
            f"{count} × {status or 'nothing'}" for status, count in sorted(load.statuses.items())
        )
        return f"{done}; answers: {shown}{f', {load.partial} partial' if load.partial else ''}", faults

    def stop(self) -> None:
        """End the server in order."""
        if self.run is not None and self.run.is_running:
            self.run.process.send_signal(signal.SIGTERM)
            self.run.wait(time.monotonic() - self.run.began + 60)
        self.run = None

    def _start(self, layout: str, cluster: Cluster, log: Path | None = None, replace: bool = False) -> None:
        if not replace:
            self.stop()
        self._starts += 1
        case = Case(self._prepared, self._folder / f"serving-{self._starts}")
        values = {
            "index": str(self._prepared / "served"),
            "port": int(self._url.rpartition(":")[2]),
            "layout": layout,
            "timeout_ms": TIMEOUT_MS,
            "num_cpus": 0.2,
            "drain_s": 0.2,
            "start_timeout_s": _START_S - 20,
            "replace": replace,
            "replicas": 2,
            **(
                {"reranker": str(self._prepared / "reranker"), "rerank_num_cpus": 0.2}
                if layout == "split"
                else {}
            ),
            **({"shard_num_cpus": 0.2} if layout == "sharded" else {}),
            **({"access_log": {"path": str(log)}} if log else {}),
        }
        run = Run(case, ["serve"], values, cluster.environment)
        if not run.reached(lambda: "serving index version" in run.said, "the server's start", _START_S):
            raise HangError(f"the server did not start: {run.said[-2000:]}")
        self.run, self._layout = run, layout

    def _hit(
        self, kind: str, layout: str, way: int, cluster: Cluster, new_cluster: Callable[[], Cluster]
    ) -> str:
        assert self.run is not None
        if kind == "head":
            cluster.ask("lose_head")
            self.run.wait(time.monotonic() - self.run.began + 120)
            complaint = self.run.complaint()
            said = self.run.message()
            self._start(layout, new_cluster(), replace=True)
            return f"head lost; the command ended ({complaint or said[:60]}); started again on a new cluster"
        if kind == "driver":
            self.run.kill()
            self._start(layout, cluster, replace=True)
            return "SIGKILL to the command; another took its place (replace: true)"
        if kind == "node":
            held = Counter(actor["node"] for actor in self._actors(cluster, "search"))
            nodes = [node for node in cluster.ask("nodes") if held[node]]
            if not nodes:
                raise MissedError("no replica lies on a node")
            cluster.ask("lose", nodes[0])
            return f"a node with {held[nodes[0]]} of {sum(held.values())} replicas lost"
        if kind == "actor":
            (controller,) = [a for a in cluster.ask("actors") if a["name"] == "SERVE_CONTROLLER_ACTOR"]
            cluster.ask("kill_actor", controller["id"])
            return "Serve's controller killed"
        if kind == "disk":
            return "the access log's disk is full from the start"
        name = "conductor" if kind == "worker" else _HIT[layout]
        found = self._actors(cluster, name)
        if not found:
            raise MissedError(f"no replica of {name} lives")
        pid = self._random.choice(found)["pid"]
        if kind == "stall":
            os.kill(pid, signal.SIGSTOP)
            try:
                time.sleep(STALLS_S[way])
            finally:
                os.kill(pid, signal.SIGCONT)
            return f"a replica of {name} stood still for {STALLS_S[way]:.0f} s"
        os.kill(pid, signal.SIGKILL)
        return f"SIGKILL to a replica of {name} (layout {layout})"

    def _actors(self, cluster: Cluster, deployment: str) -> list[dict[str, Any]]:
        return [a for a in cluster.ask("actors") if a["name"].startswith(f"{_REPLICA}{deployment}#")]

    def _replicas(self, cluster: Cluster) -> Counter[str]:
        names = [a["name"] for a in cluster.ask("actors") if a["name"].startswith(_REPLICA)]
        return Counter(name.split("#")[1] for name in names)

    def _is_replaced(self, cluster: Cluster, before: Counter[str]) -> bool:
        time.sleep(0.3)  # what was killed counts as alive for a moment
        return self._replicas(cluster) == before

    def _await(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + _RECOVERY_S
        while not condition():
            if time.monotonic() > deadline:
                raise HangError(f"{what} did not come within {_RECOVERY_S:.0f} s")
            time.sleep(0.05)
