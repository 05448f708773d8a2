"""How uvicorn reads requests: with bounds on their heads, and deaf to offers of another protocol."""

from __future__ import annotations

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_TIMEOUT_S = 10.0


class BoundedHeads(H11Protocol):
    """uvicorn's h11 protocol, which limits a request's head to 64 KiB, with a limit on the time a head may take too."""

    _limit: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait_for_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is h11.IDLE:
            self._wait_for_head()
        else:
            self._stop_waiting()

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
