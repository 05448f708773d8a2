"""Nodes that come with demand and go when they are idle, under jobs of every kind: a demonstration with its timeline.

    python benchmarks/autoscaling.py [--texts 3200] [--idle 6]

A head without CPUs and Ray's autoscaler run on this machine, with its provider for tests: nodes of kind `cpu` have a
CPU, those of kind `gpu` a CPU and a GPU that Ray alone believes in; three at most. One after the other run `encode`,
`index build` of larger vectors and of what was encoded, `evaluate` (submitted, since its own process computes),
`train-retriever` (which asks for the label of the GPU nodes) and `rerank` (which asks for the GPU). Prints a line for
each change, by the table of processes, and at the end when each node came, worked and went.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

# Run as a file, Python looks beside it alone; the cluster is that of the tests.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.support.autoscaled import AutoscaledCluster, comings_and_goings, table
from tests.support.scale_jobs import KINDS, ScaleJobs


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--texts", type=int, default=3200, help="of the corpus")
    parser.add_argument("--idle", type=float, default=6, help="seconds after which a node without work goes")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        jobs = ScaleJobs(Path(folder), arguments.texts)
        with AutoscaledCluster(KINDS, idle_s=arguments.idle, dashboard=True) as cluster:
            try:
                cluster.run("encode", *jobs.encode())
                cluster.run("large build", *jobs.build_large())
                cluster.run("index build", *jobs.build())
                assert cluster.dashboard is not None
                submitted = ("--address", cluster.dashboard, "--driver-cpus", "1", "--shared", folder)
                cluster.run("evaluate", "submit", *jobs.evaluate(), *submitted)
                cluster.run("train-retriever", *jobs.train())
                cluster.run("rerank", *jobs.rerank())
                cluster.wait_until_nodes(0)
            finally:
                sights = cluster.watch.sights
                print("\n".join([*table(sights, list(KINDS)), "", *comings_and_goings(sights)]), flush=True)


if __name__ == "__main__":
    main()
