"""The HTTP application: routes over an engine. Knows neither Ray nor models, so a dummy engine tests all of it."""

from __future__ import annotations

import hashlib
import hmac
import logging
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import numpy as np
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from raytower.retrieval.retriever import Hit
from raytower.serving.calls import (
    DEFAULT_COLLECTION,
    EmbedAnswer,
    EmbedCall,
    Engine,
    RerankAnswer,
    RerankCall,
    SearchAnswer,
    SearchCall,
)
from raytower.serving.config import ServeConfig
from raytower.serving.page import load_page
from raytower.serving.schemas import (
    ApiError,
    Embedding,
    EmbeddingsRequest,
    EmbeddingsResponse,
    ErrorResponse,
    NotReadyError,
    RerankDocument,
    RerankRequest,
    RerankResponse,
    RerankResult,
    SearchHit,
    SearchRequest,
    SearchResponse,
    StatusResponse,
    Timings,
    TooLargeError,
    UnauthorisedError,
    Usage,
    encode_base64,
    error_body,
    shorten,
)
from raytower.serving.work import Deadline

_LOGGER = logging.getLogger("raytower.serving")
_OPEN_PATHS = frozenset({"/", "/healthz", "/readyz"})
_REQUESTS: dict[str, type[BaseModel]] = {
    "/v1/search": SearchRequest,
    "/v1/embeddings": EmbeddingsRequest,
    "/v1/rerank": RerankRequest,
}
_MODELS: tuple[type[BaseModel], ...] = (*_REQUESTS.values(), RerankDocument)
_FIELDS = {name for model in _MODELS for name in model.model_fields}
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse} for status in (400, 401, 413, 422, 429, 500, 503, 504)
}

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
AsgiApp = Callable[[Scope, Receive, Send], Awaitable[None]]


def create_app(engine: Engine, config: ServeConfig, api_key_sha256: bytes | None = None) -> FastAPI:
    """The application. `api_key_sha256` is the digest of the key that requests must bring; None asks for none."""
    # FastAPI's documentation pages load scripts from other hosts, so they are off; openapi.json stays.
    app = FastAPI(title="raytower", version="1", docs_url=None, redoc_url=None)
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(RequestValidationError, _on_invalid_request)
    app.add_exception_handler(HTTPException, _on_http_error)
    _add_work_routes(app, engine, config)
    _add_open_routes(app, engine, config)
    app.add_middleware(
        Gatekeeper, max_body_bytes=int(config.limits.max_body_bytes), key_sha256=api_key_sha256
    )
    return app


def _add_work_routes(app: FastAPI, engine: Engine, config: ServeConfig) -> None:
    limits = config.limits

    def begin(timeout_ms: int | None) -> Deadline:
        return Deadline.after(timeout_ms or config.timeout_ms)

    @app.post("/v1/search", response_model=SearchResponse, responses=_ERRORS)
    async def search(body: SearchRequest) -> Response:
        body.check(limits)
        deadline = begin(body.timeout_ms)
        call = SearchCall(
            queries=body.texts(),
            k=body.k,
            recall_k=body.depth(limits),
            rerank=body.rerank,
            filter=body.filter,
        )
        answer = await engine.search(DEFAULT_COLLECTION, call, deadline)
        return _json(_search_response(answer, deadline))

    @app.post("/v1/embeddings", response_model=EmbeddingsResponse, responses=_ERRORS)
    async def embeddings(body: EmbeddingsRequest) -> Response:
        body.check(limits)
        deadline = begin(body.timeout_ms)
        texts = body.texts()
        call = EmbedCall(texts=texts, role=body.input_type)
        answer = await engine.embed(DEFAULT_COLLECTION, call, deadline)
        return _json(_embeddings_response(answer, body))

    @app.post(
        "/v1/rerank", response_model=RerankResponse, responses={**_ERRORS, 404: {"model": ErrorResponse}}
    )
    async def rerank(body: RerankRequest) -> Response:
        body.check(limits)
        deadline = begin(body.timeout_ms)
        texts = body.texts()
        call = RerankCall(query=body.query, documents=texts)
        answer = await engine.rerank(DEFAULT_COLLECTION, call, deadline)
        return _json(_rerank_response(answer, body))


def _add_open_routes(app: FastAPI, engine: Engine, config: ServeConfig) -> None:
    page = load_page(config.page_title)

    @app.get("/healthz")
    async def healthz() -> StatusResponse:
        """The process is alive."""
        return StatusResponse(status="ok", index_version=_version(engine))

    @app.get("/readyz", responses={503: {"model": ErrorResponse}})
    async def readyz() -> StatusResponse:
        """An index is loaded and searches are answered."""
        await engine.check()
        return StatusResponse(status="ready", index_version=_version(engine))

    @app.get("/", include_in_schema=False)
    async def search_page() -> Response:
        return Response(page.content, media_type="text/html; charset=utf-8", headers=page.headers)


def _version(engine: Engine) -> str | None:
    try:
        return engine.served(DEFAULT_COLLECTION).index_version
    except NotReadyError:
        return None


# --- answers --------------------------------------------------------------------------------------------------


def _json(body: BaseModel) -> Response:
    return Response(body.model_dump_json(exclude_none=False), media_type="application/json")


def _search_response(answer: SearchAnswer, deadline: Deadline) -> SearchResponse:
    stages = {name: answer.timings_ms.get(name, 0.0) for name in ("encode", "recall", "rerank")}
    timings = {name: round(value, 3) for name, value in (*stages.items(), ("total", deadline.elapsed_ms()))}
    hits = [[_search_hit(hit) for hit in items] for items in answer.hits]
    return SearchResponse(
        index_version=answer.index_version,
        partial=answer.partial,
        reranked=answer.reranked,
        timings_ms=Timings(**timings),
        results=hits,
    )


def _search_hit(hit: Hit) -> SearchHit:
    return SearchHit(
        id=hit.id,
        text=hit.text,
        metadata=hit.metadata,
        recall_score=hit.recall_score,
        rerank_score=hit.rerank_score,
        score=hit.score,
        rank=hit.rank,
    )


def _embeddings_response(answer: EmbedAnswer, body: EmbeddingsRequest) -> EmbeddingsResponse:
    vectors = shorten(answer.vectors, body.dimensions)
    as_text = body.encoding_format == "base64"
    data = [
        Embedding(index=number, embedding=encode_base64(vector) if as_text else vector.tolist())
        for number, vector in enumerate(vectors)
    ]
    usage = Usage(prompt_tokens=answer.counts.tokens, total_tokens=answer.counts.tokens)
    return EmbeddingsResponse(data=data, model=answer.model, usage=usage, index_version=answer.index_version)


def _rerank_response(answer: RerankAnswer, body: RerankRequest) -> RerankResponse:
    # Order by the logits: the logistic function maps all large ones to 1.0.
    order = np.argsort(-answer.logits, kind="stable")[: body.top_n or len(answer.logits)]
    relevance = 0.5 * (1 + np.tanh(answer.logits.astype(np.float64) / 2))
    texts = body.texts()
    results = [
        RerankResult(
            index=place,
            relevance_score=float(relevance[place]),
            document=RerankDocument(text=texts[place]) if body.return_documents else None,
        )
        for place in order.tolist()
    ]
    return RerankResponse(model=answer.model, results=results, index_version=answer.index_version)


# --- errors ---------------------------------------------------------------------------------------------------


def _error(
    status: int, message: str, error_type: str, code: str, headers: dict[str, str] | None = None
) -> Response:
    return Response(error_body(message, error_type, code), status, headers, media_type="application/json")


def _from_api_error(error: ApiError) -> Response:
    return _error(error.status, str(error), error.type, error.code, error.headers)


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _from_api_error(error)


async def _on_invalid_request(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    details = error.errors()
    if any(detail["type"] == "json_invalid" for detail in details):
        reason = details[0].get("ctx", {}).get("error", "cannot be parsed")
        return _error(400, f"the body is not valid JSON: {reason}", "invalid_request_error", "invalid_json")
    model = _REQUESTS.get(request.url.path)
    messages = list(dict.fromkeys(_describe(detail, model) for detail in details[:3]))
    code = "unknown_field" if details[0]["type"] == "extra_forbidden" else "invalid_value"
    return _error(422, "; ".join(messages), "invalid_request_error", code)


def _describe(detail: Any, model: type[BaseModel] | None) -> str:
    # The location starts with "body"; the branch names of unions (str, list[str]) say nothing to a caller.
    place = detail["loc"][1:]
    unknown = detail["type"] == "extra_forbidden"
    last = place[-1] if unknown else None
    names = [str(part) for part in place if isinstance(part, int) or part in _FIELDS or part is last]
    if unknown:
        known = f"; known are {', '.join(model.model_fields)}" if model and len(names) == 1 else ""
        return f"{'.'.join(names)}: unknown field{known}"
    if not names and detail["type"] == "string_unicode":
        return "the body has a field whose name is not valid Unicode"
    if not names:
        return "the body must be a JSON object, sent with Content-Type: application/json"
    return f"{'.'.join(names)}: {detail['msg'][:1].lower()}{detail['msg'][1:]}"


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    if error.status_code == 404:
        message = f"there is no {request.url.path!r} here; see /openapi.json for what there is"
        return _error(404, message, "invalid_request_error", "not_found", headers)
    if error.status_code == 405:
        message = f"{request.method} is not allowed on {request.url.path!r}; allowed: {headers.get('allow', 'POST')}"
        return _error(405, message, "invalid_request_error", "method_not_allowed", headers)
    if error.status_code == 400:
        return _error(
            400, "the body is not valid JSON in UTF-8", "invalid_request_error", "invalid_json", headers
        )
    kind = "server_error" if error.status_code >= 500 else "invalid_request_error"
    return _error(error.status_code, str(error.detail), kind, "http_error", headers)


# --- the outermost layer --------------------------------------------------------------------------------------


class Gatekeeper:
    """Checks the API key before the body is read, limits the body, and turns unexpected errors into a bare 500."""

    def __init__(self, app: AsgiApp, max_body_bytes: int, key_sha256: bytes | None) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes
        self._key_sha256 = key_sha256

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def watched_send(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            self._check_key(scope)
            body = await self._read_body(scope, receive)
            await self._app(scope, _replay(body, receive), watched_send)
        except ApiError as error:
            await _from_api_error(error)(scope, receive, send)
        except Exception:
            mark = uuid.uuid4().hex[:12]
            _LOGGER.exception("request %s %s failed, id %s", scope["method"], scope["path"], mark)
            if started:
                raise
            message = f"an internal error occurred; the server's log has it under id {mark}"
            await _error(500, message, "server_error", "internal_error")(scope, receive, send)

    def _check_key(self, scope: Scope) -> None:
        if self._key_sha256 is None or scope["path"] in _OPEN_PATHS:
            return
        given = _header(scope, b"authorization")
        scheme, _, key = given.partition(b" ")
        # All digests are equally long, so the comparison's time does not show the key's length.
        digest = hashlib.sha256(key.strip()).digest()
        if scheme.lower() != b"bearer" or not hmac.compare_digest(digest, self._key_sha256):
            problem = "wrong API key" if given else "no API key"
            message = f"{problem}; send it as 'Authorization: Bearer KEY'"
            raise UnauthorisedError(message, headers={"WWW-Authenticate": "Bearer"})

    async def _read_body(self, scope: Scope, receive: Receive) -> bytes:
        stated = _header(scope, b"content-length")
        if stated.isdigit() and int(stated) > self._max_body_bytes:
            raise self._too_large()
        chunks = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return bytes(chunks)
            chunks += message.get("body", b"")
            if len(chunks) > self._max_body_bytes:
                raise self._too_large()
            if not message.get("more_body", False):
                return bytes(chunks)

    def _too_large(self) -> TooLargeError:
        # The rest of the body is not read, so the connection cannot be used again.
        headers = {"Connection": "close"}
        return TooLargeError(f"the body is larger than {self._max_body_bytes} bytes", headers=headers)


def _header(scope: Scope, name: bytes) -> bytes:
    return next((bytes(value) for key, value in scope["headers"] if key.lower() == name), b"")


def _replay(body: bytes, receive: Receive) -> Receive:
    sent = False

    async def replay() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
