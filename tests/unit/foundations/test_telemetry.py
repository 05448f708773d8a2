"""No process of a job tells Ray's makers anything, however the job was started, and Ray Data's own logs stay low."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
SETTINGS = ("RAY_USAGE_STATS_ENABLED", "RAY_DATA_LOG_LEVEL")

# What a driver, a task and an actor go by, as one line of JSON; {first} is what the driver does before Ray starts.
LOOK = """
import json, logging
{first}
from raytower.runtime import ensure_ray
ensure_ray()
import psutil, ray

def look():
    import logging, ray.data
    from ray._common.usage.usage_lib import usage_stats_enabled
    return {{"tells": usage_stats_enabled(), "level": logging.getLevelName(logging.getLogger("ray.data").level)}}

class Looker:
    def look(self):
        return look()

seen = {{"driver": look(), "task": ray.get(ray.remote(look).remote())}}
seen["actor"] = ray.get(ray.remote(Looker).remote().look.remote())
# Workers write their titles over what they were started with.
started = [child.environ() for child in psutil.Process().children(recursive=True)]
children = [found.get("RAY_USAGE_STATS_ENABLED") for found in started if "PATH" in found]
print(json.dumps([seen, children]))
"""
QUIET = {"tells": False, "level": "WARNING"}


def environment_without(*names: str, **more: str) -> dict[str, str]:
    """This process's, without a word to Ray; should Ray tell after all, nobody listens."""
    kept = {
        key: value for key, value in os.environ.items() if not key.startswith("RAY_") and key not in names
    }
    nobody = {"RAY_USAGE_STATS_REPORT_URL": "http://127.0.0.1:9"}
    return kept | nobody | {"PYTHONPATH": str(ROOT / "platform")} | more


@pytest.mark.processes
@pytest.mark.parametrize("first", ["", "import ray.data"], ids=["raytower first", "Ray Data first"])
def test_a_local_job(first: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-c", LOOK.format(first=first)],
        env=environment_without(HOME=str(tmp_path)),
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    seen, children = json.loads(done.stdout.splitlines()[-1])
    assert seen == {"driver": QUIET, "task": QUIET, "actor": QUIET}
    assert len(children) >= 2  # the control store and the raylet at least
    assert set(children) == {"0"}


@pytest.fixture
def head(tmp_path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """A head of somebody who has set nothing; yields the dashboard's address and the environment."""
    # Short, because the names of Ray's sockets lie below it and may have 107 bytes at most.
    session = tempfile.mkdtemp(prefix="rt")
    gcs, dashboard, client, agent = (free_port() for _ in range(4))
    environment = environment_without(HOME=str(tmp_path), RAY_AUTH_MODE="disabled")
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
    command = ["ray", "start", "--head", "--block", "--num-cpus=4", "--node-ip-address=127.0.0.1"]
    command += [f"--port={gcs}", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"]
    command += [f"--dashboard-agent-listen-port={agent}", "--include-dashboard=true", f"--temp-dir={session}"]
    log = tmp_path / "head.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=output, start_new_session=True
        )
    address = f"http://127.0.0.1:{dashboard}"
    try:
        # The dashboard takes jobs once the node's agent, which starts later, answers too.
        for url in (f"{address}/api/version", f"http://127.0.0.1:{agent}/api/local_raylet_healthz"):
            wait_until_ok(url, process, log)
        yield address, environment
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        shutil.rmtree(session, ignore_errors=True)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def wait_until_ok(url: str, process: subprocess.Popen[bytes], log: Path, timeout_s: float = 180) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.5)
    pytest.fail(f"{url} did not answer within {timeout_s} s:\n{log.read_text()}")


@pytest.mark.processes
def test_a_submitted_job(head: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    """Workers of a cluster inherit from its nodes, not from the job: the job has to tell them."""
    address, environment = head
    (tmp_path / "look.py").write_text(LOOK.format(first=""), encoding="utf-8")
    runtime = json.dumps({"env_vars": {"PYTHONPATH": str(ROOT / "platform")}})
    command = ["ray", "job", "submit", "--address", address, "--runtime-env-json", runtime]
    command += ["--", sys.executable, str(tmp_path / "look.py")]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith('[{"driver"')]
    assert json.loads(line)[0] == {"driver": QUIET, "task": QUIET, "actor": QUIET}


class TestSettings:
    @pytest.fixture(autouse=True)
    def clean(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        for name in (*SETTINGS, "RAY_JOB_CONFIG_JSON_ENV_VAR"):
            monkeypatch.setenv(name, "")  # so that what is set below is taken back
            monkeypatch.delenv(name)
        before = logging.getLogger("ray.data").level
        yield
        logging.getLogger("ray.data").setLevel(before)

    def test_the_users_own_stand(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from raytower import runtime

        monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "1")
        monkeypatch.setenv("RAY_DATA_LOG_LEVEL", "DEBUG")
        runtime._make_quiet()
        assert [os.environ[name] for name in SETTINGS] == ["1", "DEBUG"]
        assert logging.getLogger("ray.data").level == logging.DEBUG

    @pytest.mark.parametrize(
        ("job", "told"),
        [
            (None, {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DATA_LOG_LEVEL": "WARNING"}),
            ({"metadata": {}}, {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DATA_LOG_LEVEL": "WARNING"}),
            (
                {"runtime_env": {"env_vars": {"RAY_USAGE_STATS_ENABLED": "0"}}},
                {"RAY_DATA_LOG_LEVEL": "WARNING"},
            ),
        ],
        ids=["no job", "a job without an environment", "a job that sets one itself"],
    )
    def test_a_job_that_sets_one_is_not_told_twice(
        self, job: Any, told: dict[str, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Ray refuses to start where a variable is set by the job and by its driver."""
        from raytower import runtime

        runtime._make_quiet()
        if job is not None:
            monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(job))
        assert runtime._environment_in_cluster() == {"env_vars": told}


def test_ray_starts_in_one_place() -> None:
    """What the tests above show of `ensure_ray` holds for every job."""
    places = (ROOT / "platform").rglob("*.py"), (ROOT / "jobs").rglob("*.py")
    starting = [
        path.name
        for folder in places
        for path in folder
        if re.search(r"\bray\.init\(", path.read_text(encoding="utf-8"))
    ]
    assert starting == ["runtime.py"]
