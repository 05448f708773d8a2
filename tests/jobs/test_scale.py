"""Nodes that come with demand: jobs bring what they ask for, work on all of it, and leave none behind."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
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
from tests.support.index_cases import build
from tests.support.scale_jobs import KINDS, ScaleJobs

IDLE_S = 6.0
WAITS = "no node has room for a process now that asks for 1 CPU{more}; the job waits until one comes"

# What Ray itself says of the cluster.
ALIVE = """
import ray
from raytower.runtime import ensure_ray
ensure_ray()
print("alive", sum(node["Alive"] for node in ray.nodes()))
"""

# A job whose own process is on a node: of a cluster on one machine Ray has every driver join the head.
ENCODE_IN_A_TASK = """
import sys, ray
from raytower.runtime import ensure_ray
ensure_ray()

@ray.remote(num_cpus=1)
def job(config):
    from raytower.config import load_config
    from raytower.encoding.config import EncodeConfig
    from raytower.encoding.job import encode
    return encode(load_config(EncodeConfig, config))["rows"]

print("rows", ray.get(job.remote(sys.argv[1])))
"""


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> ScaleJobs:
    return ScaleJobs(tmp_path_factory.mktemp("scale"), num_texts=480)


@pytest.fixture(scope="module")
def cluster() -> Iterator[AutoscaledCluster]:
    with AutoscaledCluster(KINDS, idle_s=IDLE_S, dashboard=True) as cluster:
        yield cluster


def nodes_of(cluster: AutoscaledCluster, job: str) -> list[Stay]:
    """The nodes that came while a job ran, once all are gone; each had work, and was idle when it was taken away."""
    cluster.wait_until_nodes(0)
    sights = cluster.watch.sights
    # Whether a process still works that is about to end, as those of ended actors are for seconds, only Ray knows.
    assert {node for sight in sights for node in sight.nodes} == cluster.taken_as_idle()
    seconds = [sight.second for sight in sights if job in sight.jobs]
    found = [stay for stay in stays(sights) if seconds[0] <= stay.came <= seconds[-1]]
    assert all(stay.began for stay in found), comings_and_goings(sights)
    return found


def run_script(cluster: AutoscaledCluster, script: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env=cluster.environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.processes
def test_an_encoding_brings_a_node_which_goes_when_it_is_idle(
    cluster: AutoscaledCluster, tmp_path: Path
) -> None:
    jobs = ScaleJobs(tmp_path, num_texts=96, layers=4)
    said = cluster.run("few", *jobs.encode("few", num=1))
    assert WAITS.format(more="") in said
    (node,) = nodes_of(cluster, "few")
    assert (node.kind, node.jobs) == ("cpu", ("few",))
    assert "alive 1\n" in run_script(cluster, ALIVE)
    encode_here(load_config(EncodeConfig, jobs.encode("here", num=1)[-1]))
    assert read_folder(jobs.folder / "few").equals(read_folder(jobs.folder / "here"))


@pytest.mark.processes
@pytest.mark.slow
class TestJobs:
    def test_an_encoding_works_on_both_nodes_that_it_brings(
        self, cluster: AutoscaledCluster, jobs: ScaleJobs
    ) -> None:
        cluster.run("encode", *jobs.encode("many", min=2))
        assert [stay.kind for stay in nodes_of(cluster, "encode")] == ["cpu", "cpu"]
        assert most_at_once(cluster.watch.sights, "encode", "PieceEncoder") == 2

    def test_shards_of_an_index_are_built_on_both(self, cluster: AutoscaledCluster, jobs: ScaleJobs) -> None:
        said = cluster.run("build", *jobs.build_large())
        assert json.loads(said.splitlines()[-1])["shards"] == 4
        assert [stay.kind for stay in nodes_of(cluster, "build")] == ["cpu", "cpu"]
        assert most_at_once(cluster.watch.sights, "build", "build_shard") == 2

    def test_an_evaluation_brings_a_node_for_its_own_process(
        self, cluster: AutoscaledCluster, jobs: ScaleJobs
    ) -> None:
        encode_here(load_config(EncodeConfig, jobs.encode("embeddings")[-1]))
        build(jobs.folder / "index", str(jobs.folder / "embeddings"))
        assert cluster.dashboard is not None
        given = ("--address", cluster.dashboard, "--driver-cpus", "1", "--shared", str(jobs.folder))
        said = cluster.run("evaluate", "submit", *jobs.evaluate(), *given)
        assert json.loads(said.splitlines()[-1])["status"] == "SUCCEEDED"
        assert (jobs.folder / "report" / "report.json").is_file()
        (node,) = nodes_of(cluster, "evaluate")
        assert node.kind == "cpu"

    def test_a_training_brings_the_nodes_with_its_label_and_no_other(
        self, cluster: AutoscaledCluster, jobs: ScaleJobs
    ) -> None:
        said = cluster.run("train", *jobs.train())
        assert WAITS.format(more=', labels {"pool": "gpu"}') in said
        assert [stay.kind for stay in nodes_of(cluster, "train")] == ["gpu", "gpu"]
        assert most_at_once(cluster.watch.sights, "train", "RayTrainWorker") == 2

    def test_what_asks_for_a_gpu_brings_a_node_that_has_one(
        self, cluster: AutoscaledCluster, jobs: ScaleJobs
    ) -> None:
        said = cluster.run("rerank", *jobs.rerank())
        assert WAITS.format(more=", 1 GPU") in said
        (node,) = nodes_of(cluster, "rerank")
        assert node.kind == "gpu"
        config = load_config(RerankFileConfig, jobs.rerank("here.tsv")[-1])
        rerank(config.model_copy(update={"workers": type(config.workers)()}))
        assert (jobs.folder / "ranked.tsv").read_bytes() == (jobs.folder / "here.tsv").read_bytes()

    def test_a_node_that_held_the_job_s_own_process_goes_too(
        self, cluster: AutoscaledCluster, jobs: ScaleJobs
    ) -> None:
        """Ray Data keeps actors for all jobs, by itself on the node of the first: nothing here may have used it yet."""
        with AutoscaledCluster(KINDS, idle_s=IDLE_S) as fresh:
            config = jobs.encode("in-a-task", num=1)[-1]
            with fresh.watch.during("task"):
                assert "rows 480\n" in run_script(fresh, ENCODE_IN_A_TASK, config)
            assert [stay.kind for stay in nodes_of(fresh, "task")] == ["cpu", "cpu"]


class TestWhatIsSeen:
    """The watch's arithmetic, over a short history written by hand."""

    SIGHTS = (
        Sight(0.0, {}, ("encode",)),
        Sight(2.0, {"a": Seen("cpu", ())}, ("encode",)),
        Sight(3.0, {"a": Seen("cpu", ("Encoder",)), "b": Seen("cpu", ())}, ("encode",)),
        Sight(5.0, {"a": Seen("cpu", ("Encoder",)), "b": Seen("cpu", ("Encoder",))}, ("encode",)),
        Sight(8.0, {"a": Seen("cpu", ()), "b": Seen("cpu", ())}, ()),
        Sight(9.0, {"b": Seen("cpu", ("build",)), "c": Seen("gpu", ())}, ("build",)),
        Sight(11.0, {"c": Seen("gpu", ())}, ()),
    )

    def test_a_stay_is_from_coming_to_going(self) -> None:
        first = Stay("cpu 1", "cpu", 2.0, 3.0, 8.0, 9.0, ("encode",))
        second = replace(
            first, name="cpu 2", came=3.0, began=5.0, ended=11.0, went=11.0, jobs=("encode", "build")
        )
        third = Stay("gpu 1", "gpu", 9.0, None, None, None, ())
        assert stays(self.SIGHTS) == [first, second, third]
        assert stays(()) == []

    def test_work_at_the_same_moment_is_counted_by_nodes(self) -> None:
        assert most_at_once(self.SIGHTS, "encode", "Encoder") == 2
        assert most_at_once(self.SIGHTS, "build", "build") == 1
        assert most_at_once(self.SIGHTS, "build", "Encoder") == 0

    def test_both_tables_have_a_line_for_each(self) -> None:
        lines = table(self.SIGHTS, ["cpu", "gpu"])
        assert len(lines) == 1 + len(self.SIGHTS)
        assert lines[4].split() == [
            "5.0",
            "2",
            "0",
            "encode",
            "cpu",
            "1:",
            "Encoder;",
            "cpu",
            "2:",
            "Encoder",
        ]
        ends = comings_and_goings(self.SIGHTS)
        assert [line.split()[:3] for line in ends[1:]] == [
            ["cpu", "1", "2.0"],
            ["cpu", "2", "3.0"],
            ["gpu", "1", "9.0"],
        ]
        assert ends[3].split()[3:] == ["-", "-", "-", "-", "-"]
