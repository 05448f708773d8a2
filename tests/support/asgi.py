"""An application of ours asked without a socket."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from raytower.serving.http.application import Application


async def answered(
    app: Application, scope: Mapping[str, Any], body: Sequence[bytes], timeout_s: float
) -> tuple[int, bytes]:
    """Status and body of the answer to a request whose body comes in so many messages, and whose client stays."""
    last = len(body) - 1
    waiting = [
        {"type": "http.request", "body": part, "more_body": number < last} for number, part in enumerate(body)
    ]
    sent: list[Any] = []

    async def receive() -> Any:
        if waiting:
            return waiting.pop(0)
        await asyncio.sleep(3600)

    async def send(message: Any) -> None:
        sent.append(message)

    await asyncio.wait_for(app({"type": "http", **scope}, receive, send), timeout_s)
    return sent[0]["status"], sent[1]["body"]
