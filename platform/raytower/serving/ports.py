"""What Ray Serve lacks: a door before its proxy, limits of a request's head, and replicas that listen on loopback.

Of Serve's private parts only `replica.add_port_to_grpc_server` is used: there is no setting for the address of a
replica's gRPC port.
"""

from __future__ import annotations

import os
from typing import Any

import ray
import uvicorn.config
from ray._common.tls_utils import add_port_to_grpc_server
from ray.serve._private import replica
from starlette.middleware import Middleware

from raytower.serving.door import DOOR_VARIABLE, Door, DoorSettings
from raytower.serving.protocol import PROTOCOL_NAME

_CALLBACK_VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"


def proxy_environment(settings: DoorSettings) -> dict[str, str]:
    """What Serve's proxies find in their environment: they call `open_door` before they listen."""
    return {_CALLBACK_VARIABLE: f"{__name__}.{open_door.__name__}", DOOR_VARIABLE: settings.to_json()}


def open_door() -> list[Middleware]:
    """Make this process's uvicorn read requests by BoundedHeads, and put the door before what it serves.

    uvicorn's own takes heads of any size and for any time, and reads nothing behind a request that offers HTTP/2.
    """
    uvicorn.config.HTTP_PROTOCOLS["auto"] = PROTOCOL_NAME
    return [Middleware(Door, DoorSettings.from_json(os.environ.get(DOOR_VARIABLE, "{}")))]


def keep_replica_local() -> None:
    """Bind this replica's gRPC port, which Serve opens on all interfaces, to loopback if that is the node's address."""
    if ray.util.get_node_ip_address() == "127.0.0.1":
        replica.add_port_to_grpc_server = _add_local_port


def _add_local_port(server: Any, address: str) -> int:
    return add_port_to_grpc_server(server, address.replace("[::]", "127.0.0.1"))
