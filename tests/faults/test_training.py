"""A training run that loses the whole job and then a worker. Real kills, and a curve that must not show them."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
from itertools import groupby
from pathlib import Path

import psutil
import pytest

from raytower.config import make_config
from raytower.training.config import TrainRetrieverConfig
from raytower.training.retriever import RetrieverTask, train_retriever
from tests.support.elastic_run import CPUS_PER_WORKER
from tests.support.killed_jobs import command_with, kill_once, training_that_restarts
from tests.support.processes import clean_environment, wait_for
from tests.support.registered_steps import registered_steps
from tests.support.tiny_training import train_here, write_pairs

Curve = dict[int, float]


def curve_of(output: Path) -> Curve:
    info = json.loads((output / "raytower.json").read_text())
    return {int(row["step"]): row["loss"] for row in info["curve"]}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("rows") / "pairs.tsv", 50)


@pytest.fixture(scope="module")
def undisturbed(
    ray_cluster: None, dummy_encoder_dir: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory
) -> Curve:
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    figures = train_retriever(
        make_config(TrainRetrieverConfig, training_that_restarts(dummy_encoder_dir, pairs, output))
    )
    curve = curve_of(output)
    assert figures["steps"] == 50 == len(curve)
    return curve


def train_workers() -> list[psutil.Process]:
    """Ray Train's worker processes of the suite's own Ray."""
    family = psutil.Process().children(recursive=True)
    return [process for process in family if "RayTrainWorker" in " ".join(process.cmdline())]


def test_a_killed_job_continues_and_a_killed_worker_is_replaced_without_a_trace_in_the_curve(
    undisturbed: Curve,
    dummy_encoder_dir: Path,
    pairs: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The whole job is killed, with a checkpoint half written; where it goes on, a worker is killed."""
    output = tmp_path / "out"
    values = training_that_restarts(dummy_encoder_dir, pairs, output)
    command = command_with("train-retriever", values, tmp_path)
    environment = clean_environment(RAY_AUTH_MODE="disabled")
    kill_once(lambda: len(registered_steps(tmp_path)) >= 2, command, environment, tmp_path / "first.log")
    assert not output.exists()
    reached = max(registered_steps(tmp_path))
    (folder,) = tmp_path.glob(".out.*.train")
    # What a kill in the middle of writing leaves: the newest of all checkpoint folders, and not whole.
    torn = folder / "checkpoint_2999-01-01_00-00-00.000000"
    (torn / "model").mkdir(parents=True)
    (torn / "state.json").write_text('{"progress": {"step": 4')
    killed_at: list[int] = []

    def kill_one() -> None:
        wait_for(lambda: max(registered_steps(tmp_path), default=0) > reached, "another checkpoint")
        train_workers()[-1].send_signal(signal.SIGKILL)
        killed_at.append(max(registered_steps(tmp_path)))

    thread = threading.Thread(target=kill_one)
    thread.start()
    figures = train_retriever(make_config(TrainRetrieverConfig, values))
    thread.join()
    told = capfd.readouterr().err
    assert f"continuing from step {reached} of 50" in told
    assert told.count("continuing from step") == 2
    assert reached < killed_at[0] < 50
    assert figures["steps"] == 50
    assert curve_of(output) == pytest.approx(undisturbed, abs=1e-4)


def test_sigterm_to_a_worker_costs_no_step(
    undisturbed: Curve,
    dummy_encoder_dir: Path,
    pairs: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """It ended the worker at once, and the steps since the last checkpoint, here all of them, were made again."""
    output = tmp_path / "out"
    values = training_that_restarts(dummy_encoder_dir, pairs, output) | {
        "checkpoint_every_steps": 1000,
        "max_failures": 0,
    }

    def end_one() -> None:
        wait_for(lambda: (tmp_path / "out.tensorboard").exists(), "the first step")
        train_workers()[-1].send_signal(signal.SIGTERM)

    thread = threading.Thread(target=end_one)
    thread.start()
    figures = train_retriever(make_config(TrainRetrieverConfig, values))
    thread.join()
    told = capfd.readouterr().err
    (step,) = re.findall(r"all workers start anew from the checkpoint of step (\d+)", told)
    assert re.findall(r"continuing from step (\d+)", told) == [step]
    assert figures["steps"] == 50
    assert curve_of(output) == pytest.approx(undisturbed, abs=1e-5)


@pytest.mark.slow  # a cluster of three nodes on one machine takes minutes to start
def test_a_drained_node_leaves_no_trace_in_the_curve(dummy_encoder_dir: Path, tmp_path: Path) -> None:
    """4 workers, and 2 once a node is drained; dropout is always that of 4, and no step is made twice."""
    output = tmp_path / "out"
    values = training_that_restarts(dummy_encoder_dir, write_pairs(tmp_path / "pairs.tsv", 48), output)
    values |= {
        "workers": {"min": 2, "max": 4, "num_cpus": CPUS_PER_WORKER, "num_gpus": 0},
        "epochs": 16,
        "max_failures": 0,
    }
    script = f"from tests.support.elastic_run import main; main({values!r})"
    environment = clean_environment(
        RAY_AUTH_MODE="disabled", RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S="0.5", GLOO_SOCKET_IFNAME="lo"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=280
    )
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout.splitlines()[-1])["steps"] == 48
    numbers = [int(line) for line in (tmp_path / "workers").read_text().split()]
    assert [number for number, _ in groupby(numbers)] == [4, 2]
    saved = re.findall(r"all workers start anew from the checkpoint of step (\d+)", ended.stderr)
    assert re.findall(r"continuing from step (\d+)", ended.stderr) == saved
    assert len(saved) == 1
    assert len(numbers) == 48
    config = make_config(TrainRetrieverConfig, values)
    surveyed = RetrieverTask.survey(config)
    task = RetrieverTask.prepare(config, surveyed)
    _, losses = train_here(task, config, surveyed, num_steps=48, num_shares=4)
    assert list(curve_of(output).values()) == pytest.approx(losses, abs=1e-5)
