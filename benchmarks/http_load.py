"""Clients that cost little, for a load from the same machine as the server's: what they compute, the server cannot.

HTTP/1.1 over connections that are kept, requests put together before the clock runs, answers read no further than their
status and length. aiohttp took as much of a core for a refusal as the server.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import urlsplit

import uvloop

SEED = 7
TIMEOUT_S = 120


@dataclass(frozen=True)
class Answered:
    """What one request came to: when it was sent (seconds from the start), how long it took, its status (0: none)."""

    sent: float
    took: float
    status: int


class _Connection(asyncio.Protocol):
    """One request at a time."""

    def __init__(self) -> None:
        self._held = bytearray()
        self._answer: asyncio.Future[int] | None = None
        self.closed = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._held += data
        end = self._held.find(b"\r\n\r\n")
        if end < 0:
            return
        head = bytes(self._held[:end]).lower()
        _, found, rest = head.partition(b"content-length:")
        if not found:
            raise ValueError(f"an answer without Content-Length: {head[:200]!r}")
        if len(self._held) < end + 4 + int(rest.split(b"\r\n", 1)[0]):
            return
        self._held.clear()
        if b"connection: close" in head:
            self._transport.close()
            self.closed = True
        self._end(int(head[9:12]))

    def connection_lost(self, error: Exception | None) -> None:
        self.closed = True
        self._end(0)

    def _end(self, status: int) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(status)

    def close(self) -> None:
        self._transport.close()

    async def ask(self, request: bytes) -> int:
        """The answer's status; 0 where there was none."""
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        timer = asyncio.get_running_loop().call_later(TIMEOUT_S, self.connection_lost, None)
        try:
            return await self._answer
        finally:
            timer.cancel()


class _Clients:
    def __init__(self, url: str, bodies: Sequence[dict[str, Any]]) -> None:
        parts = urlsplit(url)
        self._host, self._port = str(parts.hostname), int(parts.port or 80)
        self.requests = [_request(parts.netloc, parts.path, body) for body in bodies]
        self._idle: list[_Connection] = []
        self.start = time.perf_counter()
        self.answers: list[Answered] = []

    async def ask(self, request: bytes) -> None:
        sent = time.perf_counter()
        status = 0
        try:
            connection = await self._connection()
            status = await connection.ask(request)
            if not connection.closed:
                self._idle.append(connection)
        except OSError:
            pass
        self.answers.append(Answered(sent - self.start, time.perf_counter() - sent, status))

    async def _connection(self) -> _Connection:
        while self._idle:
            if not (connection := self._idle.pop()).closed:
                return connection
        _, made = await asyncio.get_running_loop().create_connection(_Connection, self._host, self._port)
        return made

    def close(self) -> None:
        for connection in self._idle:
            connection.close()


def _request(host: str, path: str, value: dict[str, Any]) -> bytes:
    body = json.dumps(value).encode()
    lines = [
        f"POST {path} HTTP/1.1",
        f"Host: {host}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
    ]
    return "\r\n".join([*lines, "", ""]).encode() + body


def closed_loop(url: str, bodies: list[dict[str, Any]], clients: int, seconds: float) -> list[Answered]:
    """Each client sends its next request when the last is answered."""

    async def run() -> list[Answered]:
        group = _Clients(url, bodies)

        async def client(number: int) -> None:
            draw = random.Random(number)
            while time.perf_counter() - group.start < seconds:
                await group.ask(draw.choice(group.requests))

        await asyncio.gather(*[client(number) for number in range(clients)])
        group.close()
        return group.answers

    return _run(run())


def open_loop(url: str, bodies: list[dict[str, Any]], rate: float, seconds: float) -> list[Answered]:
    """Requests at fixed times, `rate` a second, whatever comes back."""

    async def run() -> list[Answered]:
        group = _Clients(url, bodies)
        draw = random.Random(SEED)
        tasks = []
        for number in range(int(rate * seconds)):
            await asyncio.sleep(max(group.start + number / rate - time.perf_counter(), 0))
            tasks.append(asyncio.create_task(group.ask(draw.choice(group.requests))))
        await asyncio.gather(*tasks)
        group.close()
        return group.answers

    return _run(run())


def _run(work: Any) -> list[Answered]:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return cast("list[Answered]", runner.run(work))
