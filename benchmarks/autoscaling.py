"""Nodes that come with demand and go when idle, seen on one machine: a head without CPUs, and Ray's autoscaler.

    python benchmarks/autoscaling.py [--folder FOLDER] [--idle-s 6]

A training takes CPU nodes, an encode such with a label, an index build a node with a GPU, and an evaluation has its
driver on a node. Each is the command that a user would run. The nodes are processes of this machine (Ray's provider
`fake_multinode`), the GPUs are numbers: a build that holds one computes on CPUs where FAISS sees none. It prints when
nodes came, which of them had work of which job, and when they went; the last line is all of it as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

HEAD = "ray.head.default"  # the name under which Ray's fake provider knows the head
# Its number too; a node is known to the autoscaler by the number that it was started with.
HEAD_ID = "fffffffffffffffffffffffffffffffffffffffffffffffffff00000"
NODE_TYPES: dict[str, dict[str, Any]] = {
    "cpu": {"resources": {"CPU": 2}, "labels": {"ray.io/market-type": "on-demand"}, "max_workers": 2},
    "spot": {"resources": {"CPU": 1}, "labels": {"ray.io/market-type": "spot"}, "max_workers": 2},
    "gpu": {"resources": {"CPU": 1, "GPU": 1}, "labels": {"ray.io/accelerator-type": "L4"}, "max_workers": 1},
}
KIND = "kind"  # a label of ours; the fake provider gives all nodes the head's `ray.io/node-group`
POLL_S = 0.2
# Until the last node is gone; idle nodes go one after the other.
SETTLE_S = 120.0
TEXTS, PAIRS = 2_000, 256
WORDS = (
    "sun",
    "moon",
    "star",
    "sky",
    "sea",
    "lake",
    "hill",
    "wood",
    "rain",
    "snow",
    "wind",
    "fire",
    "stone",
    "road",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder", type=Path, help="where inputs and outputs are left; a temporary one otherwise"
    )
    parser.add_argument("--idle-s", type=float, default=6.0, help="seconds after which an idle node goes")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        with autoscaling_head(arguments.idle_s) as address:
            write_inputs(folder)
            print(json.dumps(demonstrate(folder, address)))


def demonstrate(folder: Path, address: str) -> dict[str, Any]:
    """Run the jobs on the cluster at `address`, and watch it until only the head is left."""
    import ray

    ray.init(address=address, logging_level="error", log_to_driver=False)
    os.environ["RAY_ADDRESS"] = address
    figures: dict[str, Any] = {}
    with watching() as timeline:
        timeline.say("only the head, without CPUs")
        for name, command, values, on_node in jobs_of(folder):
            timeline.begin(name)
            figures[name] = run_on_node(command, values) if on_node else run(command, values)
            timeline.say(f"{name} has ended")
        timeline.begin("nothing")
        deadline = time.monotonic() + SETTLE_S
        while timeline.nodes and time.monotonic() < deadline:
            time.sleep(POLL_S)
    left = [node["Labels"].get(KIND, "head") for node in ray.nodes() if node["Alive"]]
    ray.shutdown()
    worked = {job: sorted(nodes) for job, nodes in timeline.worked.items()}
    return {
        "folder": str(folder),
        "events": timeline.events,
        "worked": worked,
        "left": left,
        "figures": figures,
    }


def jobs_of(folder: Path) -> Iterator[tuple[str, str, dict[str, Any], bool]]:
    """Name, command, config; and whether the command itself, which has no workers, runs on a node."""
    yield (
        "train",
        "train-retriever",
        {
            "model": str(folder / "start"),
            "train": str(folder / "pairs.tsv"),
            "output": str(folder / "encoder"),
            "batch_size": 16,
            "max_length": 32,
            "dtype": "float32",
            "workers": {
                "num": 2,
                "num_cpus": 1,
                "num_gpus": 0,
                "label_selector": {"ray.io/market-type": "on-demand"},
            },
        },
        False,
    )
    yield (
        "encode",
        "encode",
        {
            "encoder": str(folder / "encoder"),
            "input": str(folder / "corpus.tsv"),
            "output": str(folder / "embeddings"),
            "max_length": 32,
            "rows_per_file": 50,
            "workers": {
                "num": 2,
                "min": 2,
                "num_cpus": 1,
                "num_gpus": 0,
                "label_selector": {"ray.io/market-type": "spot"},
            },
        },
        False,
    )
    yield (
        "index build",
        "index build",
        {
            "embeddings": str(folder / "embeddings"),
            "output": str(folder / "index"),
            "kind": "ivf_flat",
            "target": {"recall": 0.99, "k": 10},
            "workers": {"num": 1, "num_cpus": 1, "num_gpus": 1},
        },
        False,
    )
    yield (
        "evaluate",
        "evaluate",
        {
            "encoder": str(folder / "encoder"),
            "index": str(folder / "index"),
            "queries": {"path": str(folder / "pairs.tsv"), "format": "pairs"},
            "k": [1, 10],
            "output": str(folder / "report"),
        },
        True,
    )


def run(command: str, values: dict[str, Any]) -> dict[str, Any]:
    """A command of raytower in a process of its own; its figures."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as config:
        json.dump(values, config)
        config.flush()
        process = [sys.executable, "-m", "raytower.cli", *command.split(), "--config", config.name]
        done = subprocess.run(process, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command} has failed:\n{done.stdout}{done.stderr}")
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def run_on_node(command: str, values: dict[str, Any]) -> dict[str, Any]:
    """As `run`, on a node that has a CPU: what `ray job submit --entrypoint-num-cpus 1` does."""
    import ray

    task = ray.remote(num_cpus=1)(run)
    figures: dict[str, Any] = ray.get(task.remote(command, values))
    return figures


# --- what is seen --------------------------------------------------------------------------------------------------


@dataclass
class Timeline:
    """What happened, in seconds since the beginning."""

    started: float = field(default_factory=time.monotonic)
    events: list[tuple[float, str]] = field(default_factory=list)
    nodes: dict[str, str] = field(default_factory=dict)
    """Nodes beside the head that are up now: their numbers, and the names that they have here."""
    worked: dict[str, set[str]] = field(default_factory=dict)
    """For each job the nodes of which something was held while it ran."""
    job: str = "nothing"
    named: int = 0

    def say(self, words: str) -> None:
        seconds = round(time.monotonic() - self.started, 1)
        self.events.append((seconds, words))
        print(f"{seconds:7.1f} s  {words}", flush=True)

    def begin(self, job: str) -> None:
        self.job = job
        self.say(f"{job} begins" if job != "nothing" else "no job is left")

    def look(self) -> None:
        """See which nodes there are and which of them are at work."""
        import ray

        alive = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
        for number, node in alive.items():
            kind = node["Labels"].get(KIND)
            if number not in self.nodes and kind in NODE_TYPES:
                self.named += 1
                self.nodes[number] = f"{kind} {self.named}"
                self.say(f"{self.nodes[number]} has come ({self._count()})")
        for number in self.nodes.keys() - alive.keys():
            name = self.nodes.pop(number)
            self.say(f"{name} is gone ({self._count()})")
        for number, free in ray._private.state.available_resources_per_node().items():
            name = self.nodes.get(number, "")
            kind = NODE_TYPES.get(name.partition(" ")[0], {"resources": {}})
            held = [
                f"{amount - free.get(what, 0):g} {what}"
                for what, amount in kind["resources"].items()
                if free.get(what, 0) < amount
            ]
            if held and name not in self.worked.setdefault(self.job, set()):
                self.worked[self.job].add(name)
                self.say(f"{name} works for {self.job} (holds {', '.join(held)})")

    def _count(self) -> str:
        kinds = [name.partition(" ")[0] for name in self.nodes.values()]
        return (
            ", ".join(f"{kinds.count(kind)} {kind}" for kind in NODE_TYPES if kind in kinds)
            or "the head alone"
        )


@contextmanager
def watching() -> Iterator[Timeline]:
    """A timeline that is kept while the block runs."""
    timeline, stop = Timeline(), threading.Event()

    def watch() -> None:
        while not stop.wait(POLL_S):
            timeline.look()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield timeline
    finally:
        stop.set()
        thread.join()


# --- the cluster ---------------------------------------------------------------------------------------------------


def autoscaling_config(address: str, idle_s: float) -> dict[str, Any]:
    """All keys that Ray asks for where it has no defaults."""
    lists = (
        "initialization_commands",
        "setup_commands",
        "cluster_synced_files",
        "rsync_exclude",
        "rsync_filter",
    )
    commands = ("setup_commands", "start_ray_commands")
    types = {
        name: {"node_config": {}, "min_workers": 0, **kind, "labels": {KIND: name, **kind["labels"]}}
        for name, kind in NODE_TYPES.items()
    }
    return {
        "cluster_name": "seen",
        "max_workers": sum(kind["max_workers"] for kind in NODE_TYPES.values()),
        "upscaling_speed": 10.0,
        "idle_timeout_minutes": idle_s / 60,
        "provider": {
            # By its class: under its name, `fake_multinode`, Ray looks for a file of defaults that its wheel lacks.
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": address,
            "head_node_id": HEAD_ID,
            "launch_multiple": True,
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "available_node_types": {
            HEAD: {"resources": {"CPU": 0}, "node_config": {}, "min_workers": 0, "max_workers": 0},
            **types,
        },
        "head_node_type": HEAD,
        "auth": {},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        **{name: [] for name in lists},
        **{f"{side}_{name}": [] for side in ("head", "worker") for name in commands},
    }


@contextmanager
def autoscaling_head(idle_s: float) -> Iterator[str]:
    """A head without CPUs whose autoscaler starts nodes; its address. All ends with the block, with every node."""
    # Nodes listen on every address. Ray reads this when it is imported.
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    import ray

    port = free_port()
    address = f"{ray.util.get_node_ip_address()}:{port}"
    environment = {
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
        "RAY_NODE_TYPE_NAME": HEAD,
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        # Left alone, workers are so nice that on a busy machine they hardly start.
        "RAY_worker_niceness": "0",
    }
    # Short, because the names of Ray's sockets lie below it and may have 107 bytes at most.
    with tempfile.TemporaryDirectory(prefix="rt", ignore_cleanup_errors=True) as folder:
        config = Path(folder) / "nodes.json"
        config.write_text(json.dumps(autoscaling_config(address, idle_s)))
        command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", f"--port={port}"]
        command += ["--num-cpus=0", "--num-gpus=0", "--include-dashboard=false", f"--temp-dir={folder}/s"]
        command += [f"--autoscaling-config={config}", "--min-worker-port=0", "--max-worker-port=0"]
        with open(Path(folder) / "head.log", "w", encoding="utf-8") as log:
            head = psutil.Popen(command, env=os.environ | environment, stdout=log, stderr=log)
        try:
            wait_for_head(head, port, Path(folder))
            yield address
        finally:
            end_all(head)


def wait_for_head(head: psutil.Popen, port: int, folder: Path) -> None:
    deadline = time.monotonic() + 180
    while "Ray runtime started" not in (folder / "head.log").read_text(encoding="utf-8"):
        if head.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"the head did not start:\n{(folder / 'head.log').read_text(encoding='utf-8')}")
        time.sleep(0.2)


def end_all(head: psutil.Popen) -> None:
    """End the head and all that it has started. Nodes are children of its monitor; they go when it says so, or here."""
    processes = [head, *head.children(recursive=True)]
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue  # it ended meanwhile
    psutil.wait_procs(processes, timeout=30)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# --- inputs --------------------------------------------------------------------------------------------------------


def write_inputs(folder: Path) -> None:
    """A model of two small layers with random weights, pairs to train on and to ask, and a corpus that holds them."""
    import torch
    from gpu_encoding import VOCABULARY, make_tokenizer
    from transformers import BertConfig, BertModel

    from raytower.models.encoder import Encoder, EncoderSettings

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    backbone = BertModel(BertConfig(vocab_size=VOCABULARY, **sizes))
    Encoder(backbone, make_tokenizer(), EncoderSettings(max_length=32)).eval().save(folder / "start")
    texts = [
        f"{WORDS[number % 14]} {WORDS[number // 14 % 14]} {WORDS[number // 196 % 14]}"
        for number in range(TEXTS)
    ]
    corpus = "".join(f"{number}\t{text}\n" for number, text in enumerate(dict.fromkeys(texts)))
    (folder / "corpus.tsv").write_text(corpus, encoding="utf-8")
    pairs = "".join(f"where is {text}\t{text}\n" for text in list(dict.fromkeys(texts))[:PAIRS])
    (folder / "pairs.tsv").write_text(pairs, encoding="utf-8")


if __name__ == "__main__":
    main()
