"""What stands before Serve's proxy: it takes a request's body in time, bounds what waits, and speaks for lost replicas.

The proxy itself answers in plain text: 404 where an application is being stopped, 500 where a replica has died. Here
that becomes a second try on another replica, or an answer in the shape of the interface. Knows neither Ray nor models.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
AsgiApp = Callable[[Scope, Receive, Send], Awaitable[None]]

ARRIVAL_HEADER = b"x-raytower-arrival"
"""Seconds since 1970 at which the request arrived; what a client says of it is taken out."""
REPLICA_HEADER = b"x-raytower-replica"
"""The route prefix of the application whose replica has answered; it goes no further than the door."""
DOOR_VARIABLE = "RAYTOWER_DOOR"
"""Environment variable of the proxy that holds `DoorSettings` as JSON."""
_TIMEOUT_HEADER = b"x-raytower-timeout-ms"
_TIMEOUT_IN_BODY = re.compile(rb'"timeout_ms"\s*:\s*([0-9]{1,9})\b')
_REQUEST_ID = b"x-request-id"
# Paths of the proxy's own, and of what may take minutes and is not to be done twice.
_PROXY_PATHS = ("/-/healthz", "/-/routes")
_ADMIN = "/v1/admin/"
# A replica answers by the deadline itself; past it and this much more, its answer is not waited for.
_SPARE_S = 0.25
_RETRY_PAUSE_S = 0.05


@dataclass(frozen=True)
class DoorSettings:
    """What the door lets in. `timeout_ms` is for requests that name no time of their own."""

    timeout_ms: int = 2000
    max_timeout_ms: int = 60_000
    body_timeout_ms: int = 10_000
    max_body_bytes: int = 4 * 2**20
    max_requests: int = 2048
    max_held_bytes: int = 256 * 2**20

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> DoorSettings:
        return DoorSettings(**json.loads(text))


@dataclass
class _Answer:
    """An answer of the proxy's own, in place of a replica's."""

    status: int = 0
    body: bytes = b""
    """Its beginning."""


class Door:
    """An ASGI middleware. Its state is one event loop's."""

    def __init__(self, app: AsgiApp, settings: DoorSettings) -> None:
        self._app = app
        self._settings = settings
        self._num_requests = 0
        self._held_bytes = 0
        self._prefixes: set[str] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in _PROXY_PATHS:
            await self._app(scope, receive, send)
            return
        if self._num_requests >= self._settings.max_requests:
            await refuse_busy(send)
            return
        self._num_requests += 1
        request = _Request(scope, receive, self._settings)
        try:
            await self._take(request, send)
        finally:
            self._num_requests -= 1
            self._held_bytes -= request.held_bytes

    async def _take(self, request: _Request, send: Send) -> None:
        settings = self._settings
        try:
            async with asyncio.timeout(settings.body_timeout_ms / 1000):
                async for size in request.read():
                    self._held_bytes += size
                    if self._held_bytes > settings.max_held_bytes:
                        await refuse_busy(send)
                        return
        except TimeoutError:
            message = f"the body did not arrive within {settings.body_timeout_ms} ms"
            await refuse(send, 408, message, "invalid_request_error", "body_too_slow", close=True)
            return
        except _TooLargeError:
            message = f"the body is larger than {settings.max_body_bytes} bytes"
            await refuse(send, 413, message, "invalid_request_error", "too_large", close=True)
            return
        if not request.has_left:
            await self._forward(request, send)

    async def _forward(self, request: _Request, send: Send) -> None:
        """Hand the request to a replica; where the proxy answers in its place, to another, until the time is up."""
        while True:
            gate = _Gate(send)
            try:
                async with asyncio.timeout_at(request.until):
                    await self._app(request.scope, request.replay(), gate.send)
            except TimeoutError:
                if gate.is_open:
                    raise
                # A replica that lives says by then that it is late. None has this request, or it has died.
                message = f"no replica has answered within {request.timeout_ms} ms; try again"
                await refuse(send, 503, message, "server_error", "not_ready", retry=True)
                return
            if gate.is_open:
                if gate.prefix is not None:
                    self._prefixes.add(gate.prefix)
                return
            if gate.answer.status != 500 or not request.may_be_repeated():
                await self._speak_for(gate.answer, request, send)
                return
            await asyncio.sleep(_RETRY_PAUSE_S)

    async def _speak_for(self, answer: _Answer, request: _Request, send: Send) -> None:
        """Say what the proxy said in its own words, in the interface's."""
        path = request.scope["path"]
        # Until a replica has answered, nobody knows what is there: the proxy listens before its applications are up.
        is_known = not self._prefixes or any(_is_below(path, prefix) for prefix in self._prefixes)
        if answer.status == 404 and not is_known:
            message = f"there is no {path!r} here"
            await refuse(send, 404, message, "invalid_request_error", "not_found")
        elif answer.status == 404:
            message = "the server is stopping, or being started again; try again"
            await refuse(send, 503, message, "server_error", "not_ready", retry=True)
        elif answer.status in (429, 503) and b"ackpressure" in answer.body:
            await refuse_busy(send)
        elif answer.status in (408, 504):
            await refuse(send, 504, "no answer in time", "timeout_error", "out_of_time")
        else:
            message = "the replica that had this request has ended; try again"
            await refuse(send, 503, message, "server_error", "not_ready", retry=True)


class _TooLargeError(Exception):
    pass


class _Request:
    """One request: its scope with the time of its arrival, and its body, which can be given more than once."""

    def __init__(self, scope: Scope, receive: Receive, settings: DoorSettings) -> None:
        headers = [(name, value) for name, value in scope["headers"] if name.lower() != ARRIVAL_HEADER]
        headers.append((ARRIVAL_HEADER, f"{time.time():.6f}".encode()))
        self.scope: Scope = {**scope, "headers": headers}
        self.has_left = False
        self.held_bytes = 0
        self._receive = receive
        self._settings = settings
        self._arrived = asyncio.get_running_loop().time()
        self._body = bytearray()
        self.num_tries = 0

    async def read(self) -> Any:
        """Take in the body, and yield the bytes of each part. Raises _TooLargeError."""
        length = _header(self.scope, b"content-length")
        if length.isdigit() and int(length) > self._settings.max_body_bytes:
            raise _TooLargeError
        more = True
        while more:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                self.has_left = True
                return
            part = message.get("body", b"")
            more = message.get("more_body", False)
            self._body += part
            self.held_bytes += len(part)
            if len(self._body) > self._settings.max_body_bytes:
                raise _TooLargeError
            yield len(part)

    @property
    def timeout_ms(self) -> int:
        """What the client gave for the answer: in a header, in the body, or nothing."""
        stated = _header(self.scope, _TIMEOUT_HEADER)
        found = _TIMEOUT_IN_BODY.search(self._body)
        given = [int(text) for text in (stated, found[1] if found else b"") if text.isdigit()]
        return min(min(given, default=self._settings.timeout_ms), self._settings.max_timeout_ms)

    @property
    def until(self) -> float | None:
        """When an answer is not waited for any longer, on the loop's clock."""
        if _ADMIN in self.scope["path"]:
            return None
        # Where a replica has died, nobody else watches the time.
        spare_s = 0.0 if self.num_tries else _SPARE_S
        return self._arrived + self.timeout_ms / 1000 + spare_s

    def may_be_repeated(self) -> bool:
        """Whether another replica may be asked; every try but the first counts."""
        self.num_tries += 1
        late = asyncio.get_running_loop().time() > self._arrived + self.timeout_ms / 1000
        return self.num_tries <= 3 and _ADMIN not in self.scope["path"] and not late

    def replay(self) -> Receive:
        given = False

        async def receive() -> Message:
            nonlocal given
            if given:
                return await self._receive()
            given = True
            return {"type": "http.request", "body": bytes(self._body), "more_body": False}

        return receive


class _Gate:
    """Lets a replica's answer through, and holds back what the proxy says in its place.

    The head of an answer waits for what follows it: of a replica that dies in between the proxy says nothing more, and
    the client would be left with a head alone. So another replica can still be asked.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self._head: Message | None = None
        self.is_open = False
        self.prefix: str | None = None
        self.answer = _Answer()

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start" and not self.is_open:
            headers = list(message["headers"])
            prefix = next((value for name, value in headers if name.lower() == REPLICA_HEADER), None)
            if prefix is not None:
                self._head, self.prefix = {**message, "headers": _cleaned(headers)}, prefix.decode("latin-1")
                self.answer = _Answer(500)  # if nothing follows
            else:
                self._head, self.answer = None, _Answer(message["status"])
            return
        if self._head is not None:
            self.is_open = True
            await self._send(self._head)
            self._head = None
        if self.is_open:
            await self._send(message)
        elif message["type"] == "http.response.body" and len(self.answer.body) < 4096:
            self.answer.body += message.get("body", b"")


def _cleaned(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Without the replica's mark, and with one request id: the proxy adds its own to the application's."""
    kept: list[tuple[bytes, bytes]] = []
    for name, value in headers:
        known = {item for item, _ in kept}
        if name.lower() != REPLICA_HEADER and not (
            name.lower() == _REQUEST_ID and _REQUEST_ID in {item.lower() for item in known}
        ):
            kept.append((name, value))
    return kept


async def refuse(
    send: Send, status: int, message: str, type: str, code: str, *, retry: bool = False, close: bool = False
) -> None:
    """Answer with an error in the interface's shape."""
    body = json.dumps({"error": {"message": message, "type": type, "code": code}}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(b"retry-after", b"1")] if retry else []
    headers += [(b"connection", b"close")] if close else []
    with suppress(OSError):
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": False})


async def refuse_busy(send: Send) -> None:
    """Answer that there is too much to do."""
    await refuse(send, 429, "the server is busy; try again", "rate_limit_error", "overloaded", retry=True)


def _header(scope: Scope, name: bytes) -> bytes:
    return next((bytes(value) for key, value in scope["headers"] if key.lower() == name), b"")


def _is_below(path: str, prefix: str) -> bool:
    return prefix in ("", "/") or path == prefix or path.startswith(f"{prefix}/")
