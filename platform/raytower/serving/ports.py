"""Limits that Ray Serve lacks: on the size and time of a request's head, and on where replicas listen."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
import ray
import uvicorn.config
from ray._common.tls_utils import add_port_to_grpc_server
from ray.serve._private import replica
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_TIMEOUT_S = 10.0
# Serve's proxies read this variable, and call what it names before they listen.
PROXY_ENVIRONMENT = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": f"{__name__}.bound_heads"}


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


def bound_heads() -> list[Any]:
    """Make this process's uvicorn read requests by BoundedHeads; its default, httptools, takes heads of any size.

    Returns:
        An empty list. Serve calls this function for middlewares; it is the one place to set the protocol.
    """
    uvicorn.config.HTTP_PROTOCOLS["auto"] = f"{__name__}:{BoundedHeads.__name__}"
    return []


def keep_replica_local() -> None:
    """Bind this replica's gRPC port, which Serve opens on all interfaces, to loopback if that is the node's address."""
    if ray.util.get_node_ip_address() == "127.0.0.1":
        replica.add_port_to_grpc_server = _add_local_port


def _add_local_port(server: Any, address: str) -> int:
    return add_port_to_grpc_server(server, address.replace("[::]", "127.0.0.1"))
