"""Starting Ray: beside what other programs have left on the machine, closed to them, and nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import ROOT, clean_environment, free_port, wait_for, wait_until_ok

START = """
import ray
from raytower.runtime import ensure_ray
ensure_ray()
print("logical CPUs", ray.cluster_resources()["CPU"] >= 4)
ray.shutdown()
"""

# What a job sees of its own Ray, as one line of JSON.
LOOK = """
import ipaddress, json, os, stat, sys
from pathlib import Path
import psutil, ray
from raytower.runtime import ensure_ray
ensure_ray(secret_variables=["SEARCH_KEY"])

@ray.remote
def worker():
    return {"folder": os.getcwd(), "path": sys.path, "key": os.environ.get("SEARCH_KEY")}

seen = ray.get(worker.remote())
me = psutil.Process()
family = [me, *me.children(recursive=True)]
listening = [link.laddr.ip for member in family for link in member.net_connections("tcp")
             if link.status == psutil.CONN_LISTEN]
sockets = {link.laddr for member in family for link in member.net_connections("unix") if link.laddr.startswith("/")}
private = {str(folder) for socket in sockets for folder in Path(socket).parents
           if folder.stat().st_mode & 0o777 == 0o700 and folder.stat().st_uid == os.getuid()}
environments = [member.environ() for member in family[1:]]
print(json.dumps({
    "worker": seen,
    "cpus": ray.cluster_resources()["CPU"],
    "mode": os.environ["RAY_AUTH_MODE"],
    "token": os.environ["RAY_AUTH_TOKEN"],
    "arguments": [member.cmdline() for member in family],
    "key": os.environ["SEARCH_KEY"],
    "keys": [environment.get("SEARCH_KEY") for environment in environments],
    "listening": sorted(set(listening)),
    "sockets": sorted(sockets),
    "private": sorted(private),
    "folder": os.getcwd(),
    "telemetry": look_everywhere(),
    # Workers write their titles over what they were started with.
    "told": [found.get("RAY_USAGE_STATS_ENABLED") for found in environments if "PATH" in found],
}))
"""
# What a driver, a task and an actor go by; Ray has been started before.
LOOK_AT_TELEMETRY = """
def look():
    import logging, ray.data
    from ray._common.usage.usage_lib import usage_stats_enabled
    return {"tells": usage_stats_enabled(), "level": logging.getLevelName(logging.getLogger("ray.data").level)}

class Looker:
    def look(self):
        return look()

def look_everywhere():
    import ray
    seen = {"driver": look(), "task": ray.get(ray.remote(look).remote())}
    return seen | {"actor": ray.get(ray.remote(Looker).remote().look.remote())}
"""
QUIET = {place: {"tells": False, "level": "WARNING"} for place in ("driver", "task", "actor")}

# A worker that writes until its job is gone; `signalled` is written when the job has had its signal.
TALKATIVE = """
import os, signal, sys, threading, time
import ray
from ray._private.ray_logging import global_worker_stdstream_dispatcher
from raytower.ending import Terminated, bounded_ending
from raytower.progress import log
from raytower.runtime import ensure_ray

ensure_ray()
seen = threading.Event()
global_worker_stdstream_dispatcher.add_handler(
    "test", lambda data: seen.set() if any("still there" in line for line in data["lines"]) else None
)

@ray.remote
def talk():
    while True:
        log("still there")
        time.sleep(0.05)

talking = talk.remote()
seen.wait(60)
time.sleep(0.5)
try:
    with bounded_ending():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
except Terminated:
    sys.stderr.write("signalled\\n")
    sys.stderr.flush()
    time.sleep(2)
"""


def run(script: str, folder: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-c", LOOK_AT_TELEMETRY + script],
        env=clean_environment(**environment),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def short_folder() -> Iterator[Path]:
    """Short, because the names of Ray's sockets lie below it and may have 107 bytes at most."""
    folder = tempfile.mkdtemp(prefix="rt")
    yield Path(folder)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def started(short_folder: Path) -> dict[str, Any]:
    """What a local start was like: in a folder with a `colorsys.py` of its own, beside what `ray start` had left."""
    folder, home, place = (short_folder / name for name in ("here", "home", "tmp"))
    for made in (folder, home, place):
        made.mkdir()
    (folder / "colorsys.py").write_text("raise ImportError('not the library')")
    # Where Ray looks for a cluster to join; nothing listens there any more.
    marker = place / "ray" / "ray_current_cluster"
    marker.parent.mkdir()
    marker.write_text("127.0.0.1:9")
    # The worker's task imports nothing; this shows what it would find.
    script = LOOK.replace('"path": sys.path', '"path": sys.path, "module": __import__("colorsys").__file__')
    places = {"HOME": str(home), "TMPDIR": str(place), "RAY_TMPDIR": str(place)}
    done = run(script, folder, SEARCH_KEY="open sesame", **places)
    assert done.returncode == 0, done.stderr
    assert marker.read_text() == "127.0.0.1:9"
    shutil.rmtree(marker.parent)
    left = [str(path) for made in (home, place) for path in made.rglob("*")]
    return json.loads(done.stdout.splitlines()[-1]) | {
        "left": left,
        "started_in": str(folder),
        "stderr": done.stderr,
    }


@pytest.mark.processes
def test_nothing_that_workers_write_is_shown_after_a_signal() -> None:
    before, _, after = run(TALKATIVE).stderr.partition("signalled\n")
    assert "still there" in before
    assert after == ""


@pytest.mark.processes
def test_a_cluster_that_was_left_on_the_machine_is_not_joined(started: dict[str, Any]) -> None:
    assert started["cpus"] >= 4


@pytest.mark.processes
@pytest.mark.parametrize(
    "fixture", ["started", "started_elsewhere"], ids=["raytower first", "Ray Data first"]
)
def test_no_process_tells_ray_s_makers_anything(fixture: str, request: pytest.FixtureRequest) -> None:
    found = request.getfixturevalue(fixture)
    assert found["telemetry"] == QUIET
    assert len(found["told"]) >= 2  # the control store and the raylet at least
    assert set(found["told"]) == {"0"}


@pytest.mark.processes
def test_every_port_is_on_loopback(started: dict[str, Any]) -> None:
    assert started["listening"]
    assert set(started["listening"]) <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


@pytest.mark.processes
def test_the_token_is_fresh_and_stands_in_no_file_and_no_argument(started: dict[str, Any]) -> None:
    assert started["mode"] == "token"
    assert len(started["token"]) == 64
    assert started["token"] not in json.dumps(started["arguments"])
    assert started["token"] not in started["stderr"]


@pytest.mark.processes
def test_sockets_lie_in_a_private_folder(started: dict[str, Any]) -> None:
    assert started["sockets"]
    for place in started["sockets"]:
        assert any(place.startswith(f"{folder}/") for folder in started["private"])


@pytest.mark.processes
def test_nothing_is_left_in_home_or_among_temporary_files(started: dict[str, Any]) -> None:
    assert started["left"] == []


@pytest.mark.processes
def test_workers_are_in_the_folder_of_the_job_but_import_nothing_from_it(started: dict[str, Any]) -> None:
    assert started["worker"]["folder"] == started["folder"] == started["started_in"]
    assert started["started_in"] not in started["worker"]["path"]
    assert "" not in started["worker"]["path"]
    assert not started["worker"]["module"].startswith(started["started_in"])


@pytest.mark.processes
def test_a_secret_stays_with_the_job(started: dict[str, Any]) -> None:
    assert started["key"] == "open sesame"
    assert started["keys"]
    assert set(started["keys"]) == {started["worker"]["key"]} == {None}


@pytest.fixture(scope="module")
def started_elsewhere(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a start with a long TMPDIR was like, by a program that had imported Ray Data before."""
    place = tmp_path_factory.mktemp("place") / ("long" * 20)
    place.mkdir()
    script = f"import ray.data\n{LOOK}" + (
        "node = ray._private.worker.global_worker.node\n"
        "spilled = Path(node._ray_params.object_spilling_directory)\n"
        "print(spilled.parent, oct(spilled.stat().st_mode))\n"
    )
    done = run(script, TMPDIR=str(place), SEARCH_KEY="x")
    assert done.returncode == 0, done.stderr
    look, spilled = done.stdout.splitlines()[-2:]
    left = [str(path) for path in place.iterdir()]
    return json.loads(look) | {"place": str(place), "spilled": spilled, "left": left}


@pytest.mark.processes
def test_a_long_place_for_temporary_files_takes_what_is_spilled_but_no_sockets(
    started_elsewhere: dict[str, Any],
) -> None:
    assert started_elsewhere["spilled"] == f"{started_elsewhere['place']} {oct(stat.S_IFDIR | 0o700)}"
    assert started_elsewhere["left"] == []


@pytest.mark.processes
def test_a_ray_that_was_imported_before_is_closed_too(started_elsewhere: dict[str, Any]) -> None:
    assert (started_elsewhere["mode"], len(started_elsewhere["token"])) == ("token", 64)
    assert set(started_elsewhere["listening"]) <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def test_where_no_place_is_short_enough_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from raytower import runtime
    from raytower.errors import InputError

    monkeypatch.setattr(runtime, "_LONGEST_SOCKET", "/" + "x" * 100)
    with pytest.raises(InputError, match=r"name one in RAY_TMPDIR"):
        runtime._short_place()


@pytest.mark.processes
def test_a_ray_that_was_given_up_and_then_shut_down_leaves_nothing_to_be_killed() -> None:
    done = run(
        START.replace("ray.shutdown()", "import raytower.runtime\nraytower.runtime.abandon()\nray.shutdown()")
    )
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr


def test_tasks_are_ended_where_whoever_takes_their_results_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    from raytower import runtime

    ended: list[str] = []
    monkeypatch.setattr("ray.wait", lambda running, num_returns: (running[:1], running[1:]))
    monkeypatch.setattr("ray.get", lambda reference: f"result of {reference}")
    monkeypatch.setattr("ray.cancel", lambda reference, force: ended.append(reference))
    results = runtime.run_tasks(lambda number: f"task {number}", range(4), 3, "the job")
    assert next(results) == (0, "result of task 0")
    results.close()
    assert ended == ["task 1", "task 2"]
    assert dict(runtime.run_tasks(lambda number: f"task {number}", range(2), 2, "the job")).keys() == {0, 1}
    assert ended == ["task 1", "task 2"]


def test_it_is_said_that_the_head_is_gone_and_that_it_answers_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from raytower import runtime

    monkeypatch.setattr(runtime, "_WATCH_S", 0.02)
    monkeypatch.setattr(runtime, "_HEAD_LOST_S", 0.1)
    joined = [True]
    monkeypatch.setattr("ray.is_initialized", lambda: joined[0])
    head = socket.create_server(("127.0.0.1", 0))
    port = head.getsockname()[1]
    watch = threading.Thread(target=runtime.watch_head, args=(f"127.0.0.1:{port}",))
    watch.start()
    said = ""

    def says(text: str) -> bool:
        nonlocal said
        said += capsys.readouterr().err
        return text in said

    time.sleep(0.3)
    assert not says("head")
    head.close()
    wait_for(lambda: says(f"the cluster's head at 127.0.0.1:{port} has not answered for 0.1 s"), "it is said")
    with socket.create_server(("127.0.0.1", port)):
        wait_for(lambda: says("the cluster's head answers again"), "it is said")
        joined[0] = False
        watch.join(10)
    assert not watch.is_alive()
    assert said.count("has not answered") == 1


@pytest.mark.processes
def test_a_process_that_ends_starts_no_other_ray() -> None:
    """As Serve's calls would in a thread that was left to itself: one with Ray's own settings."""
    # What is registered first runs last, after our Ray has been shut down.
    late = (
        "import atexit\n\ndef again():\n    import ray\n    ray.init(num_cpus=1)\n\natexit.register(again)\n"
    )
    done = run(late + START.replace("ray.shutdown()", ""))
    assert "this process ends, and starts no Ray any more" in done.stderr


@pytest.mark.processes
@pytest.mark.parametrize("mode", ["token", "disabled"])
def test_a_mode_that_ray_did_not_see_is_refused(mode: str) -> None:
    other = {"token": "disabled", "disabled": "token"}[mode]
    script = f"import os, ray\nos.environ['RAY_AUTH_MODE'] = '{mode}'\n{START}"
    done = run(script, RAY_AUTH_MODE=other, RAY_AUTH_TOKEN="a" * 64)
    assert done.returncode == 1
    assert f"RAY_AUTH_MODE was set to '{mode}' after Ray had been imported" in done.stderr


class TestWhoseToken:
    """`_require_token` alone: which settings of the user are kept."""

    @pytest.fixture(autouse=True)
    def clean(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
            monkeypatch.setenv(name, "")  # so that what is set below is taken back
            monkeypatch.delenv(name)
        monkeypatch.setenv("HOME", str(tmp_path))

    @staticmethod
    def token_after(monkeypatch: pytest.MonkeyPatch, asks: bool, **settings: str) -> str | None:
        from raytower import runtime

        monkeypatch.setattr(runtime, "is_token_auth_enabled", lambda: asks)
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        runtime._require_token()
        return os.environ.get("RAY_AUTH_TOKEN")

    def test_without_a_setting_it_is_fresh(self, monkeypatch: pytest.MonkeyPatch) -> None:
        first = self.token_after(monkeypatch, asks=False)
        monkeypatch.delenv("RAY_AUTH_TOKEN")
        second = self.token_after(monkeypatch, asks=False)
        assert first
        assert second
        assert first != second

    def test_a_mode_without_a_token_gets_one_rather_than_a_file(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert self.token_after(monkeypatch, asks=True, RAY_AUTH_MODE="token")

    def test_the_users_token_is_kept(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        assert self.token_after(monkeypatch, asks=False, RAY_AUTH_TOKEN="mine") == "mine"
        monkeypatch.delenv("RAY_AUTH_TOKEN")
        assert self.token_after(monkeypatch, asks=False, RAY_AUTH_TOKEN_PATH="/a/file") is None

    def test_the_users_token_file_is_kept(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray/auth_token").write_text("mine")
        assert self.token_after(monkeypatch, asks=True, RAY_AUTH_MODE="token") is None

    def test_a_door_that_the_user_opens_is_named(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert self.token_after(monkeypatch, asks=False, RAY_AUTH_MODE="disabled") is None
        assert "can run commands" in capsys.readouterr().err


def test_a_program_that_has_the_token_joins_by_the_address(ray_cluster: None) -> None:
    import ray

    address = ray.get_runtime_context().gcs_address
    settings = {name: os.environ[name] for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")}
    done = run(
        "print('address', end=' ')\n" + START.replace("logical CPUs", "joined"),
        RAY_ADDRESS=address,
        **settings,
    )
    assert done.returncode == 0, done.stderr
    assert "joined True" in done.stdout


SUBMITTED = f"""
import json
from raytower.runtime import ensure_ray
ensure_ray()
{LOOK_AT_TELEMETRY}
print(json.dumps(look_everywhere()))
"""


@pytest.fixture
def head(tmp_path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """A head of somebody who has set nothing; yields the dashboard's address and the environment."""
    # Short, because the names of Ray's sockets lie below it and may have 107 bytes at most.
    session = tempfile.mkdtemp(prefix="rt")
    gcs, dashboard, client, agent = (free_port() for _ in range(4))
    environment = clean_environment(HOME=str(tmp_path), RAY_AUTH_MODE="disabled")
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


@pytest.mark.processes
def test_a_submitted_job(head: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    """Workers of a cluster inherit from its nodes, not from the job: the job has to tell them."""
    address, environment = head
    (tmp_path / "look.py").write_text(SUBMITTED, encoding="utf-8")
    runtime = json.dumps({"env_vars": {"PYTHONPATH": str(ROOT / "platform")}})
    command = ["ray", "job", "submit", "--address", address, "--runtime-env-json", runtime]
    command += ["--", sys.executable, str(tmp_path / "look.py")]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith('{"driver"')]
    assert json.loads(line) == QUIET
