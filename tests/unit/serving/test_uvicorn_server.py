"""The server in one process: what stands before its application."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from raytower.serving.config import ServeConfig
from raytower.serving.uvicorn_server import Here

SCOPE = {"type": "http", "method": "GET", "path": "/healthz", "headers": [(b"host", b"localhost")]}


async def ask(here: Here) -> tuple[int, dict[bytes, bytes], Any]:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    await here(dict(SCOPE), receive, send)
    start, body = sent
    return start["status"], dict(start["headers"]), json.loads(body["body"])


def test_more_requests_than_it_holds_are_told_to_come_again() -> None:
    async def run() -> None:
        here = Here(ServeConfig(index="i", max_ongoing_requests=2, max_queued_requests=1), [])
        held = asyncio.Event()
        inside = here._app

        async def slow(scope: Any, receive: Any, send: Any) -> None:
            await held.wait()
            await inside(scope, receive, send)

        here._app = slow
        waiting = [asyncio.create_task(ask(here)) for _ in range(3)]
        await asyncio.sleep(0.01)
        status, headers, answer = await ask(here)
        assert (status, answer["error"]["code"], headers[b"retry-after"]) == (429, "overloaded", b"1")
        held.set()
        assert [(await task)[0] for task in waiting] == [200, 200, 200]
        assert (await ask(here))[0] == 200
        here._serving.close()

    asyncio.run(run())
