"""One process serves everything, on uvicorn: for one machine and for small containers. Imports no Ray."""

from __future__ import annotations

import asyncio
import logging
import math
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import uvicorn
import uvloop

from raytower.errors import RaytowerError
from raytower.progress import log
from raytower.serving.conductor import Report, Served, Wanted
from raytower.serving.config import ServeConfig
from raytower.serving.control import Conducting, Member
from raytower.serving.door import AsgiApp, Message, Receive, Scope, Send, refuse, refuse_busy
from raytower.serving.keys import StoredKey
from raytower.serving.listening import base_url, check_port, shown_versions
from raytower.serving.local import EngineHolder, Serving
from raytower.serving.placements import PlacedParts
from raytower.serving.plan import check_start
from raytower.serving.protocol import PROTOCOL
from raytower.serving.resolve import newest_version, resolve_settings

_ORIGIN = "here"
_ROLE = "search"


def serve_here(config: ServeConfig) -> dict[str, Any]:
    """The job with `server: uvicorn`: serve until SIGINT or SIGTERM; SIGHUP moves collections on.

    Returns:
        url, index_version, collections with the index versions served last, seconds.

    Raises:
        InputError: what cannot be served, a taken port, an empty key variable. FormatError: another encoder's index.
    """
    config = config.model_copy(update={"port": check_port(config.host, config.port)})
    active, keys = check_start(config)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_serve(config, active, keys))


async def _serve(config: ServeConfig, active: Mapping[str, Served], keys: list[StoredKey]) -> dict[str, Any]:
    started = time.monotonic()
    here = Here(config, keys)
    url = base_url(config) + config.route_prefix.rstrip("/")
    ended = asyncio.Event()
    hung_up = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, ended.set)
    loop.add_signal_handler(signal.SIGHUP, hung_up.set)
    try:
        await _unless(ended, here.start(active))
        if ended.is_set():
            return _result(url, here, started)
        server = _Server(_uvicorn_config(config, here))
        running = asyncio.create_task(server.serve())
        while not server.started and not running.done():
            await asyncio.sleep(0.01)
        log(f"serving {shown_versions(here.versions())} at {url}/ (the search page); stop with Ctrl-C")
        while not ended.is_set() and not running.done():
            await _first(ended.wait(), hung_up.wait(), running)
            if hung_up.is_set():
                hung_up.clear()
                await _reload_all(here)
        log("stopping")
        result = _result(url, here, started)
        here.draining = True
        await asyncio.sleep(config.drain_s)
        server.should_exit = True
        await running
        return result
    finally:
        await here.close()


class Here:
    """A conductor, its one member and the application, in this process."""

    def __init__(self, config: ServeConfig, keys: list[StoredKey]) -> None:
        self._config = config
        self.conducting = Conducting(
            _ORIGIN,
            [_ROLE],
            _resolve,
            newest_version,
            watch_s=config.watch_s,
            linger_s=0.0,
            prepare_timeout_s=config.start_timeout_s,
            adopt_s=0.0,
        )
        self._serving = Serving(config, keys, self.conducting, PlacedParts)
        self._engine = self._serving.engine
        self._app: AsgiApp = self._serving.app
        self._prefix = config.route_prefix.rstrip("/")
        self.draining = False
        self._requests = 0
        self._most_requests = config.max_ongoing_requests + config.max_queued_requests

        async def poll(report: Report, wait_s: float) -> Wanted:
            return await self.conducting.poll(_ORIGIN, report, wait_s)

        self._member = Member("here", _ROLE, EngineHolder(self._engine), poll)

    async def start(self, active: Mapping[str, Served]) -> None:
        """Until everything is served. Raises RaytowerError."""
        await self.conducting.start(active)
        self._member.start()
        await self._member.ready()

    async def close(self) -> None:
        await self._member.close()
        await self.conducting.close()
        self._serving.close()

    def versions(self) -> dict[str, str]:
        """The index version of each collection."""
        return {name: generation.index_version for name, generation in self._engine.active().items()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The application below the route prefix; while it stops, it says so."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"]
        if self._prefix and path != self._prefix and not path.startswith(f"{self._prefix}/"):
            message = f"there is no {path!r} here"
            await refuse(send, 404, message, "invalid_request_error", "not_found")
        elif self.draining and not path.endswith("/healthz"):
            message = "the server is stopping; ask another one"
            await refuse(_closing(send), 503, message, "server_error", "draining", retry=True)
        elif self._requests >= self._most_requests:
            await refuse_busy(send)
        else:
            self._requests += 1
            try:
                await self._app({**scope, "root_path": self._prefix}, receive, send)
            finally:
                self._requests -= 1


def _closing(send: Send) -> Send:
    """Ends the connection after the answer."""

    async def closing(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
        await send(message)

    return closing


class _Server(uvicorn.Server):
    """uvicorn, which leaves signals to us."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Nothing is taken from the job's handlers."""
        yield


def _uvicorn_config(config: ServeConfig, app: AsgiApp) -> uvicorn.Config:
    # It warns of every request that offers HTTP/2, and of every one that cannot be read.
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    return uvicorn.Config(
        app,
        host=config.host,
        port=config.port,
        http=PROTOCOL,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=512,
        timeout_graceful_shutdown=math.ceil(config.end_s),
    )


async def _resolve(collection: str, settings: Mapping[str, Any], version: str | None) -> Served:
    return await asyncio.to_thread(resolve_settings, collection, settings, version)


async def _reload_all(here: Here) -> None:
    for name in here.versions():
        try:
            await here.conducting.reload({"collection": name})
        except RaytowerError as error:
            log(f"warning: {error}")
    log(f"serving {shown_versions(here.versions())}")


async def _unless(ended: asyncio.Event, work: Any) -> None:
    """Until `work` has ended, which is given up when `ended` comes first. Raises what it raises."""
    task = asyncio.ensure_future(work)
    waiting = asyncio.ensure_future(ended.wait())
    await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if not task.done():
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        return
    task.result()


async def _first(*works: Any) -> None:
    """Until the first of several has ended."""
    tasks = [asyncio.ensure_future(work) for work in works]
    _, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in pending:
        if task not in works:
            task.cancel()


def _result(url: str, here: Here, started: float) -> dict[str, Any]:
    versions = here.versions()
    return {
        "url": url,
        "index_version": next(iter(versions.values()), None),
        "collections": versions,
        "seconds": round(time.monotonic() - started, 3),
    }
