"""An application behind a real uvicorn on loopback, in a thread of this process."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from raytower.serving.protocol import BoundedHeads


@contextmanager
def listening(app: Any) -> Iterator[int]:
    """The port on which the application answers."""
    config = uvicorn.Config(
        app, host="127.0.0.1", port=0, http=BoundedHeads, log_level="error", lifespan="on"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        end = time.monotonic() + 60
        while not server.started:
            assert thread.is_alive(), "the server ended before it listened"
            assert time.monotonic() < end, "the server did not listen in time"
            time.sleep(0.01)
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(30)
