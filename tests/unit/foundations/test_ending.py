"""How a process ends: by which code, within which time, and what it takes with it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from raytower import ending
from raytower.cli import run_command

ROOT = Path(__file__).resolve().parents[3]

JOB = """
import sys, tempfile, time
from functools import partial
from pathlib import Path
import raytower.cli, raytower.ending

def job(config):
    folder = Path(tempfile.mkdtemp(prefix="ending", dir=sys.argv[1]))
    raytower.ending.remove_at_end(folder)
    try:
        print("working", flush=True)
        time.sleep(60)
    except SystemExit:
        if sys.argv[2] == "interrupted":
            raise KeyboardInterrupt
        if sys.argv[2] == "failed":
            raise RuntimeError("the actor died")
        raise
    finally:
        print("put in order", flush=True)
        if sys.argv[2] == "stuck":
            time.sleep(60)
    return {}

raytower.cli.bounded_ending = partial(raytower.ending.bounded_ending, 1.0 if sys.argv[2] == "stuck" else 8.0)
raytower.cli.find_reference = lambda reference: job
raytower.cli.load_config = lambda *arguments: None
raytower.cli.read_arguments = lambda *arguments: raytower.cli.arguments.Arguments()
sys.exit(raytower.cli.run_command("mine", []))
"""


def end_by(
    signals: list[int], folder: Path, manner: str = "", job_code: str = JOB
) -> tuple[int, str, str, float]:
    """Start a job that sleeps, send `signals` one after the other: exit code, stdout, stderr, seconds."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "platform")}
    command = [sys.executable, "-c", job_code, str(folder), manner]
    job = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert job.stdout is not None
        assert job.stdout.readline() == "working\n"
        started = time.monotonic()
        for number in signals:
            job.send_signal(number)
            time.sleep(0.1)
        out, error = job.communicate(timeout=20)
        return job.returncode, out, error, time.monotonic() - started
    finally:
        job.kill()


@pytest.mark.parametrize(
    ("signals", "code", "message"),
    [
        ([signal.SIGTERM], 143, "raytower: ended by SIGTERM\n"),
        ([signal.SIGINT], 130, "raytower: interrupted\n"),
        ([signal.SIGTERM, signal.SIGTERM], 143, "raytower: ended by SIGTERM\n"),
        ([signal.SIGINT, signal.SIGTERM], 130, "raytower: interrupted\n"),
    ],
)
def test_a_signal_ends_a_job_in_order(signals: list[int], code: int, message: str, tmp_path: Path) -> None:
    assert end_by(signals, tmp_path)[:3] == (code, "put in order\n", message)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("manner", ["interrupted", "failed"])
def test_a_signal_in_the_midst_of_a_call_into_ray_keeps_its_code(manner: str, tmp_path: Path) -> None:
    """A call into Ray makes another exception of the one that the signal raised, or fails for its dead processes."""
    expected = (143, "put in order\n", "raytower: ended by SIGTERM\n")
    assert end_by([signal.SIGTERM], tmp_path, manner)[:3] == expected


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_what_does_not_end_in_order_is_ended(number: int, code: int, tmp_path: Path) -> None:
    found, out, _, seconds = end_by([number], tmp_path, "stuck")
    assert (found, out) == (code, "put in order\n")
    assert seconds < 10
    assert list(tmp_path.iterdir()) == []


AT_EXIT = """
import sys, tempfile, time
from pathlib import Path
import raytower.ending

def shut_down():
    print("working", flush=True)
    time.sleep(0.5 if sys.argv[2] == "" else 60)
    print("put in order", flush=True)

with raytower.ending.bounded_ending():
    raytower.ending.remove_at_end(Path(tempfile.mkdtemp(dir=sys.argv[1])))
    raytower.ending.call_at_end(shut_down, 1.0)
"""


@pytest.mark.parametrize(("manner", "code", "message"), [("", 0, "put in order\n"), ("stuck", 143, "")])
def test_a_signal_while_the_process_ends_anyway(manner: str, code: int, message: str, tmp_path: Path) -> None:
    assert end_by([signal.SIGTERM], tmp_path, manner, AT_EXIT)[:2] == (code, message)
    assert list(tmp_path.iterdir()) == []


def test_handlers_are_put_back(capsys: pytest.CaptureFixture[str]) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert run_command("search", ["--index", "/no/such", "--query", "x"]) == 2
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_an_argument_that_is_not_utf8_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    pasted = "你好".encode("gbk").decode("utf-8", "surrogateescape")
    assert run_command("search", ["--index", "/no/such", "--query", pasted]) == 2
    assert "is not valid UTF-8" in capsys.readouterr().err


def test_an_argument_in_utf8_is_understood_in_any_locale(capsys: pytest.CaptureFixture[str]) -> None:
    """Where the locale is C, Python hands each byte of `/没有` over as a lone surrogate."""
    undecoded = "/没有".encode().decode("ascii", "surrogateescape")
    assert run_command("search", ["--index", undecoded, "--query", "x"]) == 2
    assert "/没有" in capsys.readouterr().err


def test_folders_of_processes_that_are_gone_are_removed_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ending, "_folders", [(0, tmp_path)])  # nothing at this process's own end
    gone = subprocess.Popen(["true"])
    gone.wait()

    def made(name: str, **changed: object) -> Path:
        folder = tmp_path / name
        (folder / "ray").mkdir(parents=True)
        ending.remove_at_end(folder)
        owner = json.loads((folder / "owner.json").read_text())
        (folder / "owner.json").write_text(json.dumps({**owner, **changed}))
        return folder

    left = [made("rtray-gone", pid=gone.pid), made("rtray-reused", started=0.0)]
    kept = [
        made("rtray-alive"),
        made("other-gone", pid=gone.pid),
        made("rtray-elsewhere", pid=gone.pid, node="another machine"),
        made("rtray-contained", pid=gone.pid, namespace="pid:[1]"),
    ]
    kept.append(tmp_path / "rtray-unowned")
    kept[-1].mkdir()
    kept.append(tmp_path / "rtray-odd")
    kept[-1].mkdir()
    (kept[-1] / "owner.json").write_text("[1]")
    aim = made("aim", pid=gone.pid)
    kept += [aim, tmp_path / "rtray-link"]
    kept[-1].symlink_to(aim)
    ending.remove_left_behind(tmp_path, "rtray-")
    assert [folder for folder in left if folder.exists()] == []
    assert [folder for folder in kept if not folder.exists()] == []
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    others = made("rtray-of-somebody", pid=gone.pid)
    ending.remove_left_behind(tmp_path, "rtray-")
    assert others.exists()
