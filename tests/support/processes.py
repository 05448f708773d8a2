"""Processes that tests start, and what they wait for."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def clean_environment(**more: str) -> dict[str, str]:
    """This process's environment without a word to Ray, for a process with a Ray of its own.

    The Ray of the suite must not be joined by it. Should Ray tell its makers after all, nobody listens.
    """
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    ray = {"RAY_USAGE_STATS_REPORT_URL": "http://127.0.0.1:9", "RAY_worker_niceness": "0"}
    return kept | ray | {"PYTHONPATH": f"{ROOT / 'platform'}{os.pathsep}{ROOT}"} | more


def run_cli(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """`raytower` as its users start it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "platform")}
    command = [sys.executable, "-m", "raytower.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd, timeout=300)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(found: Callable[[], bool], what: str, seconds: float = 180) -> None:
    """Until `found` is true; fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds} s"
        time.sleep(0.02)


def wait_until_ok(url: str, process: subprocess.Popen[bytes], log: Path, token: str | None = None) -> None:
    """Until `url` answers 200. Fails when `process` has ended, or after three minutes."""
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    request = urllib.request.Request(url, headers=headers)
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.2)
    pytest.fail(f"{url} did not answer within three minutes:\n{log.read_text()}")
