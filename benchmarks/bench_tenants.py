"""Three jobs at once on two nodes of one CPU each: how long each takes beside its fair time, and that all end.

    python benchmarks/bench_tenants.py [--texts 960]

The jobs are an encoding, an index build and a training, each for two workers of one CPU, submitted by `raytower
submit`. Each runs alone first. A job that shared the nodes evenly with the two others would take three times as long:
that is its fair time, and twice as much the limit. The training needs both nodes at the same moment.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# Run as a file, Python looks beside it alone; the cluster is that of the tests.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.support.autoscaled import AutoscaledCluster, Kind, table
from tests.support.scale_jobs import ScaleJobs

TENANTS = 3
LIMIT = 2.0


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--texts", type=int, default=960, help="of the corpus")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        alone = ScaleJobs(Path(folder, "alone"), arguments.texts)
        together = ScaleJobs(Path(folder, "together"), arguments.texts)
        kinds = {"cpu": Kind(cpus=1, least=2, most=2)}
        with AutoscaledCluster(kinds, most=2, dashboard=True) as cluster:
            cluster.wait_until_nodes(2)
            by_itself = {
                name: seconds(cluster, f"{name} alone", job, folder) for name, job in tenants(alone).items()
            }
            with ThreadPoolExecutor(TENANTS) as pool:
                running = {
                    name: pool.submit(seconds, cluster, name, job, folder)
                    for name, job in tenants(together).items()
                }
                at_once = {name: job.result() for name, job in running.items()}
            print("\n".join(table(cluster.watch.sights, list(kinds))), end="\n\n")
    print("job                  alone  at once  fair time  of the fair time")
    for name, took in at_once.items():
        fair = TENANTS * by_itself[name]
        print(f"{name:<18} {by_itself[name]:>6.1f} s {took:>6.1f} s {fair:>8.1f} s {took / fair:>17.2f}")
    worst = max(took / (TENANTS * by_itself[name]) for name, took in at_once.items())
    print(f"at most {worst:.2f} of the fair time; the limit is {LIMIT:g}")
    sys.exit(worst > LIMIT)


def tenants(jobs: ScaleJobs) -> Mapping[str, tuple[str, ...]]:
    training = jobs.train(label_selector={})
    return {"encode": jobs.encode(), "index build": jobs.build_large(), "train-retriever": training}


def seconds(cluster: AutoscaledCluster, name: str, job: tuple[str, ...], shared: str) -> float:
    """From its submission to its end."""
    assert cluster.dashboard is not None
    started = time.perf_counter()
    cluster.run(name, "submit", *job, "--address", cluster.dashboard, "--shared", shared, limit_s=500)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
