"""The HTTP application: from a connection's request to its answer, and what every request goes through on the way."""

from __future__ import annotations

import asyncio
import functools
import logging
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from starlette.middleware.cors import CORSMiddleware

from raytower.errors import InputError
from raytower.serving.access_log import RequestFacts, RequestLog, current
from raytower.serving.calls import Engine
from raytower.serving.errors import ApiError, SlowBodyError, TooLargeError
from raytower.serving.http import catalogue, comparing, embeddings, rerank, search
from raytower.serving.http.answers import HttpAnswer, dump, error_answer, error_value, json_answer
from raytower.serving.http.bodies import decompress
from raytower.serving.http.exchange import (
    TIMEOUT_HEADER,
    AsgiApp,
    ClientGone,
    Control,
    Exchange,
    Metrics,
    Parts,
    Receive,
    Scope,
    Send,
    arrival,
    header,
)
from raytower.serving.http.mcp import mcp
from raytower.serving.http.openapi import describe
from raytower.serving.http.routing import Found, Route, Router, path_of
from raytower.serving.http.security import Access, Doorkeeper, Key, check_security
from raytower.serving.http_config import HttpConfig
from raytower.serving.page import load_page

_LOGGER = logging.getLogger("raytower.serving")
_REQUEST_ID_HEADER = "x-request-id"
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
}
_EXPOSED = ("x-request-id", "x-raytower-generation", "x-raytower-truncated", "retry-after")
_ASKED = ("authorization", "content-type", TIMEOUT_HEADER, _REQUEST_ID_HEADER, "mcp-protocol-version")


def create_app(
    engine: Engine,
    config: HttpConfig,
    keys: Sequence[Key] = (),
    metrics: Metrics | None = None,
    control: Control | None = None,
    observers: Sequence[Callable[[RequestFacts], None]] = (),
) -> Application:
    """The ASGI application over an engine.

    `keys` are those that requests may bring, as `load_keys` gives them. `observers` are told of every request that has
    ended, as `metrics` is.

    Raises:
        InputError: the config asks for keys and there are none, or the server would be open to the network.
    """
    check_security(config)
    if config.security.has_keys and not keys:
        raise InputError("security names keys, but none was given to the application")
    told = [*([metrics.record] if metrics is not None else []), *observers]
    return Application(Parts(engine=engine, config=config, metrics=metrics, control=control), keys, told)


class Application:
    """An ASGI application."""

    def __init__(
        self, parts: Parts, keys: Sequence[Key], observers: Sequence[Callable[[RequestFacts], None]]
    ) -> None:
        self._parts = parts
        self._doorkeeper = Doorkeeper(parts.config, keys)
        self.routes = (*_work_routes(), *_open_routes(parts), *_admin_routes())
        self._has_keys = bool(keys)
        openapi = Route(method="GET", path="/openapi.json", handler=self._openapi)
        self._router = Router((*self.routes, openapi))
        http: AsgiApp = self._serve
        if origins := parts.config.security.cors_origins:
            http = CORSMiddleware(
                self._serve,
                allow_origins=list(origins),
                allow_methods=["GET", "POST"],
                allow_headers=_ASKED,
                expose_headers=_EXPOSED,
            )
        self._http = RequestLog(http, observers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._http(scope, receive, send)
        elif scope["type"] == "lifespan":
            await _live(receive, send)
        else:
            await send({"type": "websocket.close", "code": 1000})

    async def _openapi(self, exchange: Exchange) -> HttpAnswer:
        """This document."""
        return HttpAnswer(self._description)

    @functools.cached_property
    def _description(self) -> bytes:
        return dump(describe(self.routes, self._parts.config.limits, self._has_keys))

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        facts = current()
        facts.path = path_of(scope)
        with suppress(ClientGone):
            answer = await self._answer(scope, receive, facts)
            facts.answer_bytes = len(answer.body)
            await _send(answer, facts, send)

    async def _answer(self, scope: Scope, receive: Receive, facts: RequestFacts) -> HttpAnswer:
        try:
            return await self._find_and_run(scope, receive, facts)
        except ApiError as error:
            facts.error = error.code
            if error.status in (429, 503):
                error.headers.setdefault("Retry-After", "1")
            if error.status == 500:
                _LOGGER.error("request %s failed: %s", facts.request_id, error)
            return error_answer(error)
        except ClientGone:
            raise
        except Exception:
            # The message may hold paths or texts; the caller gets only the mark by which the log has it.
            mark = uuid.uuid4().hex[:12]
            _LOGGER.exception(
                "request %s %s failed, request id %s, id %s",
                facts.method,
                facts.path,
                facts.request_id,
                mark,
            )
            facts.error = "internal_error"
            message = f"an internal error occurred; the server's log has it under id {mark}"
            return json_answer(error_value(message, "server_error", "internal_error"), status=500)

    async def _find_and_run(self, scope: Scope, receive: Receive, facts: RequestFacts) -> HttpAnswer:
        found: Found | None = None
        problem: ApiError | None = None
        try:
            found = self._router.find(facts.method, facts.path)
            facts.route = found.route.path
        except ApiError as error:
            problem = error
        access = Access()
        if found is None or not found.route.is_open:
            # Strangers are not told which paths there are.
            access = self._doorkeeper.admit(header(scope, "authorization"), header(scope, "host"))
            facts.key = access.key.name if access.key else None
        if found is None:
            assert problem is not None
            raise problem
        if found.route.checks_origin:
            self._doorkeeper.check_origin(header(scope, "origin"), header(scope, "host"))
        with self._doorkeeper.within_limits(access):
            return await self._run(found, scope, receive, facts, access)

    async def _run(
        self, found: Found, scope: Scope, receive: Receive, facts: RequestFacts, access: Access
    ) -> HttpAnswer:
        limits = self._parts.config.limits
        start = arrival(scope, limits.max_timeout_ms / 1000)
        body = b""
        if facts.method == "POST":
            most = int(limits.max_body_bytes)
            raw = await _read_body(scope, receive, most, limits.body_timeout_ms)
            body = decompress(raw, header(scope, "content-encoding"), most)
            facts.body_bytes = len(raw)
        exchange = Exchange(
            parts=self._parts,
            scope=scope,
            receive=receive,
            access=access,
            facts=facts,
            start=start,
            body=body,
            parameters=found.parameters,
        )
        return await found.route.handler(exchange)


# --- routes ---------------------------------------------------------------------------------------------------


def _work_routes() -> list[Route]:
    """What an engine computes; each for the default collection and for a named one."""
    kinds: list[tuple[tuple[str, ...], Any, Any, Any]] = [
        (("/v1/search",), search.search, search.SearchRequest, search.SearchResponse),
        (
            ("/v1/embeddings", "/embeddings", "/infinity/embeddings"),
            embeddings.embeddings,
            embeddings.EmbeddingsRequest,
            embeddings.EmbeddingsResponse,
        ),
        (
            ("/v1/rerank", "/rerank"),
            rerank.rerank,
            rerank.RerankRequest,
            rerank.RerankResponse | list[rerank.ScoredText],
        ),
        (
            ("/v1/similarity",),
            comparing.similarity,
            comparing.SimilarityRequest,
            comparing.SimilarityResponse,
        ),
        (("/v1/classify",), comparing.classify, comparing.ClassifyRequest, comparing.ClassifyResponse),
    ]
    routes = []
    for paths, handler, request, response in kinds:
        named = paths[0].replace("/v1/", "/v1/{collection}/")
        for path in (*paths, named):
            routes.append(
                Route(method="POST", path=path, handler=handler, request=request, response=response)
            )
    for path, handler, request, response in (
        (
            "/infinity/rerank",
            rerank.rerank_infinity,
            rerank.RerankRequest,
            rerank.RerankResponse | list[rerank.ScoredText],
        ),
        (
            "/v2/rerank",
            rerank.rerank_v2,
            rerank.RerankRequest,
            rerank.RerankResponse | list[rerank.ScoredText],
        ),
        ("/v2/embed", embeddings.cohere_embed, embeddings.CohereEmbedRequest, embeddings.CohereEmbedResponse),
        (
            "/v1/embed",
            embeddings.cohere_embed_v1,
            embeddings.CohereEmbedRequest,
            embeddings.CohereEmbedResponse,
        ),
        ("/embed", embeddings.tei_embed, embeddings.TeiEmbedRequest, list[list[float]]),
    ):
        routes.append(Route(method="POST", path=path, handler=handler, request=request, response=response))
    routes.append(Route(method="POST", path="/mcp", handler=mcp, checks_origin=True))
    return routes


def _open_routes(parts: Parts) -> list[Route]:
    """What tells of the server, its models and its documents."""
    page = load_page(parts.config.page_title)

    async def search_page(exchange: Exchange) -> HttpAnswer:
        """The search page."""
        return HttpAnswer(page.content, headers=dict(page.headers), content_type="text/html; charset=utf-8")

    readiness = catalogue.Readiness(parts)
    by_id = {"id": "a document's id"}
    status, listing, document = catalogue.StatusResponse, catalogue.ModelsResponse, catalogue.DocumentResponse
    rows: list[tuple[str, Any, Any, dict[str, Any]]] = [
        ("/", search_page, None, {"is_open": True}),
        ("/healthz", catalogue.healthz, status, {"is_open": True}),
        ("/readyz", catalogue.readyz(readiness), status, {"is_open": True}),
        ("/metrics", catalogue.metrics, None, {}),
        ("/v1/collections", catalogue.collections, catalogue.CollectionsResponse, {}),
        ("/v1/models", catalogue.models, listing, {}),
        ("/models", catalogue.models, listing, {}),
        ("/v1/models/{model}", catalogue.model, catalogue.ModelEntry, {}),
        ("/v1/documents", catalogue.document, document, {"query": by_id}),
        ("/v1/{collection}/documents", catalogue.document, document, {"query": by_id}),
    ]
    return [
        Route(method="GET", path=path, handler=handler, response=response, **more)
        for path, handler, response, more in rows
    ]


def _admin_routes() -> list[Route]:
    rows: list[tuple[str, str, Any]] = [
        ("GET", "/v1/admin/status", catalogue.admin_status),
        ("POST", "/v1/admin/reload", catalogue.admin_reload),
        ("POST", "/v1/admin/rollback", catalogue.admin_rollback),
    ]
    # A browser sends a POST without a body for any page, and a server without keys on loopback knows no caller.
    return [
        Route(method=method, path=path, handler=handler, response=dict[str, Any], checks_origin=True)
        for method, path, handler in rows
    ]


# --- the wire -------------------------------------------------------------------------------------------------


async def _read_body(scope: Scope, receive: Receive, most: int, timeout_ms: int) -> bytes:
    """Raises TooLargeError, SlowBodyError, or ClientGone where the client left before the end."""
    # What is left of a refused body is not read, so the connection cannot be used again.
    close = {"Connection": "close"}
    too_large = TooLargeError(f"the body is larger than {most} bytes", headers=close)
    stated = header(scope, "content-length")
    if stated.isdigit() and (len(stated) > 18 or int(stated) > most):
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(timeout_ms / 1000):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                body += message.get("body", b"")
                if len(body) > most:
                    raise too_large
                if not message.get("more_body", False):
                    return bytes(body)
    except TimeoutError as error:
        raise SlowBodyError(f"the body did not arrive within {timeout_ms} ms", headers=close) from error


async def _send(answer: HttpAnswer, facts: RequestFacts, send: Send) -> None:
    headers = {
        **_HEADERS,
        "content-type": answer.content_type,
        "content-length": str(len(answer.body)),
        **answer.headers,
    }
    if answer.status == 202:
        del headers["content-type"]
    # A header comes once, in the words of whoever set it last.
    once = {name.lower(): value for name, value in headers.items()}
    raw = [(name.encode("latin-1"), value.encode("latin-1", "replace")) for name, value in once.items()]
    await send({"type": "http.response.start", "status": answer.status, "headers": raw})
    body = b"" if facts.method == "HEAD" else answer.body
    await send({"type": "http.response.body", "body": body, "more_body": False})


async def _live(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        if message["type"] == "lifespan.startup":
            await send({"type": "lifespan.startup.complete"})
        else:
            await send({"type": "lifespan.shutdown.complete"})
            return
