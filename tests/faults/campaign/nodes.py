"""The machines of the campaign: a Ray cluster in a process of its own, which loses nodes and its head when told.

The head has no CPU and the two nodes two each, so that jobs run on nodes and their drivers beside the head. Whoever
asks a cluster whose head is gone may be ended by Ray, so the campaign asks this process instead (`Cluster`).
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import psutil

from tests.support import warm
from tests.support.processes import clean_environment

NUM_NODES = 2
CPUS_PER_NODE = 2
_TRIES = 4
# A node that does not answer counts as lost after about 24 seconds, and who has lost the head gives up after 20.
_PATIENCE = {
    "RAY_health_check_initial_delay_ms": "5000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "8",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "20",
}
LOST_AFTER_S = 24.0
ENVIRONMENT = {
    **_PATIENCE,
    "RAY_AUTH_MODE": "disabled",
    # Workers that nothing has asked for yet take their time to start from those that work.
    "RAY_prestart_worker_first_driver": "0",
    "RAY_enable_worker_prestart": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "GLOO_SOCKET_IFNAME": "lo",
    "TOKENIZERS_PARALLELISM": "false",
}


class Cluster:
    """The campaign's side. Every method but `stop` raises RuntimeError with the text of what went wrong there."""

    def __init__(self, environment: Mapping[str, str], log: str) -> None:
        self._folder = tempfile.mkdtemp(prefix="rt", dir="/tmp")  # short, because sockets lie in it
        self.environment = {**environment, **ENVIRONMENT, "RAY_TMPDIR": self._folder}
        here, there = socket.socketpair()
        with open(log, "ab") as stream:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.faults.campaign.nodes", str(there.fileno())],
                env=clean_environment(**self.environment, **{warm.ADDRESS: warm.address()}),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                pass_fds=[there.fileno()],
                start_new_session=True,
            )
        there.close()
        here.settimeout(300)
        self._stream = here.makefile("rw", encoding="utf-8")
        self.environment["RAY_ADDRESS"] = self.ask("start")

    def ask(self, what: str, *arguments: Any) -> Any:
        self._stream.write(json.dumps([what, *arguments]) + "\n")
        self._stream.flush()
        line = self._stream.readline()
        if not line:
            raise RuntimeError(f"the process of the cluster has ended; {what} was asked of it")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"{what}{tuple(arguments)}: {answer['error']}")
        return answer["result"]

    def family(self) -> set[int]:
        """Ids of the processes that belong to it until it stops, workers aside."""
        try:
            own = psutil.Process(self._process.pid)
            return {own.pid, *(child.pid for child in own.children(recursive=True))}
        except psutil.NoSuchProcess:
            return set()

    def stop(self) -> None:
        """End it and all that it has started."""
        family = [psutil.Process(pid) for pid in self.family() if psutil.pid_exists(pid)]
        with suppress(RuntimeError, OSError):  # what is left is ended below
            self.ask("stop")
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        _, alive = psutil.wait_procs(family, timeout=5)
        for process in alive:
            process.kill()
        psutil.wait_procs(alive, timeout=10)
        shutil.rmtree(self._folder, ignore_errors=True)


class _Nodes:
    """The side of the process that holds the cluster; each public method is something to ask."""

    def start(self) -> str:
        import pytest
        from ray._private.parameter import RayParams
        from ray.cluster_utils import Cluster as RayCluster

        # Workers are forked from the campaign's warm interpreter, as `warm.workers_are_forked` has it.
        complete = RayParams.update_if_absent
        instead = {"setup_worker_path": warm.FORKING_WORKER}

        def update_if_absent(params: RayParams, **given: Any) -> None:
            complete(params, **{**given, **(instead if "setup_worker_path" in given else {})})

        pytest.MonkeyPatch().setattr(RayParams, "update_if_absent", update_if_absent)
        self._cluster = RayCluster()
        # With a dashboard, as clusters have it: Ray Train asks it whether the controller of a killed driver has ended.
        self._add(num_cpus=0, include_dashboard=True)
        for _ in range(NUM_NODES):
            self._add(num_cpus=CPUS_PER_NODE)
        return str(self._cluster.address)

    def _add(self, **settings: Any) -> None:
        # Ray gives a node half a minute to start, which does not do where other work keeps the machine busy.
        for _ in range(_TRIES - 1):
            with suppress(Exception):
                self._cluster.add_node(**settings)
                return
        self._cluster.add_node(**settings)

    def complete(self) -> int:
        """Take away nodes that are dead to the cluster, and have as many as before; how many were missing."""
        living = {node["NodeID"] for node in self._cluster.global_state.node_table() if node["Alive"]}
        for node in list(self._cluster.worker_nodes):
            if node.node_id not in living or _raylet(node).poll() is not None:
                self._cluster.remove_node(node, allow_graceful=False)
        missing = NUM_NODES - len(self._cluster.worker_nodes)
        for _ in range(missing):
            self._add(num_cpus=CPUS_PER_NODE)
        return missing

    def busy(self) -> list[str]:
        """Nodes, but the head, that have CPUs in use; the busiest first."""
        state = self._cluster.global_state
        free = state.available_resources_per_node()
        used = {
            node.node_id: CPUS_PER_NODE - free.get(node.node_id, {}).get("CPU", 0.0)
            for node in self._cluster.worker_nodes
        }
        return sorted((name for name, cpus in used.items() if cpus > 0), key=lambda name: -used[name])

    def actors(self) -> list[dict[str, Any]]:
        """Living actors: class, name, pid, node, id."""
        found = self._cluster.global_state.actor_table(None)
        return [
            {
                "class": actor["ActorClassName"],
                "name": actor["Name"],
                "pid": actor["Pid"],
                "node": actor["Address"]["NodeID"],
                "id": name,
            }
            for name, actor in found.items()
            if actor["State"] == "ALIVE"
        ]

    def kill_actor(self, name: str) -> None:
        from ray._private.grpc_utils import init_grpc_channel
        from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

        stub = gcs_service_pb2_grpc.ActorInfoGcsServiceStub(init_grpc_channel(self._cluster.address))
        request = gcs_service_pb2.KillActorViaGcsRequest(
            actor_id=bytes.fromhex(name), force_kill=True, no_restart=False
        )
        stub.KillActorViaGcs(request, timeout=10)

    def blocks(self) -> dict[str, int]:
        """Objects in the store of each node but the head."""
        from ray._private.internal_api import node_stats

        own = {node.node_id for node in self._cluster.worker_nodes}
        found = {}
        for entry in self._cluster.global_state.node_table():
            if entry["NodeID"] in own and entry["Alive"]:
                stats = node_stats(entry["NodeManagerAddress"], entry["NodeManagerPort"], False)
                found[entry["NodeID"]] = int(stats.store_stats.num_local_objects)
        return found

    def nodes(self) -> dict[str, int]:
        """The raylet's process of each node but the head."""
        return {node.node_id: _raylet(node).pid for node in self._cluster.worker_nodes}

    def lose(self, name: str) -> None:
        (node,) = [node for node in self._cluster.worker_nodes if node.node_id == name]
        self._cluster.remove_node(node, allow_graceful=False)

    def lose_head(self) -> None:
        """The head's processes alone; nothing can be asked afterwards but `stop`."""
        self._cluster.head_node.kill_all_processes(check_alive=False, allow_graceful=False, wait=True)

    def stop(self) -> None:
        for node in self._cluster.list_all_nodes():
            node.kill_all_processes(check_alive=False, allow_graceful=False, wait=True)


def _raylet(node: Any) -> subprocess.Popen[bytes]:
    (info,) = node.all_processes["raylet"]
    process: subprocess.Popen[bytes] = info.process
    return process


def main(descriptor: int) -> None:
    nodes = _Nodes()
    with (
        socket.socket(fileno=descriptor) as connection,
        connection.makefile("rw", encoding="utf-8") as stream,
    ):
        for line in stream:
            what, *arguments = json.loads(line)
            try:
                answer = {"result": getattr(nodes, what)(*arguments)}
            except Exception as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
            stream.write(json.dumps(answer) + "\n")
            stream.flush()
            if what == "stop":
                break
    os._exit(0)  # everything has ended; what runs at exit would look for it


if __name__ == "__main__":
    main(int(sys.argv[1]))
