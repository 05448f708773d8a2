"""One request and what its route needs to answer it: the body, the collection, the deadline, the engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar
from urllib.parse import parse_qsl

from raytower.serving.access_log import RequestFacts
from raytower.serving.calls import (
    Answer,
    ClassifyCall,
    EmbedCall,
    Engine,
    RerankCall,
    SearchAnswer,
    SearchCall,
    ServedCollection,
    SimilarityCall,
)
from raytower.serving.errors import NotFoundError, UnprocessableError
from raytower.serving.http.bodies import check_content_type, parse_json
from raytower.serving.http.requests import RequestT, check_timeout, read_request, shown
from raytower.serving.http.security import Access
from raytower.serving.http_config import HttpConfig
from raytower.serving.work import Deadline

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
AsgiApp = Callable[[Scope, Receive, Send], Awaitable[None]]
CallT = TypeVar("CallT")
AnswerT = TypeVar("AnswerT", bound=Answer)
ResultT = TypeVar("ResultT")

TIMEOUT_HEADER = "x-raytower-timeout-ms"
ARRIVAL_HEADER = "x-raytower-arrival"
"""Set by our proxy: seconds since 1970 at which the request arrived there."""
# Smaller bodies are read faster than a thread is found.
_THREAD_BYTES = 64 * 1024


class Metrics(Protocol):
    """Is told of every request, and gives the text of /metrics."""

    def record(self, facts: RequestFacts) -> None: ...

    def render(self) -> tuple[bytes, str]:
        """The text of all metrics, and its content type."""


class Control(Protocol):
    """What the admin routes ask for. Each may raise ApiError."""

    async def status(self) -> Mapping[str, Any]:
        """What every member serves and has prepared."""

    async def reload(self, wanted: Mapping[str, Any]) -> Mapping[str, Any]:
        """Swap to what `wanted` names (the body's fields); ends once all members have swapped, or none."""

    async def rollback(self, wanted: Mapping[str, Any]) -> Mapping[str, Any]:
        """Swap back to the generation before."""


class ClientGone(Exception):
    """The client closed its connection before it was answered."""


@dataclass(kw_only=True)
class Parts:
    """What all requests of an application share."""

    engine: Engine
    config: HttpConfig
    metrics: Metrics | None = None
    control: Control | None = None


@dataclass(kw_only=True)
class Exchange:
    """One request, from its head to its answer."""

    parts: Parts
    scope: Scope
    receive: Receive
    access: Access
    facts: RequestFacts
    start: float
    """When the request arrived, on the monotonic clock."""
    body: bytes = b""
    parameters: Mapping[str, str] = field(default_factory=dict)
    """Parts of the path by their names."""
    answer: Answer | None = None
    """What the engine answered."""

    @property
    def engine(self) -> Engine:
        return self.parts.engine

    @property
    def config(self) -> HttpConfig:
        return self.parts.config

    @property
    def collection(self) -> str:
        """The collection that the path names, or the default one. Raises NotFoundError, naming those there are."""
        names = self.engine.collections
        name = self.parameters.get("collection", names[0] if names else "")
        if name not in names:
            raise NotFoundError(
                f"there is no collection {name[:80]!r}; there are {', '.join(names) or 'none'}"
            )
        self.facts.collection = name
        return name

    def served(self) -> ServedCollection:
        """What the collection serves now. Raises NotFoundError, NotReadyError."""
        return self.engine.served(self.collection)

    def header(self, name: str) -> str:
        """A header's value; empty where there is none."""
        return header(self.scope, name)

    def query(self) -> dict[str, str]:
        """The parameters behind the question mark; of one that comes twice the last."""
        text = self.scope.get("query_string", b"").decode("latin-1")
        return dict(parse_qsl(text, keep_blank_values=True, errors="replace"))

    async def read(self, kind: type[RequestT]) -> RequestT:
        """The body as a checked request. Raises ApiError."""
        return await self._parse(lambda value: read_request(kind, value, self.config.limits))

    async def value(self) -> Any:
        """The body's JSON. Raises ApiError."""
        return await self._parse(lambda value: value)

    async def _parse(self, convert: Callable[[Any], ResultT]) -> ResultT:
        """In a thread where the body is large: a million numbers take a second, in which nobody else was answered."""
        check_content_type(self.header("content-type"))
        if len(self.body) < _THREAD_BYTES:
            return convert(parse_json(self.body))
        return await asyncio.to_thread(lambda: convert(parse_json(self.body)))

    def deadline(self, timeout_ms: int | None = None) -> Deadline:
        """The smaller of the body's and the header's time, else the server's; from the arrival. Raises ApiError."""
        asked = [timeout for timeout in (timeout_ms, self._header_timeout()) if timeout is not None]
        return Deadline(self.start, min(asked, default=self.config.timeout_ms))

    def _header_timeout(self) -> int | None:
        text = self.header(TIMEOUT_HEADER).strip()
        if not text:
            return None
        if not (text.isascii() and text.isdigit()) or not text.strip("0"):
            raise UnprocessableError(
                f"{TIMEOUT_HEADER}: is {shown(text)}; it must be milliseconds, at least 1"
            )
        timeout = int(text) if len(text) < 20 else 10**20
        check_timeout(TIMEOUT_HEADER, timeout, self.config.limits)
        return timeout

    async def ask(
        self,
        method: Callable[[str, CallT, Deadline], Coroutine[Any, Any, AnswerT]],
        call: CallT,
        deadline: Deadline,
    ) -> AnswerT:
        """The engine's answer; the call is cancelled at the deadline or when the client leaves.

        Raises:
            OutOfTimeError: at the deadline. ClientGone. What the call raises.
        """
        facts = self.facts
        facts.texts = _texts_of(call)
        facts.num_queries = (
            len(call.token_ids) if isinstance(call, EmbedCall) and call.token_ids else len(facts.texts)
        )
        if isinstance(call, SearchCall):
            facts.k, facts.rerank_k = call.k, call.recall_k if call.rerank else 0
        answer = await self.watch(method(self.collection, call, deadline), deadline)
        self._note(answer)
        return answer

    def _note(self, answer: Answer) -> None:
        self.answer = answer
        facts = self.facts
        facts.generation, facts.index_version = answer.generation, answer.index_version
        facts.tokens, facts.truncated = answer.counts.tokens, answer.counts.truncated
        if isinstance(answer, SearchAnswer):
            facts.reranked_k, facts.missing_shards = answer.reranked_k, answer.missing_shards
            for name, milliseconds in answer.timings_ms.items():
                facts.add_stage(name, milliseconds / 1000)

    async def watch(self, call: Coroutine[Any, Any, ResultT], deadline: Deadline) -> ResultT:
        """As `ask`, for what is no answer of a collection."""
        if not deadline.remaining_s():
            call.close()
            raise deadline.exceeded()
        task = asyncio.ensure_future(call)
        gone = asyncio.ensure_future(self._disconnected())
        try:
            await asyncio.wait(
                {task, gone}, timeout=deadline.remaining_s(), return_when=asyncio.FIRST_COMPLETED
            )
            if task.done():
                return task.result()
            if gone.done():
                gone.result()
                raise ClientGone
            raise deadline.exceeded()
        finally:
            gone.cancel()
            if not task.done():
                task.cancel()
                # The call takes its work out of the queues while it is cancelled; nobody reads what it says then.
                task.add_done_callback(_forget)

    async def _disconnected(self) -> None:
        while (await self.receive())["type"] != "http.disconnect":
            pass


def _texts_of(call: object) -> Sequence[str]:
    """The texts of an engine's call; an id is one too."""
    match call:
        case SearchCall():
            return call.queries
        case EmbedCall() | ClassifyCall():
            return call.texts
        case RerankCall():
            return (call.query, *call.documents)
        case SimilarityCall():
            return [text for pair in call.pairs for text in pair]
        case _:
            return (str(call),)


def _forget(task: asyncio.Future[Any]) -> None:
    if not task.cancelled():
        task.exception()


def header(scope: Scope, name: str) -> str:
    """A header's value, those of several lines joined; empty where there is none."""
    wanted = name.encode("latin-1")
    return ", ".join(value.decode("latin-1") for key, value in scope["headers"] if key.lower() == wanted)


def arrival(scope: Scope, max_age_s: float) -> float:
    """When a request arrived, on the monotonic clock: at our proxy if it says so, at most `max_age_s` ago; else now.

    A replica may run on another machine than the proxy, so the proxy tells the time of day.
    """
    now = time.monotonic()
    told = (scope.get("state") or {}).get(ARRIVAL_HEADER) or header(scope, ARRIVAL_HEADER)
    try:
        age = time.time() - float(told) if told else 0.0
    except ValueError:
        return now
    return now - min(max(age, 0.0), max_age_s) if age == age else now
