"""Training runs that are killed: of a worker, and of the whole job. Real kills, and curves that must not show them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from raytower.config import make_config
from raytower.training.config import TrainRetrieverConfig
from raytower.training.retriever import train_retriever
from tests.support.killed_jobs import kill_once
from tests.support.tiny_training import write_pairs

ROOT = Path(__file__).resolve().parents[2]
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


def wait_for(found: Callable[[], bool], what: str, timeout_s: float = 180) -> None:
    deadline = time.monotonic() + timeout_s
    while not found():
        assert time.monotonic() < deadline, f"{what} did not happen within {timeout_s} s"
        time.sleep(0.05)


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


def test_a_killed_worker_leaves_no_trace_in_the_curve(
    undisturbed: Curve, dummy_encoder_dir: Path, pairs: Path, tmp_path: Path
) -> None:
    killed: list[int] = []

    def kill_one() -> None:
        wait_for(lambda: len(registered_steps(tmp_path)) >= 2, "a second checkpoint")
        victim = train_workers()[-1]
        killed.append(victim.pid)
        victim.send_signal(signal.SIGKILL)

    thread = threading.Thread(target=kill_one)
    thread.start()
    output = tmp_path / "out"
    figures = train_retriever(make_config(TrainRetrieverConfig, run_values(dummy_encoder_dir, pairs, output)))
    thread.join()
    assert killed
    assert figures["steps"] == 50
    assert curve_of(output) == pytest.approx(undisturbed, abs=1e-4)


def test_a_killed_job_continues_and_a_half_written_checkpoint_does_not_count(
    undisturbed: Curve, dummy_encoder_dir: Path, pairs: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(run_values(dummy_encoder_dir, pairs, output)))
    command = [sys.executable, "-m", "raytower.cli", "train-retriever", "--config", str(config)]
    # A Ray of its own: the one of the suite must not be joined by a process that will be killed.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {"PYTHONPATH": str(ROOT / "platform"), "RAY_AUTH_MODE": "disabled"}
    kill_once(lambda: len(registered_steps(tmp_path)) >= 2, command, environment, tmp_path / "first.log")
    assert not output.exists()
    reached = max(registered_steps(tmp_path))
    (folder,) = tmp_path.glob(".out.*.train")
    # What a kill in the middle of writing leaves: the newest of all checkpoint folders, and not whole.
    torn = folder / "checkpoint_2999-01-01_00-00-00.000000"
    (torn / "model").mkdir(parents=True)
    (torn / "state.json").write_text('{"progress": {"step": 4')
    second = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert second.returncode == 0, second.stderr
    assert f"continuing from step {reached} of 50" in second.stderr
    assert json.loads(second.stdout.splitlines()[-1])["steps"] == 50
    assert curve_of(output) == pytest.approx(undisturbed, abs=1e-4)
    third = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert third.returncode == 0
    assert "is finished; nothing to do" in third.stderr
    assert json.loads(third.stdout.splitlines()[-1]) == json.loads(second.stdout.splitlines()[-1])
