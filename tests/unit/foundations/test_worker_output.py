"""What is shown of the lines that Ray's workers write, and what is kept."""

from __future__ import annotations

import stat

import pytest

from raytower.progress import MARK
from raytower.worker_output import WorkerOutput


def message(*lines: str, pid: object = 7, actor: str = "Trainer") -> dict[str, object]:
    return {"lines": list(lines), "pid": pid, "actor_name": actor, "is_err": True}


def test_our_lines_are_shown_as_they_are_and_others_kept(capsys: pytest.CaptureFixture[str]) -> None:
    output = WorkerOutput()
    output.expect()
    output.take(message(f"{MARK}step 10/12", "Reporting training result 1", f"{MARK}  a line below"))
    output.take(message("a task failed, infinite retries", pid="raylet", actor=""))
    assert capsys.readouterr().err == "step 10/12\n  a line below\n"
    kept = output.keep()
    assert kept is not None
    assert (
        kept.read_text()
        == "(Trainer 7) Reporting training result 1\n(raylet) a task failed, infinite retries\n"
    )
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    kept.unlink()


@pytest.mark.parametrize(
    ("line", "pid"),
    [("2 Workers killed due to memory pressure (OOM)", "raylet"), ("No node has a GPU", "autoscaler")],
)
def test_memory_and_missing_nodes_are_told(line: str, pid: str, capsys: pytest.CaptureFixture[str]) -> None:
    WorkerOutput().take(message(line, pid=pid, actor=""))
    assert capsys.readouterr().err == f"({pid}) {line}\n"


def test_a_server_shows_its_replicas_but_not_the_raylet(capsys: pytest.CaptureFixture[str]) -> None:
    output = WorkerOutput()
    output.show_all = True
    output.take(message("a warning", actor="ServeReplica"))
    output.take(message("graceful_shutdown failed", pid="raylet", actor=""))
    assert capsys.readouterr().err == "(ServeReplica 7) a warning\n"


@pytest.mark.parametrize("actor", ["ProxyActor", "ServeController"])
def test_tracebacks_of_serve_itself_are_kept(actor: str, capsys: pytest.CaptureFixture[str]) -> None:
    output = WorkerOutput()
    output.show_all = True
    output.expect()
    output.take(message("Task exception was never retrieved", actor=actor))
    assert capsys.readouterr().err == ""
    kept = output.keep()
    assert kept is not None
    assert kept.read_text() == f"({actor} 7) Task exception was never retrieved\n"
    kept.unlink()


def test_where_nothing_was_kept_there_is_no_file() -> None:
    output = WorkerOutput()
    output.expect()
    assert output.keep() is None


def test_a_job_without_ray_names_nothing_of_the_job_before() -> None:
    output = WorkerOutput()
    output.expect()
    output.take(message("of the job before"))
    output.begin()
    output.take(message("late"))
    assert output.keep() is None


def test_no_more_than_the_last_lines_are_kept() -> None:
    output = WorkerOutput()
    output.expect()
    output.take(message(*map(str, range(10_500))))
    kept = output.keep()
    assert kept is not None
    lines = kept.read_text().splitlines()
    kept.unlink()
    assert (len(lines), lines[0], lines[-1]) == (10_000, "(Trainer 7) 500", "(Trainer 7) 10499")


def test_lines_of_workers_have_no_colours_and_move_no_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    output = WorkerOutput()
    output.expect()
    output.take(message(f"{MARK}a\x1b[31mb\rc", "\x1b[36mkept\x1b[0m\x07\u202e"))
    output.take(message("\x1b[33mmemory\x9b", pid="raylet", actor=""))
    assert capsys.readouterr().err == "ab\\rc\n(raylet) memory\\x9b\n"
    kept = output.keep()
    assert kept is not None
    assert kept.read_text() == "(Trainer 7) kept\\x07\\u202e\n"
    kept.unlink()
