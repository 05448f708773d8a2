"""Nodes that come with demand: jobs bring what they ask for, work on all of it, and leave none behind."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from raytower.config import load_config
from raytower.encoding.config import EncodeConfig
from raytower.ranked.config import RerankFileConfig
from raytower.ranked.rerank import rerank
from tests.support.autoscaled import (
    AutoscaledCluster,
    Seen,
    Sight,
    Stay,
    comings_and_goings,
    most_at_once,
    stays,
    table,
)
from tests.support.encoding_here import encode_here, read_folder
from tests.support.scale_jobs import KINDS, ScaleJobs

IDLE_S = 6.0
WAITS = "no node has room for a process now that asks for"
ALIVE = """
import ray
from raytower.runtime import ensure_ray
ensure_ray()
print("alive", sum(node["Alive"] for node in ray.nodes()))
"""


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> ScaleJobs:
    return ScaleJobs(tmp_path_factory.mktemp("scale"), num_texts=640)


@pytest.fixture(scope="module")
def cluster() -> Iterator[AutoscaledCluster]:
    with AutoscaledCluster(KINDS, idle_s=IDLE_S, dashboard=True) as cluster:
        yield cluster


def nodes_of(cluster: AutoscaledCluster, job: str) -> list[Stay]:
    """The nodes that came while a job ran, once all are gone."""
    cluster.wait_until_nodes(0)
    sights = cluster.watch.sights
    seconds = [sight.second for sight in sights if job in sight.jobs]
    return [stay for stay in stays(sights) if seconds[0] <= stay.came <= seconds[-1]]


def all_worked_and_went(found: list[Stay]) -> bool:
    """Whether each had work, and went after it had had none for the idle time, which Ray counts a little otherwise."""
    return all(
        stay.ended is not None and stay.went is not None and stay.went - stay.ended > IDLE_S - 2
        for stay in found
    )


@pytest.mark.processes
@pytest.mark.slow
class TestNodes:
    def test_an_encoding_works_on_both_nodes_that_it_brings(
        self, cluster: AutoscaledCluster, jobs: ScaleJobs
    ) -> None:
        said = cluster.run("encode", *jobs.encode())
        assert f"{WAITS} 1 CPU; the job waits until one comes" in said
        assert most_at_once(cluster.watch.sights, "encode", "PieceEncoder") == 2
        found = nodes_of(cluster, "encode")
        assert [stay.kind for stay in found] == ["cpu", "cpu"]
        assert all_worked_and_went(found)
        config = load_config(EncodeConfig, jobs.encode("here")[-1])
        encode_here(config)
        assert read_folder(jobs.folder / "embeddings").equals(read_folder(jobs.folder / "here"))

    def test_nothing_but_the_head_is_left_to_ray(self, cluster: AutoscaledCluster) -> None:
        cluster.wait_until_nodes(0)
        done = subprocess.run(
            [sys.executable, "-c", ALIVE],
            env=cluster.environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert "alive 1\n" in done.stdout, done.stderr
