"""The warm interpreter's processes are what fresh ones are to those who start them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes import clean_environment
from tests.support.warm import Popen, in_two_processes

pytestmark = pytest.mark.processes

SEEN = (
    "import json, os, sys; print(json.dumps([sys.argv, os.environ['SEEN'], os.getcwd(), sys.stdin.read()]))"
)


def started(code: str, *arguments: str, folder: Path, **environment: str) -> Popen:
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    command = [sys.executable, "-c", code, *arguments]
    return Popen(command, env=clean_environment(**environment), cwd=folder, text=True, **pipes)


def test_arguments_environment_folder_and_pipes(tmp_path: Path) -> None:
    process = started(SEEN, "a b", "ü", folder=tmp_path, SEEN="x\ny")
    out, err = process.communicate("given", timeout=60)
    assert (process.returncode, err) == (0, "")
    assert out.strip() == f'[["-c", "a b", "\\u00fc"], "x\\ny", "{tmp_path}", "given"]'


@pytest.mark.parametrize(
    ("code", "status", "told"),
    [
        ("raise SystemExit(3)", 3, ""),
        ("raise SystemExit('no')", 1, "no\n"),
        ("import atexit; atexit.register(print, 'end', flush=True); 1 / 0", 1, "ZeroDivisionError"),
        ("import os; os.abort()", -signal.SIGABRT, ""),
    ],
)
def test_ends(code: str, status: int, told: str, tmp_path: Path) -> None:
    process = started(code, folder=tmp_path)
    out, err = process.communicate(timeout=60)
    assert process.returncode == status
    assert told in err
    assert out == ("end\n" if "atexit" in code else "")


def test_one_that_runs_is_known_to_run_and_dies_of_a_signal(tmp_path: Path) -> None:
    process = started("import time; print('on', flush=True); time.sleep(600)", folder=tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline() == "on\n"
    assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.05)
    assert os.getsid(process.pid) == process.pid
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == -signal.SIGTERM == process.poll()


def test_torch_is_there_already_and_ray_and_raytower_are_not(tmp_path: Path) -> None:
    code = "import sys; print([name in sys.modules for name in ('torch', 'ray', 'raytower')])"
    assert started(code, folder=tmp_path).communicate(timeout=60)[0] == "[True, False, False]\n"


def test_what_was_read_at_import_is_read_again_where_it_differs(tmp_path: Path) -> None:
    code = "import sys; print('torch' in sys.modules)"
    assert started(code, folder=tmp_path, HF_ENDPOINT="http://x").communicate(timeout=60)[0] == "False\n"


def fail(rank: int, worst: int) -> None:
    if rank == worst:
        raise ValueError(f"of rank {rank}")


def test_two_processes_end_well_or_say_why() -> None:
    in_two_processes(fail, 2)
    with pytest.raises(AssertionError, match="ValueError: of rank 1"):
        in_two_processes(fail, 1)
