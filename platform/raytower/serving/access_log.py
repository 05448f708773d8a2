"""What one request was: its id, the facts that its route fills in, and a line of JSON about it when it has ended.

`RequestLog` is the outermost layer of the application. It gives each request an id and a `RequestFacts`, which
`current()` returns everywhere below, and hands the facts to whoever wants them when the answer is out: the access log,
the metrics (`metrics.py`), spans (`observe.py`). So a stage is timed once, and all of them see the same times.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import re
import sys
import threading
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from pydantic import Field

from raytower.config import Config
from raytower.errors import InputError

_LOGGER = logging.getLogger("raytower.serving")

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
AsgiApp = Callable[[Scope, Receive, Send], Awaitable[None]]

UNMATCHED = "unmatched"  # the route of a path that no route has; paths themselves are not counted by
CLIENT_LEFT = 499  # nginx's number for a caller who hung up before the answer
PROBES = frozenset({"/healthz", "/readyz", "/metrics"})
_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
_MAX_TEXT = 1000  # characters of a text that are logged
_MAX_PATH = 200
_JSON = json.JSONEncoder(
    ensure_ascii=True, separators=(",", ":")
)  # `json.dumps` would make one for each line


class AccessLogConfig(Config):
    """One line of JSON for each request. Texts stay out of it unless they are asked for."""

    shorthand = "path"

    path: str | None = None
    """File to append to, which all replicas of a machine share; null writes none. `-` is standard output, which Ray
    keeps to itself: it is for `server: uvicorn`."""
    log_texts: bool = Field(
        default=False, description=f"Whether queries and texts are logged, {_MAX_TEXT} characters of each."
    )


@dataclass(frozen=True)
class Stage:
    """A part of a request's work, by the clock of `time.time_ns`."""

    name: str
    started_ns: int
    ended_ns: int

    @property
    def seconds(self) -> float:
        return (self.ended_ns - self.started_ns) / 1e9


@dataclass
class RequestFacts:
    """What is known of one request. The route fills it in; one that ended early has what was known by then."""

    request_id: str
    method: str = ""
    path: str = ""
    route: str | None = None
    """Template of the route, such as `/v1/{collection}/search`; never the path, of which there are endless many."""
    status: int | None = None
    started_ns: int = 0
    ended_ns: int = 0
    traceparent: str | None = None
    trace_id: str | None = None
    key: str | None = None
    """Name of the API key, never the key."""
    error: str | None = None
    """The `code` of an error's answer."""
    collection: str | None = None
    """Name of a collection that exists."""
    index_version: str | None = None
    generation: str | None = None
    num_queries: int | None = None
    """Queries of a search, texts of any other request."""
    k: int | None = None
    rerank_k: int | None = None
    """Documents of each query that were to be reranked; 0 where none was asked for or no reranker is served."""
    reranked_k: int | None = None
    """Documents of each query that were reranked."""
    missing_shards: Sequence[int] = ()
    tokens: int = 0
    truncated: int = 0
    """Texts that were cut to the model's length."""
    texts: Sequence[str] = ()
    """The queries or texts, for logs that were asked for them."""
    body_bytes: int = 0
    answer_bytes: int = 0
    stages: list[Stage] = field(default_factory=list)
    failed_in: str | None = None
    """The stage that an error came out of."""

    def add_stage(self, name: str, seconds: float) -> None:
        """A stage that has just ended and that something else timed, such as the wait for a batch."""
        now = time.time_ns()
        self.stages.append(Stage(name, now - int(seconds * 1e9), now))

    @property
    def seconds(self) -> float:
        return (self.ended_ns - self.started_ns) / 1e9

    @property
    def late(self) -> bool:
        """Whether the deadline passed before the answer was there."""
        return self.status == 504


_FACTS: ContextVar[RequestFacts | None] = ContextVar("raytower_request_facts", default=None)


def current() -> RequestFacts:
    """The facts of the request that this code works for. Outside of one: facts that nobody reads."""
    return _FACTS.get() or RequestFacts(request_id="")


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Times a stage of the current request: encode, recall, fetch or rerank."""
    facts = current()
    started = time.time_ns()
    # Clocks of the day are set back now and then; the monotonic one says how long it took.
    since = time.perf_counter_ns()
    try:
        yield
    except BaseException:
        facts.failed_in = facts.failed_in or name
        raise
    finally:
        facts.stages.append(Stage(name, started, started + time.perf_counter_ns() - since))


class RequestLog:
    """The outermost layer: ids, facts, and `observers`, which are called with the facts when the answer is out.

    An id comes from `x-request-id` where that is 1 to 128 letters, digits or `._:/+=@-`; anything else is replaced,
    since ids go to logs and headers. Every answer carries it.
    """

    def __init__(self, app: AsgiApp, observers: Sequence[Callable[[RequestFacts], None]] = ()) -> None:
        self._app = app
        self._observers = tuple(observers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        facts = _begin(scope)
        since = time.perf_counter_ns()

        async def watched_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                facts.status = message["status"]
                headers = [pair for pair in message.get("headers", ()) if pair[0].lower() != b"x-request-id"]
                headers.append((b"x-request-id", facts.request_id.encode()))
                message = {**message, "headers": headers}
            await send(message)

        token = _FACTS.set(facts)
        try:
            await self._app(scope, receive, watched_send)
        except Exception:
            # An answer that has begun cannot become a 500 any more, but it was none that the caller could use.
            facts.status = 500
            raise
        finally:
            _FACTS.reset(token)
            facts.ended_ns = facts.started_ns + time.perf_counter_ns() - since
            facts.status = facts.status or CLIENT_LEFT
            facts.route = facts.route or UNMATCHED
            self._tell(facts)

    def _tell(self, facts: RequestFacts) -> None:
        for observer in self._observers:
            try:
                observer(facts)
            except Exception:
                # The answer is out already: an observer's fault must not close the caller's connection.
                _LOGGER.exception("request %s could not be recorded", facts.request_id)


def _begin(scope: Scope) -> RequestFacts:
    headers = {key.lower(): value for key, value in reversed(scope["headers"])}
    given = headers.get(b"x-request-id", b"").decode("latin-1")
    traceparent = headers.get(b"traceparent")
    return RequestFacts(
        request_id=given if _ID.fullmatch(given) else uuid.uuid4().hex,
        method=scope["method"],
        path=scope["path"],
        started_ns=time.time_ns(),
        traceparent=traceparent.decode("latin-1") if traceparent else None,
    )


# --- lines ----------------------------------------------------------------------------------------------------


def describe(facts: RequestFacts, *, log_texts: bool = False) -> str:
    """A request as one line of JSON in ASCII, without what is not known of it."""
    stages: dict[str, float] = {}
    for part in facts.stages:
        stages[part.name] = stages.get(part.name, 0.0) + part.seconds * 1e3
    line: dict[str, Any] = {
        "time": datetime.fromtimestamp(facts.started_ns / 1e9, UTC).isoformat(timespec="milliseconds"),
        "id": facts.request_id,
        "trace": facts.trace_id,
        "method": facts.method,
        "route": facts.route,
        "path": facts.path[:_MAX_PATH] if facts.route == UNMATCHED else None,
        "collection": facts.collection,
        "status": facts.status,
        "ms": round(facts.seconds * 1e3, 3),
        "stages_ms": {name: round(value, 3) for name, value in stages.items()} or None,
        "failed_in": facts.failed_in,
        "error": facts.error,
        "queries": facts.num_queries,
        "k": facts.k,
        "bytes_in": facts.body_bytes or None,
        "bytes_out": facts.answer_bytes or None,
        "rerank_k": facts.rerank_k,
        "reranked_k": facts.reranked_k,
        "missing_shards": list(facts.missing_shards) or None,
        "tokens": facts.tokens or None,
        "truncated": facts.truncated or None,
        "index_version": facts.index_version,
        "generation": facts.generation,
        "key": facts.key,
        "texts": [text[:_MAX_TEXT] for text in facts.texts] if log_texts and facts.texts else None,
    }
    known = {name: value for name, value in line.items() if value is not None}
    return _JSON.encode(known)


class AccessLog:
    """Writes lines in a thread of its own, so that a full disk or a slow pipe holds up no request.

    At most `max_waiting` lines wait. Where more come, they are left out, and the next line that is written says how
    many. A file that was moved away, as logrotate does, is begun anew.
    """

    def __init__(self, config: AccessLogConfig, max_waiting: int = 10_000) -> None:
        self._path = config.path or "-"
        self._log_texts = config.log_texts
        self._waiting: queue.Queue[str | None] = queue.Queue(max_waiting)
        self._dropped = 0  # counted by `record` alone
        self._lost = 0  # counted by the thread alone
        self._told = 0
        self._file = self._open()
        self._thread = threading.Thread(target=self._write_all, name="access-log", daemon=True)
        self._thread.start()

    def record(self, facts: RequestFacts) -> None:
        """Takes a request that has ended. Probes that went well are left out: they come every second."""
        if facts.route in PROBES and (facts.status or 0) < 400:
            return
        try:
            self._waiting.put_nowait(describe(facts, log_texts=self._log_texts))
        except queue.Full:
            self._dropped += 1

    def close(self, timeout_s: float = 2.0) -> None:
        """Writes what waits, for at most `timeout_s` seconds."""
        try:
            self._waiting.put(None, timeout=timeout_s)
        except queue.Full:
            return
        self._thread.join(timeout_s)

    def _write_all(self) -> None:
        while (line := self._waiting.get()) is not None:
            missing = self._dropped + self._lost
            if missing > self._told:
                line = f'{{"dropped_lines":{missing - self._told}}}\n{line}'
            try:
                self._reopen()
                # One call for each line: lines of several replicas that append to one file do not mix.
                _write(self._file, f"{line}\n".encode("ascii"))
                self._told = missing
            except OSError as error:
                self._lost += 1
                _LOGGER.error("a line of the access log was lost: %s", error.strerror)
        if self._path != "-":
            os.close(self._file)

    def _open(self) -> int:
        if self._path == "-":
            return sys.stdout.fileno()
        try:
            return os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
        except OSError as error:
            raise InputError(
                f"access_log.path {self._path!r} cannot be written: {error.strerror}; "
                "name a file in a folder that exists"
            ) from error

    def _reopen(self) -> None:
        if self._path == "-":
            return
        try:
            there, held = os.stat(self._path), os.fstat(self._file)
            if (there.st_dev, there.st_ino) == (held.st_dev, held.st_ino):
                return
        except FileNotFoundError:
            pass
        try:
            fresh = self._open()
        except InputError as error:
            _LOGGER.error("%s; the former file is written on", error)
            return
        os.close(self._file)
        self._file = fresh


def _write(file: int, line: bytes) -> None:
    while line:
        line = line[os.write(file, line) :]
