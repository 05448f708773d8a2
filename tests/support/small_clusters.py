"""Clusters of a few CPUs on this machine, and jobs on them.

Run by `python -m` in a process of its own: a Ray that runs in this process would be joined in place of the cluster.
Reads a request from a file and writes what it has found to another.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

from raytower.commands import COMMANDS, find_reference
from raytower.config import make_config
from raytower.errors import InputError

MARKET = "ray.io/market-type"
LICENSED = {"license": 0.5}
LOOK_S = 0.2


def run(command: str, values: dict[str, Any]) -> dict[str, Any]:
    """A command in this process; its figures."""
    found = COMMANDS[command]
    figures: dict[str, Any] = find_reference(found.run)(make_config(find_reference(found.config), values))
    return figures


def labelled(jobs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Each job with workers that ask by a label for one of two nodes, then for what none has; one by a resource too.

    Returns the nodes of which something was held meanwhile, and what is said of the last.
    """
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 3, "include_dashboard": False})
    cluster.add_node(num_cpus=2, labels={MARKET: "spot"}, resources={"license": 1})
    os.environ["RAY_ADDRESS"] = cluster.address
    found: dict[str, Any] = {}
    for command, values in jobs.items():
        ways = {
            "label": {"label_selector": {MARKET: "spot"}},
            "none": {"label_selector": {MARKET: "reserved"}},
        }
        if command == "index build":
            ways["resource"] = {"resources": LICENSED}
        for name, asked in ways.items():
            workers = {**values["workers"], **asked}
            output = f"{values['output']}-{name}{values.get('suffix', '')}"
            config = {key: value for key, value in values.items() if key != "suffix"}
            with nodes_at_work() as at_work:
                try:
                    run(command, {**config, "output": output, "workers": workers})
                    said = ""
                except InputError as error:
                    said = str(error)
            found[f"{command} by {name}"] = {
                "nodes": sorted(at_work),
                "said": said,
                "made": Path(output).exists(),
            }
    ray.shutdown()
    cluster.shutdown()
    return found


@contextmanager
def nodes_at_work() -> Iterator[set[str]]:
    """The markets of the nodes of which CPUs were held while the block ran; "" is that of the head."""
    seen: set[str] = set()
    stop = threading.Event()

    def look() -> None:
        while not stop.wait(LOOK_S):
            if not ray.is_initialized():
                continue
            free = ray._private.state.available_resources_per_node()
            for node in ray.nodes():
                has = node["Resources"].get("CPU", 0)
                if node["Alive"] and free.get(node["NodeID"], {}).get("CPU", 0) < has:
                    seen.add(node["Labels"].get(MARKET, ""))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join()


def two_cpus(jobs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Jobs whose workers hold both CPUs of a cluster, one after the other; then one encode, then three at once.

    Returns the figures of each, and the seconds of the processes of the encodes, from their start to their end.
    """
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    os.environ["RAY_ADDRESS"] = cluster.address
    found: dict[str, Any] = {"figures": {command: run(command, values) for command, values in jobs.items()}}
    encode = jobs["encode"]
    try:
        run("encode", {**encode, "output": f"{encode['output']}-large", "workers": {"num": 1, "num_cpus": 3}})
    except InputError as error:
        found["said"] = str(error)
    found["alone"] = timed(1, encode)
    found["together"] = timed(3, encode)
    ray.shutdown()
    cluster.shutdown()
    return found


def timed(num: int, encode: dict[str, Any]) -> list[float]:
    """Seconds of so many encodes that are started at once, each by a user of its own."""
    started = time.monotonic()
    processes = []
    for number in range(num):
        values = json.dumps({**encode, "output": f"{encode['output']}-{num}-{number}"})
        config = Path(f"{encode['output']}-{num}-{number}.json")
        config.write_text(values)
        command = [sys.executable, "-m", "raytower.cli", "encode", "--config", str(config)]
        processes.append(subprocess.Popen(command, stdout=sys.stderr, stderr=sys.stderr))
    ends: dict[int, float] = {}
    while len(ends) < num:
        for number, process in enumerate(processes):
            if number not in ends and process.poll() is not None:
                assert process.returncode == 0, f"encode {number} of {num} has failed"
                ends[number] = time.monotonic() - started
        time.sleep(LOOK_S)
    return [ends[number] for number in range(num)]


def main() -> None:
    functions: dict[str, Callable[..., Any]] = {"labelled": labelled, "two_cpus": two_cpus}
    name, asked, answer = sys.argv[1:]
    # Not to stdout: Ray shows its own messages there.
    Path(answer).write_text(json.dumps(functions[name](json.loads(Path(asked).read_text())), default=str))


if __name__ == "__main__":
    main()
