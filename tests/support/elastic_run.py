"""A cluster of several nodes on this machine, and a training on it that loses nodes and gets others.

Run by `python -c` in a process of its own: a Ray that runs in this process would be joined in place of the cluster.
"""

from __future__ import annotations

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2
from torch import Tensor

from raytower.collectives import rank, world_size
from raytower.config import make_config
from raytower.training.config import TrainRetrieverConfig
from raytower.training.retriever import RetrieverTask
from raytower.training.runner import fit
from raytower.training.step import TrainingStep
from tests.support.processes import wait_for
from tests.support.registered_steps import registered_steps

CPUS_PER_WORKER = 2


class SlowTask(RetrieverTask):
    """Its steps take long enough for nodes to come and go between them; a file says how many workers made each."""

    def propagate(self, step: TrainingStep, batch: Any) -> Tensor:
        if rank() == 0:
            with open(Path(self.config.output).parent / "workers", "a", encoding="utf-8") as stream:
                stream.write(f"{world_size()}\n")
        time.sleep(0.1 if world_size() == 4 else 0.4)
        return super().propagate(step, batch)


def main(values: dict[str, Any]) -> None:
    """4 workers on two nodes, one of which is drained and goes. The figures go to stdout, as JSON."""
    output = Path(values["output"])
    workers = output.parent / "workers"
    # The head has no room for a worker: it reads rows.
    head = {"num_cpus": CPUS_PER_WORKER - 1, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    cluster.add_node(num_cpus=2 * CPUS_PER_WORKER)
    drained = cluster.add_node(num_cpus=2 * CPUS_PER_WORKER)
    os.environ["RAY_ADDRESS"] = cluster.address

    # What ends nodes runs in the main thread, which takes their signals.
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(fit, SlowTask, make_config(TrainRetrieverConfig, values))
        wait_for(lambda: bool(registered_steps(output.parent)), "a checkpoint")
        deadline_ms = int((time.time() + 600) * 1000)
        reason = autoscaler_pb2.DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION
        client = ray._private.worker.global_worker.gcs_client
        assert client.drain_node(drained.node_id, reason, "taken away", deadline_ms)[0]
        wait_for(lambda: "2\n" in workers.read_text(), "two workers")
        cluster.remove_node(drained, allow_graceful=False)
        print(json.dumps(run.result()))
    ray.shutdown()
    cluster.shutdown()
