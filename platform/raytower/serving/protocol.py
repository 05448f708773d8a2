"""How uvicorn reads requests: with bounds on their heads, and deaf to offers of another protocol."""

from __future__ import annotations

import asyncio

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_TIMEOUT_S = 10.0
MAX_HEAD_BYTES = 65_536


class BoundedHeads(HttpToolsProtocol):
    """uvicorn's httptools protocol with what it lacks: limits on the size of a request's head and on the time it takes.

    A request that offers an upgrade to another protocol, as HTTP/2's clients do, is answered in this one.
    """

    _limit: asyncio.TimerHandle | None = None
    _in_head = False
    _in_second_head = False
    _head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait_for_head()

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        head = self.headers if self._in_head else None
        try:
            self._feed(data)
        except httptools.HttpParserError:
            self.send_400_response("Invalid HTTP request received.")
            return
        # A head that began within these bytes is counted from the next on.
        if self._in_head and self.headers is head:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self.send_400_response("The request's head is too large.")

    def _feed(self, data: bytes) -> None:
        while data:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as offer:
                data = data[offer.args[0] :]
                self._read_on()

    def _read_on(self) -> None:
        """Have the parser, which takes what follows a head with an offer for the other protocol, read it as a body."""
        lengths = [
            name + b": " + value + b"\r\n"
            for name, value in self.headers
            if name in (b"content-length", b"transfer-encoding")
        ]
        self._in_second_head = True
        self.parser.feed_data(b"".join([b"POST / HTTP/1.1\r\n", *lengths, b"\r\n"]))

    def on_message_begin(self) -> None:
        if self._in_second_head:
            return
        super().on_message_begin()
        self._in_head, self._head_bytes = True, 0
        self._wait_for_head()

    def on_url(self, url: bytes) -> None:
        if not self._in_second_head:
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_second_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self._in_second_head:
            self._in_second_head = False
            return
        self._in_head = False
        self._stop_waiting()
        hosts = sum(name == b"host" for name, _ in self.headers)
        if hosts != 1 and self.parser.get_http_version() == "1.1":
            raise ValueError("HTTP/1.1 asks for one Host header")  # which makes it a 400
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        if not self.parser.should_upgrade():
            super().on_message_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def _wait_for_head(self) -> None:
        if self._limit is None:  # more bytes of the same head earn no more time
            self._limit = self.loop.call_later(HEAD_TIMEOUT_S, self.transport.abort)

    def _stop_waiting(self) -> None:
        if self._limit is not None:
            self._limit.cancel()
            self._limit = None


PROTOCOL = BoundedHeads
PROTOCOL_NAME = f"{__name__}:{BoundedHeads.__name__}"
