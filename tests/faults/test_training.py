"""A training run that loses the whole job and then a worker. Real kills, and a curve that must not show them."""

from __future__ import annotations

import json
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest

from raytower.config import make_config
from raytower.training.config import TrainRetrieverConfig
from raytower.training.retriever import train_retriever
from tests.support.killed_jobs import kill_once
from tests.support.processes import clean_environment, wait_for
from tests.support.tiny_training import write_pairs

Curve = dict[int, float]


def run_values(encoder: Path, pairs: Path, output: Path) -> dict[str, Any]:
    """Two workers, dropout on, Adam, a schedule, epochs that flow into each other: all that a restart must restore."""
    return {
        "model": str(encoder),
        "train": {"path": str(pairs)},
        "output": str(output),
        "batch_size": 16,
        "epochs": 16,
        "max_length": 32,
        "dtype": "float32",
        "optimizer": {"lr": 1e-3},
        "workers": {"num": 2, "num_cpus": 0.5},
        "shuffle_rows": 20,
        "log_every_steps": 1,
        "checkpoint_every_steps": 4,
    }


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
    figures = train_retriever(make_config(TrainRetrieverConfig, run_values(dummy_encoder_dir, pairs, output)))
    curve = curve_of(output)
    assert figures["steps"] == 50 == len(curve)
    return curve


def registered_steps(folder: Path) -> list[int]:
    """The steps of the checkpoints that Ray Train counts as whole."""
    steps = []
    for snapshot in folder.glob(".out.*.train/checkpoint_manager_snapshot.json"):
        text = snapshot.read_text()
        if text:
            results = json.loads(text)["checkpoint_results"]
            steps = [result["metrics"]["step"] for result in results]
    return steps


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
    values = run_values(dummy_encoder_dir, pairs, output)
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(values))
    command = [sys.executable, "-m", "raytower.cli", "train-retriever", "--config", str(config)]
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
