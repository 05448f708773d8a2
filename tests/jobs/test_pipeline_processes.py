"""Steps side by side, each in a process of its own: `pairs`, which needs neither Ray nor torch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from raytower.adapt.config import PairsConfig
from raytower.config import make_config
from raytower.errors import InputError, OtherOutputError, RaytowerError
from raytower.pipeline.apart import Processes
from raytower.pipeline.config import PipelineConfig
from raytower.pipeline.job import pipeline_status, run_pipeline
from tests.support.processes import ROOT, wait_for

pytestmark = pytest.mark.processes
BAD_ROW = "this is no JSON\n"


def write_corpus(path: Path, rows: int) -> None:
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]
    with open(path, "w", encoding="utf-8") as file:
        for n in range(rows):
            text = " ".join(words[(n + shift) % len(words)] for shift in range(8))
            file.write(
                json.dumps({"id": f"d{n}", "title": f"heading number {n}", "text": f"{text} {n}"}) + "\n"
            )


def step(folder: Path, source: str, output: str, **more: Any) -> dict[str, Any]:
    config = {"input": str(folder / source), "output": str(folder / output), "rules": ["title"], **more}
    return {"job": "pairs", "config": config}


def pipeline(folder: Path, steps: list[dict[str, Any]]) -> PipelineConfig:
    values = {"state": str(folder / "state.json"), "steps": steps, "parallel": 2}
    return make_config(PipelineConfig, values)


def test_independent_steps_run_at_once_and_what_reads_both_waits(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        write_corpus(tmp_path / f"{name}.jsonl", 200)
    apart = {"apart_from": str(tmp_path / "b.tsv")}
    steps = [
        step(tmp_path, "a.jsonl", "a.tsv"),
        step(tmp_path, "b.jsonl", "b.tsv", part="dev", dev_share=0.5),
    ]
    config = pipeline(tmp_path, [*steps, step(tmp_path, "a.jsonl", "both.tsv", **apart)])
    done = run_pipeline(config)["steps"]
    assert [each["skipped"] for each in done] == [False] * 3
    assert done[0]["output"] == str(tmp_path / "a.tsv")
    assert done[2]["left_out"]["in_dev"] > 0, "the third has read what the second wrote"
    shown = capfd.readouterr().err
    begun = [shown.index(f"step {number}/3 pairs: running") for number in (1, 2, 3)]
    first_ends = min(shown.index(f"step {number}/3 pairs: read") for number in (1, 2))
    assert begun[0] < begun[1] < first_ends < begun[2]
    alone = run_pipeline(config.model_copy(update={"parallel": 1}))["steps"]
    assert [each["skipped"] for each in alone] == [True] * 3, "in how many processes changes no result"


def test_a_branch_that_fails_lets_the_other_end_and_gives_its_exit_code(tmp_path: Path) -> None:
    write_corpus(tmp_path / "a.jsonl", 200)
    (tmp_path / "bad.jsonl").write_text(json.dumps({"id": "1", "title": "t", "text": "u"}) + "\n" + BAD_ROW)
    steps = [
        step(tmp_path, "bad.jsonl", "bad.tsv"),
        step(tmp_path, "a.jsonl", "dev.tsv", part="dev", dev_share=0.5),
        step(tmp_path, "a.jsonl", "train.tsv", apart_from=str(tmp_path / "dev.tsv")),
        step(tmp_path, "a.jsonl", "never.tsv", apart_from=str(tmp_path / "bad.tsv")),
    ]
    config = pipeline(tmp_path, steps)
    (tmp_path / "pipeline.json").write_text(config.model_dump_json())
    ended = command(tmp_path)
    said = ended.communicate(timeout=400)[1]
    assert ended.returncode == 2, said
    assert "step 1/4 pairs: " in said.splitlines()[-1]
    assert "bad.jsonl" in said.splitlines()[-1]
    stands = pipeline_status(config)["steps"]
    assert [each["state"] for each in stands] == ["missing", "finished", "finished", "missing"]
    assert "it failed" in stands[0]["why"]
    write_corpus(tmp_path / "bad.jsonl", 20)
    ran = [not each["skipped"] for each in run_pipeline(config)["steps"]]
    assert ran == [True, False, False, True]


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGTERM])
def test_a_kill_ends_the_steps_too_and_the_next_run_goes_on(tmp_path: Path, kind: signal.Signals) -> None:
    write_corpus(tmp_path / "a.jsonl", 20)
    write_corpus(tmp_path / "large.jsonl", 60_000)
    config = pipeline(
        tmp_path, [step(tmp_path, "a.jsonl", "a.tsv"), step(tmp_path, "large.jsonl", "large.tsv")]
    )
    (tmp_path / "pipeline.json").write_text(config.model_dump_json())
    running = command(tmp_path)

    def stands() -> list[str]:
        return [each["state"] for each in pipeline_status(config)["steps"]]

    wait_for(lambda: stands() == ["finished", "running"], "the end of the first step alone")
    children = psutil.Process(running.pid).children(recursive=True)
    assert children
    running.send_signal(kind)
    said = running.communicate(timeout=200)[1]
    assert running.returncode == (-kind if kind == signal.SIGKILL else 128 + kind), said
    assert psutil.wait_procs(children, timeout=60)[1] == [], "a step outlives its pipeline"
    assert stands() == ["finished", "missing"]
    assert not (tmp_path / "large.tsv").exists()
    assert [each["skipped"] for each in run_pipeline(config)["steps"]] == [True, False]


def command(folder: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "platform")}
    arguments = ["pipeline", "--config", str(folder / "pipeline.json")]
    return subprocess.Popen(
        [sys.executable, "-m", "raytower.cli", *arguments],
        env=environment,
        cwd=folder,
        text=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


class TestProcesses:
    """How a process's end comes back. In place of the job's module another program is run."""

    def config(self, folder: Path) -> PairsConfig:
        return make_config(PairsConfig, step(folder, "a.jsonl", "a.tsv")["config"])

    def test_an_error_keeps_its_kind(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"^step 1: no file or folder at .*a\.jsonl"):
            Processes().run("pairs", self.config(tmp_path), "step 1")

    @pytest.mark.parametrize(
        ("program", "kind", "message"),
        [
            ("os.kill(os.getpid(), 9)", RaytowerError, "signal 9, perhaps for want of memory"),
            ("sys.exit(3)", RaytowerError, "ended with exit code 3"),
            (
                'open(sys.argv[2], "w").write(\'{"error": "of another", "kind": "other_output"}\'); sys.exit(2)',
                OtherOutputError,
                "^step 1: of another$",
            ),
        ],
    )
    def test_how_a_process_ended(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        program: str,
        kind: type[Exception],
        message: str,
    ) -> None:
        self.use(program, tmp_path, monkeypatch)
        with pytest.raises(kind, match=message):
            Processes().run("pairs", self.config(tmp_path), "step 1")

    def test_one_that_holds_its_output_open_after_its_end_is_not_waited_for(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As a Ray that a killed step has left behind."""
        monkeypatch.setattr("raytower.pipeline.apart._LATE_SECONDS", 0.5)
        self.use('subprocess.Popen(["sleep", "20"]); sys.exit(3)', tmp_path, monkeypatch)
        started = time.monotonic()
        with pytest.raises(RaytowerError, match="exit code 3"):
            Processes().run("pairs", self.config(tmp_path), "step 1")
        assert time.monotonic() - started < 19

    def test_stop_ends_those_at_work_and_starts_no_more(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.use(f'open({str(tmp_path / "up")!r}, "w"); time.sleep(60)', tmp_path, monkeypatch)
        processes = Processes()
        failed: list[Exception] = []

        def run() -> None:
            try:
                processes.run("pairs", self.config(tmp_path), "step 1")
            except RaytowerError as error:
                failed.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        wait_for((tmp_path / "up").exists, "its start", 60)
        processes.stop()
        thread.join(20)
        assert "was ended by signal 15" in str(failed[0])
        with pytest.raises(RaytowerError, match="no more steps are started"):
            processes.run("pairs", self.config(tmp_path), "step 2")

    def use(self, program: str, folder: Path, patch: pytest.MonkeyPatch) -> None:
        (folder / "entry.py").write_text(f"import os, subprocess, sys, time\n{program}\n")
        patch.setattr("raytower.pipeline.apart._ENTRY", "entry")
        patch.setattr("raytower.pipeline.apart._SOURCE_ROOT", str(folder))
