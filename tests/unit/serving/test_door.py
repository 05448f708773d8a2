"""The door before Serve's proxy, over an application that answers as the proxy or as a replica would."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Sequence
from typing import Any

import pytest

from raytower.serving.door import ARRIVAL_HEADER, REPLICA_HEADER, Door, DoorSettings

Sent = list[dict[str, Any]]


class Proxy:
    """Answers in turn as told: `replica`, the `head alone` of one that dies, one of the proxy's own (status, text), or
    nothing at all."""

    def __init__(self, *answers: Any, prefix: bytes = b"/") -> None:
        self.answers = list(answers)
        self.bodies: list[bytes] = []
        self.scopes: list[Any] = []
        self.prefix = prefix

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.scopes.append(scope)
        self.bodies.append((await receive())["body"])
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if answer == "hang":
            await asyncio.sleep(60)
        is_replica = answer in ("replica", "head alone")
        status, text = (200, b"{}") if is_replica else answer
        headers = [(b"x-request-id", b"app"), (b"X-Request-ID", b"proxy")]
        if is_replica:
            headers.append((REPLICA_HEADER, self.prefix))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        if answer == "head alone":
            return
        await send({"type": "http.response.body", "body": text, "more_body": False})


def ask(
    door: Door,
    path: str = "/v1/search",
    parts: Sequence[bytes] = (b'{"query": "x"}',),
    headers: Sequence[tuple[bytes, bytes]] = (),
    pause_s: float = 0.0,
) -> Awaitable[tuple[int, Any, dict[bytes, bytes]]]:
    async def whole() -> tuple[int, Any, dict[bytes, bytes]]:
        waiting = list(parts)
        sent: Sent = []

        async def receive() -> dict[str, Any]:
            if not waiting:
                await asyncio.sleep(60)
            await asyncio.sleep(pause_s)
            part = waiting.pop(0)
            return {"type": "http.request", "body": part, "more_body": bool(waiting)}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": path, "headers": list(headers)}
        await door(scope, receive, send)
        body = b"".join(item.get("body", b"") for item in sent)
        return sent[0]["status"], json.loads(body), dict(sent[0]["headers"])

    return whole()


def asked(proxy: Proxy, settings: DoorSettings | None = None, **request: Any) -> Any:
    return asyncio.run(_one(Door(proxy, settings or DoorSettings()), request))


async def _one(door: Door, request: dict[str, Any]) -> Any:
    return await ask(door, **request)


def test_a_replicas_answer_goes_through_without_its_mark_and_with_one_request_id() -> None:
    proxy = Proxy("replica")
    status, _, headers = asked(proxy, parts=[b'{"que', b'ry": "x"}'])
    assert (status, headers) == (200, {b"x-request-id": b"app"})
    assert proxy.bodies == [b'{"query": "x"}']


def test_the_arrival_is_stamped_here_and_not_taken_from_the_client() -> None:
    proxy = Proxy("replica")
    asked(proxy, headers=[(ARRIVAL_HEADER, b"1"), (b"X-Raytower-Arrival", b"2")])
    (stamp,) = [value for name, value in proxy.scopes[0]["headers"] if name.lower() == ARRIVAL_HEADER]
    assert abs(float(stamp) - time.time()) < 60


def test_a_request_of_a_dead_replica_is_given_to_another() -> None:
    proxy = Proxy((500, b"The actor died"), "replica")
    assert asked(proxy)[0] == 200
    assert proxy.bodies == [b'{"query": "x"}'] * 2


def test_a_replica_that_dies_behind_the_head_of_its_answer_leaves_no_client_with_it() -> None:
    """The head went out at once; where the machine was lost behind it, clients had an answer without a body."""
    assert asked(Proxy("head alone", "replica"))[0] == 200
    status, body, _ = asked(Proxy("head alone"))
    assert (status, body["error"]["code"]) == (503, "not_ready")
    proxy = Proxy("head alone")
    assert asked(proxy, path="/v1/admin/reload")[0] == 503
    assert len(proxy.bodies) == 1


def test_where_all_are_dead_it_is_a_503_and_an_admin_request_is_made_once() -> None:
    proxy = Proxy((500, b"The actor died"))
    status, body, headers = asked(proxy)
    assert (status, body["error"]["code"], headers[b"retry-after"]) == (503, "not_ready", b"1")
    assert len(proxy.bodies) == 4
    proxy = Proxy((500, b"The actor died"))
    assert asked(proxy, path="/v1/admin/reload")[0] == 503
    assert len(proxy.bodies) == 1


def test_a_route_that_was_there_is_503_and_one_that_never_was_is_404() -> None:
    async def work() -> None:
        door = Door(Proxy("replica", (404, b"Path not found"), prefix=b"/a"), DoorSettings())
        assert (await ask(door, "/a/v1/search"))[0] == 200
        status, body, headers = await ask(door, "/a/readyz")
        assert (status, body["error"]["type"], headers[b"retry-after"]) == (503, "server_error", b"1")
        assert (await ask(door, "/ab"))[0] == 404
        assert (await ask(door, "/b"))[1]["error"]["code"] == "not_found"

    asyncio.run(work())


def test_a_server_that_starts_says_so_to_clients_that_ask_already() -> None:
    """They were told 404, after which a client does not ask again, between the proxy's start and its first route."""
    status, body, headers = asked(Proxy((404, b"Path '/v1/search' not found")))
    assert (status, body["error"]["code"], headers[b"retry-after"]) == (503, "not_ready", b"1")


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ((503, b"Request dropped due to backpressure"), (429, "overloaded")),
        ((503, b"Deployment is unavailable"), (503, "not_ready")),
        ((408, b"timed out"), (504, "out_of_time")),
    ],
)
def test_the_proxys_words_are_put_into_ours(answer: Any, expected: tuple[int, str]) -> None:
    status, body, _ = asked(Proxy(answer))
    assert (status, body["error"]["code"]) == expected


@pytest.mark.parametrize(
    "request_",
    [
        {"headers": [(b"x-raytower-timeout-ms", b"20")]},
        {"parts": [b'{"query": "x", "timeout_ms" : 20}']},
    ],
)
def test_an_answer_is_not_waited_for_long_past_its_time(
    request_: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raytower.serving.door._SPARE_S", 0.05)
    started = time.monotonic()
    status, body, _ = asked(Proxy("hang"), **request_)
    assert (status, body["error"]["code"]) == (503, "not_ready")
    assert "20 ms" in body["error"]["message"]
    assert time.monotonic() - started < 30


def test_a_slow_body_and_a_large_one_never_reach_a_replica() -> None:
    proxy = Proxy("replica")
    status, body, headers = asked(proxy, DoorSettings(body_timeout_ms=30), parts=[b"{"] * 100, pause_s=0.005)
    assert (status, body["error"]["code"], headers[b"connection"]) == (408, "body_too_slow", b"close")
    status, body, _ = asked(proxy, DoorSettings(max_body_bytes=5))
    assert (status, body["error"]["code"]) == (413, "too_large")
    status, body, _ = asked(proxy, headers=[(b"content-length", b"99999999")])
    assert status == 413
    assert not proxy.bodies


def test_what_waits_is_bounded_by_number_and_bytes() -> None:
    async def work() -> None:
        door = Door(Proxy("hang"), DoorSettings(max_requests=2))
        waiting = [asyncio.create_task(ask(door)) for _ in range(2)]
        await asyncio.sleep(0.05)
        status, body, headers = await ask(door)
        assert (status, body["error"]["code"], headers[b"retry-after"]) == (429, "overloaded", b"1")
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        door._app = Proxy("replica")  # type: ignore[assignment]
        assert (await ask(door))[0] == 200, "what has ended makes room"
        door = Door(Proxy("hang"), DoorSettings(max_held_bytes=20))
        waiting = [asyncio.create_task(ask(door))]
        await asyncio.sleep(0.05)
        assert (await ask(door))[0] == 429
        waiting[0].cancel()
        await asyncio.gather(*waiting, return_exceptions=True)

    asyncio.run(work())


def test_settings_go_through_the_environment() -> None:
    settings = DoorSettings(timeout_ms=7)
    assert DoorSettings.from_json(settings.to_json()) == settings
