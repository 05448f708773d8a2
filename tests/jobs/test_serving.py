"""The server under Ray Serve, over HTTP: layouts, swaps under load, killed replicas, neighbours. Loopback only."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray import serve

from raytower.errors import InputError, RaytowerError
from raytower.models.encoder import Encoder
from raytower.models.forward import ForwardEngine
from raytower.serving import deploy
from raytower.serving.config import ServeConfig
from tests.support.asking import TwoClients
from tests.support.metric_names import series
from tests.support.processes import clean_environment, free_port, wait_for
from tests.support.served_index import TEXTS, write_version

Start = Callable[..., deploy.Server]
SOON = 20_000
OLD, NEW = "000001", "000002"
QUERIES = ["moon 3", "大地 1"]


@pytest.fixture(scope="module")
def index_dir(tmp_path_factory: pytest.TempPathFactory, dummy_encoder_dir: Path) -> Path:
    """Two versions; the newest is served unless another is named."""
    folder = tmp_path_factory.mktemp("served") / "index"
    write_version(folder, OLD, dummy_encoder_dir)
    write_version(folder, NEW, dummy_encoder_dir)
    return folder


@pytest.fixture
def served(ray_cluster: None) -> Iterator[Start]:
    """Starts servers on a free port; stopped after the test."""
    servers: list[deploy.Server] = []

    def start(**values: Any) -> deploy.Server:
        config = {"port": 0, "timeout_ms": SOON, "num_cpus": 0.2, "drain_s": 0.2}
        config |= {"start_timeout_s": 600, "end_s": 120, **values}  # where other tests keep the machine busy
        servers.append(deploy.start(ServeConfig(**config)))
        return servers[-1]

    yield start
    for server in reversed(servers):
        deploy.stop(server)


def ask(url: str, path: str = "/v1/search", **body: Any) -> tuple[int, Any]:
    request = urllib.request.Request(
        url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def ids(answer: dict[str, Any]) -> list[list[str]]:
    return [[hit["id"] for hit in hits] for hits in answer["results"]]


class Load(TwoClients):
    """Two clients that ask without a pause and keep every answer, until the block ends; 429 and 503 are asked again."""

    def __init__(self, url: str, **body: Any) -> None:
        super().__init__()
        self.url = url
        self.body = {"queries": QUERIES, "k": 50, "timeout_ms": SOON, **body}
        self.answers: list[tuple[int, Any]] = []
        self.retried = 0

    def _ask(self) -> None:
        while not self._stop.is_set():
            status, answer = ask(self.url, **self.body)
            for _ in range(20):
                if status not in (429, 503) or self._stop.is_set():
                    break
                self.retried += 1
                time.sleep(0.5)
                status, answer = ask(self.url, **self.body)
            self.answers.append((status, answer))
            time.sleep(0.01)


def check_answers(load: Load, expected: dict[str, list[list[str]]]) -> None:
    """Every answer is that of one version, whole and right."""
    assert load.answers
    assert {status for status, _ in load.answers} == {200}
    for _, answer in load.answers:
        assert not answer["partial"]
        assert ids(answer) == expected[answer["index_version"]]


def replicas(server: deploy.Server, deployment: str) -> dict[str, int]:
    """Names of a deployment's replicas, and their processes."""
    prefix = f"SERVE_REPLICA::{server.name}#{deployment}#"
    named = ray.util.list_named_actors(all_namespaces=True)
    found = [item for item in named if item["name"].startswith(prefix)]
    pids = {}
    for item in found:
        # One that was killed keeps its name for a moment.
        with suppress(ray.exceptions.RayActorError, ValueError):
            actor = ray.get_actor(item["name"], namespace=item["namespace"])
            pids[item["name"]] = ray.get(actor.__ray_call__.remote(lambda self: os.getpid()))
    return pids


def counted(url: str, name: str) -> set[str]:
    """The replicas of which /metrics has a series."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as reply:
        found = series(reply.read())
    return {dict(labels)["replica"] for series_name, labels in found if series_name == name}


def test_together_swaps_survives_a_kill_and_says_that_it_stops(
    served: Start, index_dir: Path, dummy_reranker_dir: Path, dummy_encoder_dir: Path
) -> None:
    server = served(index=str(index_dir), replicas=2, reranker=str(dummy_reranker_dir))
    assert ask(server.url, query="moon 3", k=3)[1]["reranked"] is True
    vectors = ForwardEngine(Encoder.load(str(dummy_encoder_dir))).encode([*TEXTS, *QUERIES])
    orders = [(-(vectors[: len(TEXTS)] @ query)).argsort(kind="stable") for query in vectors[len(TEXTS) :]]
    expected = {
        version: [[f"{version}/{row}" for row in order] for order in orders] for version in (OLD, NEW)
    }
    before = replicas(server, "search")
    assert len(before) == 2
    names = {name.rpartition("#")[2] for name in before}
    wait_for(lambda: counted(server.url, "raytower_rows") == names, "any replica answers for both", 30)
    with Load(server.url, rerank=False) as load:
        assert deploy.reload(server, {"index_version": OLD})["index_version"] == OLD
        versions = {
            next(iter(member["active"].values()))
            for member in deploy.status(server)["members"]
            if member["role"] == "search"
        }
        assert len(versions) == 1, "a reload ends when every replica serves the new generation"
        assert deploy.reload(server, {"reranker": "none"})["reranker"] is None
        assert deploy.reload(server, {"index_version": "newest"})["index_version"] == NEW
    check_answers(load, expected)
    assert replicas(server, "search") == before, "the processes stay"
    with pytest.raises(InputError, match="no version '000009'"):
        deploy.reload(server, {"index_version": "000009"})

    with pytest.raises(InputError, match=r"an application 'raytower' is served in this cluster already"):
        deploy.start(ServeConfig(index=str(index_dir), port=int(server.url.rsplit(":", 1)[1])))
    with pytest.raises(InputError, match="does not listen on"):
        deploy.start(ServeConfig(index=str(index_dir), port=free_port(), name="other"))
    assert ask(server.url, query="moon")[0] == 200, "a refused start touches nothing"

    with Load(server.url, rerank=False) as load:
        time.sleep(0.5)
        os.kill(next(iter(before.values())), signal.SIGKILL)
        wait_for(
            lambda: len(set(replicas(server, "search")) - set(before)) == 1, "the replica is replaced", 240
        )
    check_answers(load, expected)

    said: list[tuple[int, Any]] = []
    stopping = threading.Thread(target=deploy.stop, args=(server,))
    stopping.start()
    while stopping.is_alive():
        # In the end the door itself closes, at times in the middle of its answer.
        with suppress(OSError, http.client.HTTPException):
            said.append(ask(server.url, query="moon", timeout_ms=SOON))
        time.sleep(0.02)
    stopping.join()
    assert {status for status, _ in said} <= {200, 503}
    assert 503 in {status for status, _ in said}
    assert {answer["error"]["type"] for status, answer in said if status == 503} == {"server_error"}
    assert not serve.status().applications


def test_split_and_sharded_answer_as_together_and_live_beside_each_other(
    served: Start, index_dir: Path, dummy_reranker_dir: Path
) -> None:
    common = {"index": str(index_dir), "reranker": str(dummy_reranker_dir)}
    split = served(**common, name="split", route_prefix="/split", layout="split", rerank_num_cpus=0.2)
    port = int(split.url.removesuffix("/split").rsplit(":", 1)[1])
    sharded = served(
        **common,
        name="sharded",
        route_prefix="/sharded",
        port=port,
        layout="sharded",
        shard_num_cpus=0.2,
        shard_timeout_ms=SOON,
    )
    answers = [
        ask(server.url, queries=QUERIES, k=50, recall_k=20, timeout_ms=SOON) for server in (split, sharded)
    ]
    assert [status for status, _ in answers] == [200, 200]
    (_, first), (_, second) = answers
    assert first["reranked"] is second["reranked"] is True
    assert ids(first) == ids(second)
    # A score depends on the batch that its pair was computed in, by the last digits.
    for left, right in zip(first["results"], second["results"], strict=True):
        for name in ("score", "recall_score"):
            assert [hit[name] for hit in left] == pytest.approx([hit[name] for hit in right], abs=1e-5)
    wait_for(lambda: len(counted(split.url, "raytower_forward_rows_sum")) == 2, "the reranker's passes", 30)
    wait_for(lambda: len(counted(sharded.url, "process_open_fds")) == 3, "an ingress and two groups", 30)
    with Load(sharded.url, rerank=False, k=5) as load:
        assert deploy.reload(sharded, {"index_version": OLD})["changed"]
    assert {status for status, _ in load.answers} == {200}
    assert all(not answer["partial"] for _, answer in load.answers)
    for _, answer in load.answers:
        assert {id.split("/")[0] for found in ids(answer) for id in found} == {answer["index_version"]}
    (pid,) = replicas(sharded, "shards-1").values()
    os.kill(pid, signal.SIGKILL)
    status, answer = ask(sharded.url, query="moon 3", rerank=False, timeout_ms=2000)
    assert (status, answer["partial"]) == (200, True), "the other shard still answers"
    deploy.stop(sharded)
    assert ask(split.url, query="moon 3", timeout_ms=SOON)[0] == 200, (
        "a neighbour that stops takes nothing along"
    )


def answers_on(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.processes
@pytest.mark.parametrize("kind", ["ray", "uvicorn"])
def test_the_job_serves_until_it_is_told_to_stop(kind: str, dummy_encoder_dir: Path, tmp_path: Path) -> None:
    """In a process of its own, as a user runs it: HUP reloads, TERM ends with the JSON line and code 0."""
    index_dir = tmp_path / "index"
    write_version(index_dir, OLD, dummy_encoder_dir)
    port = free_port()
    config = {"index": str(index_dir), "port": port, "num_cpus": 0.5, "timeout_ms": SOON, "server": kind}
    script = (
        "import json, sys; from raytower.config import to_json; from raytower.serving.job import serve;"
        "from raytower.serving.config import ServeConfig;"
        "print(to_json(serve(ServeConfig(**json.loads(sys.argv[1])))), 'ray' in sys.modules)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, json.dumps(config)],
        stdout=subprocess.PIPE,
        stderr=(tmp_path / "stderr").open("wb"),
        env=clean_environment(),
        cwd=tmp_path,
        text=True,
    )
    said = lambda: (tmp_path / "stderr").read_text()  # noqa: E731
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for(
            lambda: f"serving index version {OLD}" in said() or process.poll() is not None,
            "the server starts",
            240,
        )
        assert ask(url, query="moon", k=1)[0] == 200, said()
        write_version(index_dir, NEW, dummy_encoder_dir)
        process.send_signal(signal.SIGHUP)
        wait_for(lambda: f"serving index version {NEW}" in said(), "the new version is served", 120)
        assert deploy.served_version(url) == NEW
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0, said()
        line, _, has_ray = output.splitlines()[-1].rpartition(" ")
        result = json.loads(line)
        assert (result["index_version"], result["url"]) == (NEW, url)
        assert has_ray == str(kind == "ray")
        assert not answers_on(port)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


# --- without a server -----------------------------------------------------------------------------------------


def test_a_start_that_takes_too_long_is_given_up_with_the_memory_that_is_used(
    index_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where Ray ends its processes for want of memory, its calls wait for ever."""
    monkeypatch.setattr(deploy, "_bring_up", lambda *arguments: time.sleep(60))
    monkeypatch.setattr(deploy, "ensure_ray", lambda **arguments: None)
    monkeypatch.setattr(deploy, "check_room", lambda worker: None)
    monkeypatch.setattr(deploy, "abandon", lambda: None)
    monkeypatch.setattr(deploy, "get_used_memory", lambda: 3 * 2**30)
    monkeypatch.setattr(deploy, "get_system_memory", lambda: 4 * 2**30)
    began = time.monotonic()
    with pytest.raises(
        RaytowerError, match=r"start_timeout_s = 0\.5 s\. 3\.0 of 4\.0 GiB of memory are used"
    ):
        deploy.start(ServeConfig(index=str(index_dir), port=0, start_timeout_s=0.5))
    assert time.monotonic() - began < 40


SERVER = deploy.Server("raytower", "http://127.0.0.1:9", ("default",), False, 0.0, 0.0)


def test_the_version_of_every_collection_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    server = deploy.Server("raytower", "http://127.0.0.1:9", ("faq", "laws"), False, 0.0, 0.0)
    served = {"faq": {"index_version": NEW}, "laws": {"index_version": OLD}}
    monkeypatch.setattr(deploy, "status", lambda server: {"collections": served})
    versions = deploy.served_versions(server, {})
    assert versions == {"faq": NEW, "laws": OLD}
    del served["laws"]
    assert deploy.served_versions(server, versions) == {"faq": NEW, "laws": OLD}

    def silent(server: deploy.Server) -> Any:
        raise TimeoutError

    monkeypatch.setattr(deploy, "status", silent)
    assert deploy.served_versions(server, {"faq": OLD}) == {"faq": OLD, "laws": None}


def test_a_stop_that_takes_too_long_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(deploy, "abandon", lambda: None)
    monkeypatch.setattr(deploy, "_stop", lambda server: time.sleep(60))
    monkeypatch.setattr(deploy, "_STOP_TIMEOUT_S", 0.5)
    deploy.stop(SERVER)
    assert "did not stop in order" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("states", "words"),
    [
        ([None], "was deleted by another command"),
        (["RUNNING", "DEPLOY_FAILED"], "has failed: no memory"),
    ],
)
def test_a_server_notices_that_its_application_has_gone(
    states: list[str | None], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def status() -> Any:
        state = states.pop(0)
        found = SimpleNamespace(status=SimpleNamespace(value=state), message="no memory")
        return SimpleNamespace(applications={} if state is None else {"raytower": found})

    monkeypatch.setattr(deploy, "_WATCH_S", 0.0)
    monkeypatch.setattr(deploy.ray_serve, "status", status)
    monkeypatch.setattr(deploy, "has_ended", lambda: False)
    watch = deploy._Watch(SERVER)
    for _ in states[1:]:
        watch.look()
    with pytest.raises(RaytowerError, match=words):
        watch.look()
