"""Ids, facts and lines of requests, over small applications."""

from __future__ import annotations

import asyncio
import json
import os
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.testclient import TestClient

from raytower.errors import InputError
from raytower.serving.access_log import (
    CLIENT_LEFT,
    AccessLog,
    AccessLogConfig,
    RequestFacts,
    RequestLog,
    current,
    describe,
    stage,
)


def make_app() -> Starlette:
    async def search(request: Request) -> Response:
        with stage("encode"):
            await asyncio.sleep(0.01)
        facts = current()
        facts.route, facts.collection = "/v1/{collection}/search", request.path_params["collection"]
        facts.k, facts.texts = 5, ["月亮\x1b[31m"]
        with stage("recall"):
            await inner_step(facts)
        return JSONResponse({"id": facts.request_id})

    def broken(request: Request) -> Response:
        with stage("fetch"), stage("inner"):
            raise RuntimeError("no such thing")

    def slow(request: Request) -> Response:
        # Starlette runs this in another thread; the facts are the request's there too.
        current().key = "team"
        return JSONResponse({"thread": str(threading.get_ident()), "id": current().request_id})

    def own_id(request: Request) -> Response:
        return Response(headers={"X-Request-Id": "another"})

    return Starlette(
        routes=[
            Route("/v1/{collection}/search", search, methods=["POST"]),
            Route("/broken", broken),
            Route("/slow", slow),
            Route("/own-id", own_id),
        ]
    )


async def inner_step(facts: RequestFacts) -> None:
    async def child() -> None:
        assert current() is facts

    await asyncio.gather(asyncio.create_task(child()), child())


@pytest.fixture
def seen() -> list[RequestFacts]:
    return []


@pytest.fixture
def client(seen: list[RequestFacts]) -> TestClient:
    return TestClient(RequestLog(make_app(), [seen.append]), raise_server_exceptions=False)


def test_facts_and_stages_reach_the_observers(client: TestClient, seen: list[RequestFacts]) -> None:
    answer = client.post("/v1/faq/search", headers={"x-request-id": "req-1"})
    assert answer.json() == {"id": "req-1"}
    assert answer.headers["x-request-id"] == "req-1"
    (facts,) = seen
    assert (facts.route, facts.method, facts.status) == ("/v1/{collection}/search", "POST", 200)
    assert (facts.collection, facts.k) == ("faq", 5)
    assert [part.name for part in facts.stages] == ["encode", "recall"]
    assert 0.01 <= facts.stages[0].seconds < facts.seconds < 5
    assert facts.started_ns <= facts.stages[0].started_ns <= facts.stages[0].ended_ns <= facts.ended_ns


def test_requests_at_once_keep_their_facts_apart(seen: list[RequestFacts]) -> None:
    app = RequestLog(make_app(), [seen.append])

    async def run() -> list[str]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            posts = [client.post(f"/v1/c{n}/search", headers={"x-request-id": f"r{n}"}) for n in range(20)]
            return [answer.json()["id"] for answer in await asyncio.gather(*posts)]

    assert asyncio.run(run()) == [f"r{n}" for n in range(20)]
    assert {facts.request_id: facts.collection for facts in seen} == {f"r{n}": f"c{n}" for n in range(20)}
    assert all(len(facts.stages) == 2 for facts in seen)


def test_a_route_in_a_thread_has_its_requests_facts(client: TestClient, seen: list[RequestFacts]) -> None:
    answer = client.get("/slow").json()
    assert answer["thread"] != str(threading.get_ident())
    assert answer["id"] == seen[0].request_id
    assert seen[0].key == "team"


@pytest.mark.parametrize("given", ["req-1", "A.b_c:/+=@-9", "x" * 128])
def test_a_sound_id_is_kept(client: TestClient, given: str) -> None:
    assert client.get("/slow", headers={"x-request-id": given}).headers["x-request-id"] == given


@pytest.mark.parametrize("given", ["", " ", "a b", "x" * 129, 'a"b', "a,b", "é", "a\tb", "<script>"])
def test_any_other_id_is_replaced(client: TestClient, given: str) -> None:
    answer = client.get("/slow", headers={"x-request-id": given.encode()})  # type: ignore[dict-item]
    assert re.fullmatch(r"[0-9a-f]{32}", answer.headers["x-request-id"])


def test_ids_differ_and_an_answer_has_one(client: TestClient) -> None:
    assert client.get("/slow").headers["x-request-id"] != client.get("/slow").headers["x-request-id"]
    answer = client.get("/own-id", headers={"x-request-id": "mine"})
    assert answer.headers.get_list("x-request-id") == ["mine"]


def test_a_path_without_a_route_is_counted_as_one(client: TestClient, seen: list[RequestFacts]) -> None:
    assert client.get("/no/such/thing").status_code == 404
    assert client.get("/other").headers["x-request-id"]
    assert {facts.route for facts in seen} == {"unmatched"}
    assert json.loads(describe(seen[0]))["path"] == "/no/such/thing"


def test_a_failure_is_a_500_and_names_the_innermost_stage(
    client: TestClient, seen: list[RequestFacts]
) -> None:
    assert client.get("/broken").status_code == 500
    assert (seen[0].status, seen[0].failed_in) == (500, "inner")


def test_an_observer_that_fails_harms_neither_the_answer_nor_the_others(
    seen: list[RequestFacts], caplog: pytest.LogCaptureFixture
) -> None:
    def bad(facts: RequestFacts) -> None:
        raise RuntimeError("observer")

    client = TestClient(RequestLog(make_app(), [bad, seen.append]))
    assert client.get("/slow").status_code == 200
    assert len(seen) == 1
    assert f"request {seen[0].request_id} could not be recorded" in caplog.text


def test_a_caller_who_left_is_no_success(seen: list[RequestFacts]) -> None:
    async def silent(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(30)

    async def run() -> None:
        scope: Any = {"type": "http", "method": "GET", "path": "/v1/search", "headers": []}
        task = asyncio.create_task(RequestLog(silent, [seen.append])(scope, None, None))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    assert seen[0].status == CLIENT_LEFT


def test_websockets_and_lifespan_pass(seen: list[RequestFacts]) -> None:
    with TestClient(RequestLog(make_app(), [seen.append])):
        pass
    assert seen == []


def test_a_request_that_has_ended_leaves_no_facts_behind(seen: list[RequestFacts]) -> None:
    async def run() -> str:
        scope: Any = {"type": "http", "method": "GET", "path": "/v1/search", "headers": []}
        await RequestLog(nothing, [seen.append])(scope, None, None)  # type: ignore[arg-type]
        return current().request_id

    async def nothing(scope: Any, receive: Any, send: Any) -> None:
        assert current().request_id

    assert asyncio.run(run()) == ""
    assert len(seen) == 1


def test_outside_a_request_facts_are_nobodys() -> None:
    current().k = 3
    assert current().k is None
    with stage("encode"):
        pass


# --- lines ----------------------------------------------------------------------------------------------------


def test_a_line_says_what_is_known_and_no_texts() -> None:
    facts = RequestFacts(
        request_id="a",
        method="POST",
        path="/v1/search",
        route="/v1/search",
        status=200,
        started_ns=1_700_000_000_123_456_789,
        ended_ns=1_700_000_000_135_456_789,
        k=10,
        num_queries=1,
        reranked_k=0,
        rerank_k=0,
        texts=["secret"],
    )
    facts.add_stage("queue", 0.001)
    facts.add_stage("queue", 0.002)
    line = describe(facts)
    assert json.loads(line) == {
        "time": "2023-11-14T22:13:20.123+00:00",
        "id": "a",
        "method": "POST",
        "route": "/v1/search",
        "status": 200,
        "ms": 12.0,
        "stages_ms": {"queue": 3.0},
        "queries": 1,
        "k": 10,
        "rerank_k": 0,
        "reranked_k": 0,
    }


def test_control_characters_and_lone_surrogates_are_escaped() -> None:
    nasty = 'a\x1b[31m\n\r\x00\x7f\x85\u2028\u202e\ud800 月 "'
    facts = RequestFacts(request_id="a", path=nasty, route="unmatched", texts=[nasty, "x" * 2000], status=404)
    line = describe(facts, log_texts=True)
    assert re.fullmatch(r"[\x20-\x7e]+", line)
    read = json.loads(line)
    assert read["path"] == nasty
    assert read["texts"] == [nasty, "x" * 1000]
    assert "texts" not in json.loads(describe(facts))


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def request(number: int) -> RequestFacts:
    return RequestFacts(request_id=str(number), route="/v1/search", status=200)


def ids(path: Path) -> list[str]:
    return [json.loads(line)["id"] for line in path.read_text().splitlines()] if path.exists() else []


def test_the_file_has_every_line_and_probes_only_when_they_fail(tmp_path: Path) -> None:
    path = tmp_path / "access.log"
    path.write_text("")
    log = AccessLog(AccessLogConfig.model_validate(str(path)))
    for number in range(200):
        log.record(request(number))
    log.record(RequestFacts(request_id="well", route="/readyz", status=200))
    log.record(RequestFacts(request_id="ill", route="/readyz", status=503))
    log.close()
    assert ids(path) == [*map(str, range(200)), "ill"]


def test_a_rotated_file_is_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "access.log"
    log = AccessLog(AccessLogConfig(path=str(path)))
    assert path.stat().st_mode & 0o007 == 0, "others may not read who asks what"
    log.record(request(1))
    wait_for(lambda: ids(path) == ["1"])
    path.rename(tmp_path / "access.log.1")
    log.record(request(2))
    log.close()
    assert ids(path) == ["2"]
    assert ids(tmp_path / "access.log.1") == ["1"]


def test_a_slow_reader_holds_up_nobody_and_what_was_left_out_is_said(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    log = AccessLog(AccessLogConfig(path=str(path)), max_waiting=10)
    since = time.monotonic()
    # A pipe holds 64 KiB: the thread stands still long before the last of these.
    for number in range(3000):
        log.record(request(number))
    assert time.monotonic() - since < 10
    os.set_blocking(reader, True)
    lines: list[dict[str, Any]] = []

    def read() -> None:
        with os.fdopen(reader) as pipe:
            lines.extend(json.loads(line) for line in pipe)

    thread = threading.Thread(target=read)
    thread.start()
    wait_for(lambda: log._waiting.empty())
    log.record(request(3000))
    log.record(request(3001))
    log.close()
    thread.join(20)
    written = [line for line in lines if "id" in line]
    dropped = [line["dropped_lines"] for line in lines if "id" not in line]
    assert dropped
    assert 0 not in dropped
    assert len(written) + sum(dropped) == 3002
    assert [line["id"] for line in written[-2:]] == ["3000", "3001"]


def test_a_folder_that_is_not_there_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"access_log.path .*cannot be written: No such file"):
        AccessLog(AccessLogConfig(path=str(tmp_path / "none" / "access.log")))
