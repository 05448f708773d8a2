"""The server under Ray Serve, over HTTP: both layouts, a new version under load, a killed shard. Loopback only."""

from __future__ import annotations

import asyncio
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from ray import serve

from raytower.errors import FormatError, InputError, RaytowerError
from raytower.index.reader import Index
from raytower.index.versions import open_manifest
from raytower.models.encoder import Encoder
from raytower.models.forward import ForwardEngine
from raytower.retrieval.retriever import Candidate, index_recall
from raytower.serving import deploy
from raytower.serving.config import ServeConfig
from raytower.serving.schemas import NotReadyError, OutOfTimeError
from raytower.serving.shards import LocalIndex, ShardedIndex, ShardServer, merge_candidates
from raytower.serving.work import Deadline
from tests.support.processes import free_port, wait_for
from tests.support.served_index import TEXTS, write_version
from tests.support.tiny_models import build_tiny_encoder

Start = Callable[[ServeConfig], tuple[ServeConfig, str]]
SOON = 20_000
OLD, NEW = "000001", "000002"


@pytest.fixture(scope="module")
def index_dir(tmp_path_factory: pytest.TempPathFactory, dummy_encoder_dir: Path) -> Path:
    """Two versions; the newest is served unless another is named."""
    folder = tmp_path_factory.mktemp("served") / "index"
    write_version(folder, OLD, dummy_encoder_dir)
    write_version(folder, NEW, dummy_encoder_dir)
    return folder


def damage(folder: Path, version: str) -> None:
    digest = open_manifest(folder, version).shards[1].digest
    place = folder / "shards" / digest / "vectors.faiss"
    place.write_bytes(place.read_bytes()[:-1])


def make_config(index_dir: Path, **values: Any) -> ServeConfig:
    return ServeConfig(
        index=str(index_dir),
        **{"port": 0, "timeout_ms": SOON, "num_cpus": 0.5, "shard_num_cpus": 0.5, **values},
    )


@pytest.fixture
def served(ray_cluster: None) -> Iterator[Start]:
    """Starts a server on a free port; stopped after the test."""

    def start(config: ServeConfig) -> tuple[ServeConfig, str]:
        url = deploy.start(config)
        return config.model_copy(update={"port": int(url.rsplit(":", 1)[1])}), url

    yield start
    deploy.stop()


def ask(
    url: str, path: str = "/v1/search", headers: dict[str, str] | None = None, **body: Any
) -> tuple[int, Any]:
    request = urllib.request.Request(
        url + path, json.dumps(body).encode(), {"Content-Type": "application/json", **(headers or {})}
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def versions_in(answer: dict[str, Any]) -> set[str]:
    return {answer["index_version"]} | {hit["id"].split("/")[0] for hits in answer["results"] for hit in hits}


class Load:
    """Two clients that ask without a pause and keep every answer, until the block ends."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.answers: list[tuple[int, Any]] = []
        self._stop = threading.Event()

    def _ask(self) -> None:
        while not self._stop.is_set():
            self.answers.append(ask(self.url, queries=["moon 3", "大地 1"], k=50))
            time.sleep(0.01)

    def __enter__(self) -> Load:
        self._pool = ThreadPoolExecutor(2)
        self._clients = [self._pool.submit(self._ask) for _ in range(2)]
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        for client in self._clients:
            client.result()
        self._pool.shutdown()


def check_swap(config: ServeConfig, url: str) -> None:
    """v1 → v2 under load: nothing fails, nothing mixes, nothing is partial; replicas stay the same processes."""
    before = replica_names()
    with Load(url) as load:
        time.sleep(0.3)
        assert deploy.reload(config, OLD) == OLD
        time.sleep(0.3)
    assert {status for status, _ in load.answers} == {200}
    assert all(len(versions_in(answer)) == 1 for _, answer in load.answers)
    assert {answer["index_version"] for _, answer in load.answers} == {NEW, OLD}
    assert not any(answer["partial"] for _, answer in load.answers)
    assert replica_names() == before


def replica_names() -> set[str]:
    named = ray.util.list_named_actors(all_namespaces=True)
    return {item["name"] for item in named if item["name"].startswith(f"SERVE_REPLICA::{deploy.APP_NAME}#")}


def test_together_serves_swaps_and_stops(
    served: Start,
    index_dir: Path,
    dummy_reranker_dir: Path,
    dummy_encoder_dir: Path,
) -> None:
    config, url = served(make_config(index_dir, reranker=str(dummy_reranker_dir)))
    assert len(replica_names()) == 1, "one process holds everything"
    status, answer = ask(url, query="moon 3", k=3)
    assert status == 200
    assert (answer["index_version"], answer["partial"], answer["reranked"]) == (NEW, False, True)
    status, answer = ask(url, query="moon 3", k=3, rerank=False)
    vectors = ForwardEngine(Encoder.load(str(dummy_encoder_dir))).encode([*TEXTS, "moon 3"])
    best = np.argsort(-(vectors[:-1] @ vectors[-1]), kind="stable")[:3]
    assert [hit["id"] for hit in answer["results"][0]] == [f"{NEW}/{row}" for row in best]
    assert answer["results"][0][0]["text"] == "moon 3"
    assert answer["results"][0][0]["metadata"] == {"number": TEXTS.index("moon 3")}
    assert len(ask(url, query="moon", k=1000, rerank=False)[1]["results"][0]) == len(TEXTS)
    assert ask(url, "/v1/rerank", query="a", documents=["b", "c"])[0] == 200
    status, answer = ask(url, "/v1/embeddings", input=TEXTS[:1])
    assert answer["data"][0]["embedding"] == pytest.approx(vectors[0].tolist(), abs=1e-5)
    assert ask(url, query="")[0] == 422
    assert ask(url, query="x" * 1_000_000)[0] == 413
    assert ask(url, query="x" * 5_000_000)[0] == 413
    assert ask(url, "/nothing")[0] == 404
    with urllib.request.urlopen(f"{url}/", timeout=10) as reply:
        assert "default-src 'none'" in reply.headers["content-security-policy"]
    check_swap(config, url)
    with pytest.raises(InputError, match="already runs in this cluster"):
        deploy.start(make_config(index_dir, port=free_port()))
    deploy.stop()
    # The proxy's process ends a moment later.
    until = time.monotonic() + 20
    while answers_on(config.port):
        assert time.monotonic() < until
        time.sleep(0.1)


def test_apart_answers_alike_survives_a_killed_shard_and_swaps(served: Start, index_dir: Path) -> None:
    config, url = served(make_config(index_dir, layout="apart", shard_timeout_ms=5000))
    assert len(replica_names()) == 3
    queries = ["moon 3", "大地 1", "sun"]
    status, whole = ask(url, queries=queries, k=50, rerank=False)
    assert status == 200
    assert not whole["partial"]
    index = Index.open(str(index_dir), NEW)
    vectors = ForwardEngine(Encoder.load(index.manifest.encoder)).encode(queries)
    for hits, expected in zip(whole["results"], index_recall(index)(vectors, 50), strict=True):
        assert [hit["id"] for hit in hits] == [item.id for item in expected]
        assert [hit["recall_score"] for hit in hits] == pytest.approx(
            [item.score for item in expected], abs=1e-6
        )
    check_swap(config, url)
    assert deploy.reload(config) == NEW, "without a name the published version is taken"

    (victim,) = [name for name in replica_names() if "shard-00001" in name]
    ray.kill(ray.get_actor(victim, namespace="serve"))
    status, answer = ask(url, queries=queries, k=50, timeout_ms=2000)
    assert status == 200
    assert answer["partial"] is True
    rows = {hit["metadata"]["number"] for hit in answer["results"][0]}
    assert rows == set(range(25)), "the other shard's rows, all of them"
    wait_for(lambda: ask(url, query="moon 3", k=50)[1].get("partial") is False, "the shard comes back", 120)
    assert versions_in(ask(url, query="moon 3", k=50)[1]) == {NEW}


def test_a_version_that_cannot_be_opened_leaves_the_one_before(
    served: Start,
    index_dir: Path,
    dummy_encoder_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "index"
    write_version(folder, "000001", dummy_encoder_dir)
    monkeypatch.setenv("SEARCH_KEY_FOR_TEST", "open sesame")
    monkeypatch.setattr(deploy, "_READY_TIMEOUT_S", 3.0)
    config, url = served(make_config(folder, api_key_env="SEARCH_KEY_FOR_TEST"))
    key = {"Authorization": "Bearer open sesame"}
    assert ask(url, query="moon")[0] == 401
    assert ask(url, query="moon", headers=key)[0] == 200
    write_version(folder, "000002", dummy_encoder_dir)
    damage(folder, "000002")
    with pytest.raises(RaytowerError, match="'000001', not '000002'"):
        deploy.reload(config)
    assert ask(url, query="moon", headers=key)[1]["index_version"] == "000001"
    other = build_tiny_encoder(tmp_path / "other", seed=5)
    write_version(folder, "000003", other)
    with pytest.raises(FormatError, match="fingerprint"):
        deploy.reload(config.model_copy(update={"encoder": str(dummy_encoder_dir)}))
    assert ask(url, query="moon", headers=key)[1]["index_version"] == "000001"


def test_what_a_replica_refuses_is_told_in_its_own_words(
    ray_cluster: None, dummy_encoder_dir: Path, tmp_path: Path
) -> None:
    write_version(tmp_path / "index", "000001", dummy_encoder_dir)
    damage(tmp_path / "index", "000001")
    with pytest.raises(FormatError, match=r"vectors\.faiss"):
        deploy.start(make_config(tmp_path / "index"))
    deploy.stop()
    assert replica_names() == set()


def test_a_taken_port_is_an_input_error(ray_cluster: None, index_dir: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"127.0.0.1:{port}"):
            deploy.start(make_config(index_dir, port=port))
    assert not serve.status().applications


# --- without a server -----------------------------------------------------------------------------------------


def test_the_plan_says_what_would_run(index_dir: Path) -> None:
    together = deploy.plan_serve(make_config(index_dir, port=8123, replicas=2, num_cpus=2))
    digests = {shard.digest for shard in open_manifest(index_dir).shards}
    files = [file for digest in digests for file in (index_dir / "shards" / digest).iterdir()]
    size = sum(file.stat().st_size for file in files if file.name != "shard.json")
    assert together["index_version"] == NEW
    assert together["rows"] == 50
    assert together["index_bytes_per_process"] == together["index_bytes"] == size
    assert (together["processes"], together["cpus"]) == (2, 4)
    apart = deploy.plan_serve(make_config(index_dir, layout="apart", num_cpus=1, shard_num_cpus=2))
    assert (apart["processes"], apart["cpus"]) == (3, 5)
    assert apart["index_bytes_per_process"] == size // 2


def test_what_cannot_be_served_is_refused_before_anything_starts(
    index_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="holds no index"):
        deploy.plan_serve(make_config(tmp_path))
    with pytest.raises(InputError, match="does not exist"):
        deploy.plan_serve(make_config(index_dir, reranker="./missing"))
    other = build_tiny_encoder(tmp_path / "other", seed=5)
    with pytest.raises(FormatError, match="fingerprint"):
        deploy.plan_serve(make_config(index_dir, encoder=str(other)))
    (other / "raytower.json").unlink()
    with pytest.raises(FormatError, match="fingerprint"):
        deploy.plan_serve(make_config(index_dir, encoder=str(other)))
    monkeypatch.delenv("SEARCH_KEY_FOR_TEST", raising=False)
    with pytest.raises(InputError, match="SEARCH_KEY_FOR_TEST"):
        deploy.plan_serve(make_config(index_dir, api_key_env="SEARCH_KEY_FOR_TEST"))


def test_a_start_that_takes_too_long_is_given_up_with_the_memory_that_is_used(
    index_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where Ray ends its processes for want of memory, its calls wait for ever."""
    monkeypatch.setattr(deploy, "_bring_up", lambda *arguments: time.sleep(60))
    monkeypatch.setattr(deploy, "ensure_ray", lambda **arguments: None)
    monkeypatch.setattr(deploy, "_is_running", lambda: False)  # asked, Serve would start a Ray of its own
    monkeypatch.setattr(deploy, "abandon", lambda: None)
    monkeypatch.setattr(deploy, "get_used_memory", lambda: 3 * 2**30)
    monkeypatch.setattr(deploy, "get_system_memory", lambda: 4 * 2**30)
    began = time.monotonic()
    with pytest.raises(
        RaytowerError, match=r"start_timeout_s = 0\.5 s\. 3\.0 of 4\.0 GiB of memory are used"
    ):
        deploy.start(make_config(index_dir, start_timeout_s=0.5))
    assert time.monotonic() - began < 20


def test_a_stop_that_takes_too_long_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(deploy, "abandon", lambda: None)
    monkeypatch.setattr(deploy, "_stop", lambda: time.sleep(60))
    monkeypatch.setattr(deploy, "_STOP_TIMEOUT_S", 0.5)
    deploy.stop()
    assert "did not stop in order" in capsys.readouterr().err


def answers_on(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


class Remote:
    """A shard handle without Ray: what `remote` returns answers, fails, or is late."""

    def __init__(self, answer: Callable[[], Any]) -> None:
        self.answer = answer
        self.asked: list[tuple[Any, ...]] = []
        self.cancelled = False
        self.recall = self.prepare = self

    def remote(self, *arguments: Any) -> Remote:
        self.asked.append(arguments)
        return self

    def result(self, *, timeout_s: float | None = None) -> Any:
        return self.answer()

    def cancel(self) -> None:
        self.cancelled = True


def sharded(index_dir: Path, shards: list[Remote]) -> ShardedIndex:
    opened = Index.open(str(index_dir), NEW)
    return ShardedIndex(opened.manifest, opened.table.schema, shards, 100)


def late() -> Any:
    raise TimeoutError("late")


def candidate(name: str, score: float, row: int = 0) -> Candidate:
    return Candidate(name, "", {}, score, row)


def test_shards_are_asked_for_the_version_and_a_late_one_is_left_out(index_dir: Path) -> None:
    good = Remote(lambda: [[candidate("a", 0.9), candidate("b", 0.1)]])
    shards = [good, Remote(late)]
    index = sharded(index_dir, shards)
    vectors = np.zeros((1, 32), dtype=np.float32)
    found, partial = index.recall(vectors, 1, Deadline.after(SOON))
    assert [item.id for item in found[0]] == ["a"]
    assert partial
    assert shards[1].cancelled
    assert [shard.asked[0][0] for shard in shards] == [NEW, NEW]
    shards[1].answer = lambda: [[candidate("c", 0.5)]]
    found, partial = index.recall(vectors, 2, Deadline.after(SOON))
    assert [item.id for item in found[0]] == ["a", "c"]
    assert not partial


def test_no_shard_at_all_is_an_error_and_not_an_empty_answer(index_dir: Path) -> None:
    index = sharded(index_dir, [Remote(late), Remote(late)])
    vectors = np.zeros((1, 32), dtype=np.float32)
    with pytest.raises(NotReadyError, match="no shard"):
        index.recall(vectors, 1, Deadline.after(SOON))
    with pytest.raises(OutOfTimeError):
        index.recall(vectors, 1, Deadline(time.monotonic() - 1, 10))


def test_a_process_that_cannot_open_the_version_is_named(index_dir: Path) -> None:
    with pytest.raises(RaytowerError, match="shard 1 could not open"):
        ShardedIndex.open(str(index_dir), NEW, [Remote(lambda: None), Remote(late)], 100)


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_any_number_of_processes_holds_all_shards(index_dir: Path, processes: int) -> None:
    """A version may have got more shards, or fewer, than there were when the server was started."""
    vectors = ForwardEngine(Encoder.load(Index.open(str(index_dir)).encoder)).encode(TEXTS[:2])
    servers = [ShardServer(str(index_dir), number, processes) for number in range(processes)]
    parts = [asyncio.run(server.recall(NEW, vectors, 7)) for server in servers]
    alone, _ = LocalIndex.open(str(index_dir), NEW).recall(vectors, 7, Deadline.after(SOON))
    assert [[item.id for item in found] for found in merge_candidates(parts, 7)] == [
        [item.id for item in found] for found in alone
    ]


def test_a_filter_goes_to_every_shard_and_is_checked_before(index_dir: Path) -> None:
    answers: list[Any] = [None, None]
    shards = [Remote(lambda number=number: answers[number]) for number in range(2)]
    index = ShardedIndex.open(str(index_dir), NEW, shards, 100)
    with pytest.raises(InputError, match="no column 'nubmer'"):
        index.check_filter({"nubmer": 1})
    filter = {"number": {"$gte": 1}}
    index.check_filter(filter)
    vectors = ForwardEngine(Encoder.load(Index.open(str(index_dir)).encoder)).encode(TEXTS[:1])
    answers[:] = [
        asyncio.run(ShardServer(str(index_dir), number, 2).recall(NEW, vectors, len(TEXTS), filter))
        for number in range(2)
    ]
    (together,), _ = index.recall(vectors, len(TEXTS), Deadline.after(SOON), filter)
    assert [shard.asked[-1][3] for shard in shards] == [filter, filter]
    assert {item.metadata["number"] for item in together} == set(range(1, len(TEXTS)))
    (alone,), _ = LocalIndex.open(str(index_dir), NEW).recall(
        vectors, len(TEXTS), Deadline.after(SOON), filter
    )
    assert [item.id for item in alone] == [item.id for item in together]


def test_merging_goes_by_row_for_equal_scores() -> None:
    parts = [
        [[candidate("a", 0.5, 7), candidate("b", 0.2, 1)]],
        [[candidate("c", 0.9, 4), candidate("d", 0.5, 2)]],
        [[]],
    ]
    assert [item.id for item in merge_candidates(parts, 3)[0]] == ["c", "d", "a"]


def test_a_shard_server_keeps_two_versions_and_opens_others_when_asked(
    tmp_path: Path, dummy_encoder_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for version in ("000001", "000002", "000003"):
        write_version(tmp_path / "index", version, dummy_encoder_dir, texts=TEXTS[:4])
    opened: list[str] = []
    open_index = Index.open

    def counting(uri: str, version: str, **settings: Any) -> Index:
        opened.append(version)
        return open_index(uri, version, **settings)

    monkeypatch.setattr("raytower.serving.shards.Index.open", counting)
    server = ShardServer(str(tmp_path / "index"), 1, 2)
    vectors = ForwardEngine(Encoder.load(str(dummy_encoder_dir))).encode(TEXTS[3:4])
    for version in ("000001", "000002", "000001", "000003", "000001", "000002"):
        (found,) = asyncio.run(server.recall(version, vectors, 9))
        assert [item.id for item in found] == sorted((f"{version}/2", f"{version}/3"), reverse=True)
    assert opened == ["000001", "000002", "000003", "000002"]


@pytest.mark.processes
def test_the_job_serves_until_it_is_told_to_stop(dummy_encoder_dir: Path, tmp_path: Path) -> None:
    """In a process and a Ray of its own, as a user runs it: HUP reloads, TERM ends with the JSON line and code 0."""
    index_dir = tmp_path / "index"
    write_version(index_dir, "000001", dummy_encoder_dir)
    port = free_port()
    config = json.dumps({"index": str(index_dir), "port": port, "num_cpus": 0.5, "timeout_ms": SOON})
    script = (
        "import json, sys; from raytower.config import to_json; from raytower.serving.deploy import serve;"
        "from raytower.serving.config import ServeConfig;"
        "print(to_json(serve(ServeConfig(**json.loads(sys.argv[1])))))"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_ADDRESS")}
    process = subprocess.Popen(
        [sys.executable, "-c", script, config],
        stdout=subprocess.PIPE,
        stderr=(tmp_path / "stderr").open("wb"),
        env=environment,
        cwd=tmp_path,
        text=True,
    )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for(
            lambda: deploy.served_version(url) == "000001" or process.poll() is not None,
            "the server starts",
            240,
        )
        assert ask(url, query="moon", k=1)[0] == 200, (tmp_path / "stderr").read_text()
        write_version(index_dir, "000002", dummy_encoder_dir)
        process.send_signal(signal.SIGHUP)
        wait_for(lambda: deploy.served_version(url) == "000002", "the new version is served", 90)
        wait_for(
            lambda: "serving index version 000002" in (tmp_path / "stderr").read_text(), "it is said", 90
        )
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0, (tmp_path / "stderr").read_text()
        result = json.loads(output.splitlines()[-1])
        assert result["index_version"] == "000002"
        assert result["url"] == url
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
