"""The command line and the jobs as a user starts them, bad inputs included, and one real job submission."""

from __future__ import annotations

import json
import os
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

import pytest

from raytower.cli import main

ROOT = Path(__file__).resolve().parents[2]


def run_cli(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "platform")}
    command = [sys.executable, "-m", "raytower.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd, timeout=300)


class TestCommandLine:
    def test_help_lists_every_command(self) -> None:
        from raytower.cli import COMMANDS

        done = run_cli("--help")
        assert done.returncode == 0
        assert all(f"raytower {name}" in done.stdout for name in COMMANDS)

    def test_help_of_a_command_lists_its_keys(self) -> None:
        done = run_cli("encode", "--help")
        assert done.returncode == 0
        assert "--dtype float32|" in done.stdout
        assert "--encoder TEXT  (required)" in done.stdout

    @pytest.mark.processes
    def test_dry_run_prints_config_and_plan_and_writes_nothing(
        self, dummy_encoder_dir: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "corpus.txt").write_text("a\nb\nc\n")
        arguments = ("--encoder", str(dummy_encoder_dir), "--input.path", str(tmp_path / "corpus.txt"))
        done = run_cli(
            "encode", *arguments, "--output", str(tmp_path / "out"), "--max_length", "64", "--dry-run"
        )
        assert done.returncode == 0, done.stderr
        assert "tokens_per_batch: null" in done.stdout
        assert json.loads(done.stdout.splitlines()[-1])["plan"]["rows"] == 3
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("encode", "--config", "nothing.yaml"), "cannot be read"),
            (("encode", "--encodr", "x"), "nearest known key is 'encoder'"),
            (("encode",), "is required and not given"),
            (("encode", "--encoder", "/no/such", "--input.path", "x", "--output", "y"), "does not exist"),
            (("search", "--index", "/no/such", "--query", "x"), "/no/such"),
            (("search", "--index", "/no/such", "--query", "x", "--k", "0"), "k"),
        ],
    )
    def test_bad_input_is_code_2_and_one_message(
        self,
        arguments: tuple[str, ...],
        message: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert main(arguments) == 2
        out, err = capfd.readouterr()
        assert message in err
        assert "Traceback" not in err
        assert out == ""

    def test_the_code_is_the_process_s_exit_code(self, tmp_path: Path) -> None:
        done = run_cli("enode", cwd=tmp_path)
        assert done.returncode == 2
        assert "no command 'enode'" in done.stderr
        assert "Traceback" not in done.stderr
        assert done.stdout == ""

    @pytest.mark.parametrize(
        ("content", "message"),
        [(None, "corpus.txt"), (b"", "empty"), (b"fine\n\xff\xfe\n", "UTF-8"), (b"a\tb\tc\n", "column")],
        ids=["missing", "empty", "not UTF-8", "columns"],
    )
    def test_bad_corpora(
        self,
        dummy_encoder_dir: Path,
        tmp_path: Path,
        content: bytes | None,
        message: str,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        path = tmp_path / "corpus.txt"
        if content is not None:
            path = path.with_suffix(".tsv") if b"\t" in content else path
            path.write_bytes(content)
        arguments = ["--encoder", str(dummy_encoder_dir), "--input.path", str(path), "--max_length", "64"]
        capfd.readouterr()  # of what made the model
        assert main(["encode", *arguments, "--output", str(tmp_path / "out"), "--dry-run"]) == 2
        _, err = capfd.readouterr()
        assert message in err
        assert "Traceback" not in err


def wait_until_ok(url: str, process: subprocess.Popen[bytes], log: Path, timeout_s: float = 120) -> None:
    """Until `url` answers 200. Fails when `process` has ended or the time is over."""
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


@pytest.fixture
def local_cluster(tmp_path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """A head node of its own, ended by its process id; yields the dashboard's address and the environment."""
    # Short, because the names of Ray's sockets lie below it and may have 107 bytes at most.
    session = tempfile.mkdtemp(prefix="rt")
    ports = []
    for _ in range(4):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(free.getsockname()[1])
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "HF_HUB_OFFLINE": "1"}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus=4"]
    command += ["--node-ip-address=127.0.0.1", f"--port={ports[0]}", f"--dashboard-port={ports[1]}"]
    command += [
        f"--ray-client-server-port={ports[2]}",
        "--include-dashboard=true",
        f"--temp-dir={session}",
        # The default port may belong to the agent of the suite's own Ray; without one no job is ever accepted.
        f"--dashboard-agent-listen-port={ports[3]}",
    ]
    with open(tmp_path / "head.log", "wb") as log:
        head = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    address = f"http://127.0.0.1:{ports[1]}"
    try:
        # The dashboard takes jobs once the node's agent, which starts later, answers too.
        for url in (f"{address}/api/version", f"http://127.0.0.1:{ports[3]}/api/local_raylet_healthz"):
            wait_until_ok(url, head, tmp_path / "head.log")
        yield address, environment
    finally:
        if head.poll() is None:
            head.send_signal(signal.SIGTERM)
            try:
                # A head drains for up to half a minute; nothing here needs that.
                head.wait(timeout=3)
            except subprocess.TimeoutExpired:
                os.killpg(head.pid, signal.SIGKILL)
        shutil.rmtree(session, ignore_errors=True)


@pytest.mark.processes
def test_a_job_runs_by_ray_job_submit(
    local_cluster: tuple[str, dict[str, str]], dummy_encoder_dir: Path, tmp_path: Path
) -> None:
    address, environment = local_cluster
    (tmp_path / "corpus.txt").write_text("first text\nsecond text\n", encoding="utf-8")
    runtime = {
        "env_vars": {"PYTHONPATH": "platform"},
        "excludes": [".git", ".venv", "tests", "benchmarks", "docs"],
    }
    command = [str(Path(sys.executable).with_name("ray")), "job", "submit", "--address", address]
    command += ["--working-dir", str(ROOT), "--runtime-env-json", json.dumps(runtime), "--"]
    command += ["python", "jobs/encode_corpus.py", "--encoder", str(dummy_encoder_dir), "--max_length", "64"]
    command += ["--input.path", str(tmp_path / "corpus.txt"), "--output", str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["rows"] == 2
    assert '"rows": 2' in done.stdout
