"""A raytower job with a Ray of its own, ended by SIGKILL in the middle of its work."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from tests.support.warm import Popen


def command_with(command: str, values: Mapping[str, Any], folder: Path) -> list[str]:
    """A raytower command whose config lies in `folder`."""
    config = folder / "config.yaml"
    config.write_text(json.dumps(values))
    return [sys.executable, "-m", "raytower.cli", command, "--config", str(config)]


def training_that_restarts(model: Path, pairs: Path | str, output: Path | str) -> dict[str, Any]:
    """Two workers, dropout on, Adam, a schedule, epochs that flow into each other: all that a restart must restore."""
    return {
        "model": str(model),
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


def kill_once(
    ready: Callable[[], bool], command: Sequence[str], environment: Mapping[str, str], log: Path
) -> None:
    """Start `command`, kill it as soon as `ready`, and return when none of its processes is left."""
    with open(log, "wb") as stream:
        job = Popen(command, env=environment, stdout=stream, stderr=stream, start_new_session=True)
    try:
        deadline = time.monotonic() + 240
        while not ready():
            assert job.poll() is None, log.read_text()
            assert time.monotonic() < deadline, f"not ready after four minutes: {log.read_text()}"
            time.sleep(0.05)
        family = psutil.Process(job.pid).children(recursive=True)
        job.send_signal(signal.SIGKILL)
        job.wait(timeout=30)
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
    # Ray's own processes notice that their parent is gone, and its workers may finish a file until then; a new run must
    # not meet them.
    _, alive = psutil.wait_procs(family, timeout=3)
    for process in alive:
        process.kill()
    psutil.wait_procs(alive, timeout=30)
