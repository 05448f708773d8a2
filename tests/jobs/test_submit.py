"""`raytower submit` against a head and a worker of this machine that ask for a token: submit, fail, stop, go on."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raytower.cluster.dashboard import Dashboard, Token, refuse_second_job
from raytower.cluster.upload import Upload, entrypoint, pack, plan_upload, runtime_environment
from raytower.errors import InputError
from tests.jobs.test_cluster import Cluster, clean_environment, started_node
from tests.support.processes import ROOT, free_port, wait_for

pytestmark = pytest.mark.processes

SECRET = "a value that nobody is to see"
# As many as stopping in the midst of them takes on a quick machine.
ROWS, ROWS_PER_FILE = 20_000, 500


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head without CPUs and a worker with 16, started as cluster.yaml says."""
    folder = Path(tempfile.mkdtemp(prefix="rt"))
    home = folder / "user"
    gcs_port, dashboard_port = free_port(), free_port()
    options = (
        f"--temp-dir={folder}/s --dashboard-port={dashboard_port} --ray-client-server-port={free_port()}"
    )
    try:
        subprocess.run(
            [sys.executable, "-m", "raytower.cli", "cluster", "init"],
            env=clean_environment(home, PYTHONPATH=str(ROOT / "platform")),
            check=True,
            timeout=120,
        )
        with (
            started_node("head", home, folder, gcs_port, options),
            started_node("cpu_worker", home, folder, gcs_port, ""),
        ):
            yield Cluster(f"http://127.0.0.1:{dashboard_port}", folder / "s", home)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def command(cluster: Cluster, *given: str) -> list[str]:
    return [sys.executable, "-m", "raytower.cli", "submit", *given, "--address", cluster.dashboard]


def by_ray(cluster: Cluster, environment: dict[str, Any]) -> list[str]:
    """What stands before the command of a job that Ray's own command submits."""
    address = ["--address", cluster.dashboard]
    return ["ray", "job", "submit", *address, "--runtime-env-json", json.dumps(environment), "--"]


def run(cluster: Cluster, *given: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return cluster.run(command(cluster, *given), cwd=cwd, PYTHONPATH=str(ROOT / "platform"), **environment)


def result(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def jobs(cluster: Cluster) -> list[dict[str, Any]]:
    """The cluster's jobs as Ray itself tells them to whoever has the token."""
    from urllib.request import Request, urlopen

    token = (cluster.user_home / ".ray" / "auth_token").read_text()
    request = Request(f"{cluster.dashboard}/api/jobs/", headers={"Authorization": f"Bearer {token}"})
    found: list[dict[str, Any]] = json.loads(urlopen(request, timeout=30).read())
    return found


def submitted_jobs(cluster: Cluster) -> set[str]:
    """Without the small job that asks the head what it has."""
    return {job["submission_id"] for job in jobs(cluster) if "raytower" in (job["metadata"] or {})}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("corpus") / "few.tsv"
    file.write_text("".join(f"id{number}\ttext number {number}\n" for number in range(40)), encoding="utf-8")
    return file


def test_encode_then_build_an_index(
    cluster: Cluster, corpus: Path, dummy_encoder_dir: Path, tmp_path: Path
) -> None:
    """The config lies outside the checkout, and so does the folder in which the command is run."""
    config = tmp_path / "my encode.yaml"
    config.write_text(json.dumps({"encoder": str(dummy_encoder_dir), "input": {"path": str(corpus)}}))
    shared = [
        "--shared",
        str(tmp_path),
        "--shared",
        str(corpus.parent),
        "--shared",
        str(dummy_encoder_dir.parent),
    ]
    output = ["--output", f"{tmp_path}/embeddings", "--workers.num", "1", "--workers.num_cpus", "4"]
    done = run(cluster, "encode", "--config", str(config), *output, *shared, cwd=tmp_path)
    found = result(done)
    assert (found["job"], found["status"]) == ("encode", "SUCCEEDED")
    assert found["result"]["rows"] == 40
    assert 0 < found["upload_bytes"] < 2**20
    assert 0 < found["seconds_to_start"] < found["seconds"]
    assert "running" not in done.stdout, "the log goes to stderr"
    print(
        f"upload {found['upload_bytes']:,} bytes, first line of the log after {found['seconds_to_start']} s"
    )

    given = ["--embeddings", f"{tmp_path}/embeddings", "--output", f"{tmp_path}/index"]
    detached = result(run(cluster, "index", "build", *given, *shared, "--detach", cwd=tmp_path))
    assert detached["status"] == "PENDING"
    followed = result(run(cluster, "--follow", detached["id"], cwd=tmp_path))
    assert followed["result"]["rows"] == 40
    assert (tmp_path / "index" / "versions").is_dir()

    (job,) = [job for job in jobs(cluster) if job["submission_id"] == detached["id"]]
    assert job["metadata"]["raytower"] == "index build"
    assert job["metadata"]["raytower_output"] == f"{tmp_path}/index"
    uploads = cluster.session.glob("session_latest/runtime_resources/working_dir_files/_ray_pkg_*/")
    listed = [set(os.listdir(upload)) for upload in uploads]
    # Of two jobs; the second had no config file.
    assert sorted(".submitted" in names for names in listed) == [False, True]
    for names in listed:
        assert {"platform", "jobs"} <= names
        assert {"data", "runs", "tests", "docs", "benchmarks"}.isdisjoint(names)


def test_a_job_that_fails_ends_with_its_own_exit_code(
    cluster: Cluster, dummy_encoder_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "bad.jsonl").write_text('{"id": "1", "text": "one"}\nno JSON\n', encoding="utf-8")
    given = [
        "--encoder",
        str(dummy_encoder_dir),
        "--input",
        f"{tmp_path}/bad.jsonl",
        "--output",
        f"{tmp_path}/e",
    ]
    shared = ["--shared", str(tmp_path), "--shared", str(dummy_encoder_dir.parent)]
    done = run(
        cluster, "encode", *given, *shared, "--workers.num", "1", "--workers.num_cpus", "4", cwd=tmp_path
    )
    assert done.returncode == 2, done.stderr
    assert re.search(r"raytower: job encode-\w+ failed with exit code 2; its log is above", done.stderr)
    assert "bad.jsonl:2: " in done.stderr


@pytest.mark.slow  # half a minute, where nothing else runs
def test_a_pipeline_leaves_room_for_workers_that_fit_themselves_to_the_machine(
    cluster: Cluster, dummy_encoder_dir: Path, tmp_path: Path
) -> None:
    """Its own process held half of the node, and a training waited for more than was left, for ever."""
    (tmp_path / "train.tsv").write_text(
        "".join(f"text {n}\tkind {n % 2}\n" for n in range(32)), encoding="utf-8"
    )
    training = {
        "model": str(dummy_encoder_dir),
        "train": {"path": f"{tmp_path}/train.tsv"},
        "output": f"{tmp_path}/classifier",
        "batch_size": 8,
        "max_length": 16,
    }
    pipeline = {
        "state": f"{tmp_path}/state.json",
        "steps": [{"job": "train-classifier", "config": training}],
    }
    (tmp_path / "pipeline.json").write_text(json.dumps(pipeline), encoding="utf-8")
    shared = ["--shared", str(tmp_path), "--shared", str(dummy_encoder_dir.parent)]
    done = run(cluster, "pipeline", "--config", f"{tmp_path}/pipeline.json", *shared, cwd=tmp_path)
    assert result(done)["result"]["steps"][0]["skipped"] is False
    said = re.search(r"workers: 1, each with (\d+) CPUs", done.stderr)
    assert said is not None, done.stderr
    assert int(said[1]) > 2
    assert (tmp_path / "classifier" / "model.safetensors").is_file()


@pytest.mark.slow  # minutes, where the cluster shares two cores with other tests
def test_a_job_that_was_stopped_goes_on_when_it_is_submitted_again(
    cluster: Cluster, dummy_encoder_dir: Path, tmp_path: Path
) -> None:
    corpus = tmp_path / "many.tsv"
    corpus.write_text(
        "".join(f"id{number}\ttext number {number}\n" for number in range(ROWS)), encoding="utf-8"
    )
    output = tmp_path / "embeddings"
    given = ["encode", "--encoder", str(dummy_encoder_dir), "--input", str(corpus), "--output", str(output)]
    given += ["--rows_per_file", str(ROWS_PER_FILE), "--workers.num", "1", "--workers.num_cpus", "4"]
    given += ["--shared", str(tmp_path), "--shared", str(dummy_encoder_dir.parent)]
    environment = clean_environment(cluster.user_home, PYTHONPATH=str(ROOT / "platform"))
    log = tmp_path / "log"
    with log.open("w") as errors:
        submitted = subprocess.Popen(
            command(cluster, *given), env=environment, cwd=tmp_path, stdin=subprocess.DEVNULL, stderr=errors
        )
        wait_for(
            lambda: submitted.poll() is not None or len(list(output.glob("*.parquet"))) > 2, "encoding", 280
        )
        assert submitted.poll() is None, log.read_text()
        token = Token(value=(cluster.user_home / ".ray" / "auth_token").read_text(), source="its file")
        running = Dashboard(address=cluster.dashboard, token=token).running_jobs()
        with pytest.raises(InputError, match=r"is being written by job encode-\w+ \(encode\)"):
            refuse_second_job(str(output), running, cluster.dashboard)
        submitted.send_signal(signal.SIGINT)
        assert submitted.wait(timeout=120) == 130, log.read_text()
    assert "raytower: interrupted" in log.read_text()
    kept = len(list(output.glob("*.parquet")))
    assert 2 < kept < ROWS // ROWS_PER_FILE

    again = run(cluster, *given, cwd=tmp_path)
    found = result(again)
    assert found["result"]["rows"] == ROWS
    assert found["result"]["files_encoded"] <= ROWS // ROWS_PER_FILE - kept + 1
    assert re.search(r"\d+ of 40 files are finished already", again.stderr)


@pytest.mark.parametrize(
    ("given", "environment", "message"),
    [
        ((), {}, "encoder is '/m/encoder', a path of one machine, and the job's processes may lie on 2"),
        (
            ("--shared", "/m", "--workers.num_gpus", "1", "--workers.num", "1"),
            {},
            "workers asks for 1 GPU in one process; the cluster has",
        ),
        ((), {"RAY_AUTH_MODE": "disabled"}, "asks for a token, and there is none here"),
        ((), {"RAY_AUTH_TOKEN": "0" * 64}, "refuses the token of RAY_AUTH_TOKEN"),
    ],
    ids=["paths", "resources", "no token", "another token"],
)
def test_what_cannot_run_is_refused(
    given: tuple[str, ...], environment: dict[str, str], message: str, cluster: Cluster, tmp_path: Path
) -> None:
    before = submitted_jobs(cluster)
    named = ["--encoder", "/m/encoder", "--input", "/m/corpus.tsv", "--output", "/m/embeddings"]
    done = run(cluster, "encode", *named, *given, cwd=tmp_path, **environment)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert submitted_jobs(cluster) == before


IN_BOTH = """
import os, ray
from raytower.runtime import ensure_ray
ensure_ray()
asked = ray.get(ray.remote(lambda: os.environ.get("A_SECRET")).remote())
print("driver", os.environ.get("A_SECRET") == {value!r}[::-1], "task", asked == {value!r}[::-1])
"""


def test_variables_reach_driver_and_tasks_and_are_shown_nowhere(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job of its own, by the very upload and environment of `submit`: it says what it was given, backwards."""
    script = tmp_path / "both.py"
    script.write_text(IN_BOTH.format(value=SECRET[::-1]))
    whole = plan_upload(None, 2**26)
    upload = Upload(root=whole.root, files={**whole.files, "both.py": script}, config_file=None)
    pack(upload, {"A_SECRET": SECRET}, tmp_path / "upload.tar.xz")
    environment = runtime_environment(tmp_path / "upload.tar.xz", True, 0)
    done = cluster.run(
        [*by_ray(cluster, environment), *entrypoint("encode", upload, [], True)[:3], "both.py"], cwd=tmp_path
    )
    assert "driver True task True" in done.stdout, done.stdout + done.stderr
    assert SECRET not in done.stdout + done.stderr + json.dumps(jobs(cluster))
    logs = list(cluster.session.glob("session_latest/logs/**/*"))
    assert len(logs) > 10
    assert not [file for file in logs if file.is_file() and SECRET.encode() in file.read_bytes()]
    files = list(
        cluster.session.glob(
            "session_latest/runtime_resources/working_dir_files/*/.submitted/environment.json"
        )
    )
    assert len(files) == 1
    assert files[0].stat().st_mode & 0o777 == 0o600


SHARED = """
import os, sys, ray
from raytower.errors import InputError
from raytower.runtime import ensure_ray
from raytower.shared_storage import check_shared
from raytower.storage import Location
ensure_ray()
check_shared(Location.of(sys.argv[1]))
print("shared:", os.listdir(sys.argv[1]))
try:
    check_shared(Location.of("/proc/self/cwd/own"))  # of each process another folder
except InputError as error:
    print("refused:", error)
"""


def test_every_node_is_asked_whether_it_sees_the_output(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "check.py").write_text(SHARED)
    environment = {"env_vars": {"PYTHONPATH": str(ROOT / "platform")}}
    entry = f"cd {tmp_path} && python check.py {tmp_path}/output"
    done = cluster.run([*by_ray(cluster, environment), "bash", "-c", entry], cwd=tmp_path)
    assert "shared: []" in done.stdout, done.stdout + done.stderr
    assert re.search(
        r"refused: output '/proc/self/cwd/own' is not shared: node \S+ does not find", done.stdout
    )
