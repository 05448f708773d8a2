"""Starting Ray: beside what other programs have left on the machine, closed to them, and nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]

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
    "mode": os.environ["RAY_AUTH_MODE"],
    "token": os.environ["RAY_AUTH_TOKEN"],
    "arguments": [member.cmdline() for member in family],
    "key": os.environ["SEARCH_KEY"],
    "keys": [environment.get("SEARCH_KEY") for environment in environments],
    "listening": sorted(set(listening)),
    "sockets": sorted(sockets),
    "private": sorted(private),
    "folder": os.getcwd(),
}))
"""

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


def clean_environment(**more: str) -> dict[str, str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return environment | {"PYTHONPATH": str(ROOT / "platform"), "RAY_USAGE_STATS_ENABLED": "0"} | more


def run(script: str, folder: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-c", script],
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
    """What a local start in a folder with a `colorsys.py` of its own was like."""
    folder, home, place = (short_folder / name for name in ("here", "home", "tmp"))
    for made in (folder, home, place):
        made.mkdir()
    (folder / "colorsys.py").write_text("raise ImportError('not the library')")
    # The worker's task imports nothing; this shows what it would find.
    script = LOOK.replace('"path": sys.path', '"path": sys.path, "module": __import__("colorsys").__file__')
    done = run(script, folder, HOME=str(home), TMPDIR=str(place), SEARCH_KEY="open sesame")
    assert done.returncode == 0, done.stderr
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
def test_a_cluster_that_was_left_on_the_machine_is_not_joined_unless_named(short_folder: Path) -> None:
    # What `ray start` leaves in this file; nothing listens there any more.
    marker = short_folder / "ray" / "ray_current_cluster"
    marker.parent.mkdir()
    marker.write_text("127.0.0.1:9")
    done = run(START, RAY_TMPDIR=str(short_folder))
    assert done.returncode == 0, done.stderr
    assert "logical CPUs True" in done.stdout


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
    for socket in started["sockets"]:
        assert any(socket.startswith(f"{folder}/") for folder in started["private"])


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
    """What a start with a long TMPDIR was like, by a program that had imported Ray before."""
    place = tmp_path_factory.mktemp("place") / ("long" * 20)
    place.mkdir()
    script = f"import ray\n{LOOK}" + (
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
