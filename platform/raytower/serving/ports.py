"""What Ray Serve lacks: a door before its proxy, limits of a request's head, and replicas that listen on loopback.

Of Serve's private parts only `replica.add_port_to_grpc_server` is used: there is no setting for the address of a
replica's gRPC port.
"""

from __future__ import annotations

import asyncio
import os
from typing import Any

import h11
import ray
import uvicorn.config
from ray._common.tls_utils import add_port_to_grpc_server
from ray.serve._private import replica
from starlette.middleware import Middleware
from uvicorn.protocols.http.h11_impl import H11Protocol

from raytower.serving.door import DOOR_VARIABLE, Door, DoorSettings

HEAD_TIMEOUT_S = 10.0
_CALLBACK_VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"


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


def proxy_environment(settings: DoorSettings) -> dict[str, str]:
    """What Serve's proxies find in their environment: they call `open_door` before they listen."""
    return {_CALLBACK_VARIABLE: f"{__name__}.{open_door.__name__}", DOOR_VARIABLE: settings.to_json()}


def open_door() -> list[Middleware]:
    """Make this process's uvicorn read requests by BoundedHeads, and put the door before what it serves.

    uvicorn's default, httptools, takes heads of any size, and loses the body of a request that offers HTTP/2.
    """
    uvicorn.config.HTTP_PROTOCOLS["auto"] = f"{__name__}:{BoundedHeads.__name__}"
    return [Middleware(Door, DoorSettings.from_json(os.environ.get(DOOR_VARIABLE, "{}")))]


def keep_replica_local() -> None:
    """Bind this replica's gRPC port, which Serve opens on all interfaces, to loopback if that is the node's address."""
    if ray.util.get_node_ip_address() == "127.0.0.1":
        replica.add_port_to_grpc_server = _add_local_port


def _add_local_port(server: Any, address: str) -> int:
    return add_port_to_grpc_server(server, address.replace("[::]", "127.0.0.1"))
