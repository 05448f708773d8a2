"""The server itself, on a free port of loopback and in this process: conductor, engine and application, without Ray."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from raytower.config import make_config
from raytower.serving.config import ServeConfig
from raytower.serving.plan import check_start
from raytower.serving.uvicorn_server import Here
from tests.support.http_server import listening


class RealServer:
    """An ASGI application that loads what its config names when it starts."""

    def __init__(self, config: ServeConfig) -> None:
        self._config = config
        self.here: Here | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "lifespan":
            assert self.here is not None
            await self.here(scope, receive, send)
            return
        await receive()
        active, keys = check_start(self._config)
        self.here = Here(self._config, keys)
        await self.here.start(active)
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self.here.close()
        await send({"type": "lifespan.shutdown.complete"})


@contextmanager
def serving(**values: Any) -> Iterator[str]:
    """The address of a server with these keys of `ServeConfig`."""
    config = make_config(ServeConfig, {"server": "uvicorn", **values}, "test")
    with listening(RealServer(config)) as port:
        yield f"http://127.0.0.1:{port}"
