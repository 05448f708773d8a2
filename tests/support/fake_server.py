"""A server that answers by contract, without models: for the guide's lines and for reverse proxies in front.

It speaks the routes of docs/serving.md over three documents. What it answers is fixed; it checks only what a line of
the guide could get wrong: the route, the method, JSON, the fields' names and types, and the key.
"""

from __future__ import annotations

import gzip
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from raytower.serving.access_log import RequestLog, current, stage
from raytower.serving.metrics import Metrics

KEY = "key-of-the-test"
MAX_BODY_BYTES = 4 * 1024 * 1024
ROWS: list[dict[str, Any]] = [
    {"id": "a7", "text": "如何申请微粒贷", "metadata": {"year": 2024}},
    {"id": "b2", "text": "花呗怎么还款", "metadata": {"year": 2021}},
    {"id": "c9", "text": "借呗逾期一天多少利息", "metadata": {"year": 2019}},
]
_SERVED = {"index_version": "000007", "generation": "5b1f0c9e"}
_USAGE = {"prompt_tokens": 9, "total_tokens": 9, "truncated": 0}
_Handler = Callable[[Request, dict[str, Any]], Any]


class Refused(Exception):
    """Answered as an error of the contract."""

    def __init__(self, status: int, code: str, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.headers = headers


def make_app(*, key: str | None = None) -> RequestLog:
    metrics = Metrics("0")
    metrics.serves(
        "faq", index_version=_SERVED["index_version"], generation=_SERVED["generation"], rows=len(ROWS)
    )
    routes = [
        *(Route(path, _post(handler, key), methods=["POST"]) for path, handler in _POSTS.items()),
        *(Route(path, _get(handler, key)) for path, handler in _GETS.items()),
        Route("/metrics", lambda request: Response(metrics.render()[0], media_type=metrics.render()[1])),
        Route("/", lambda request: HTMLResponse("<!doctype html><title>Search</title>")),
        Route("/busy", _get(_busy, key)),
    ]
    app = Starlette(routes=routes, exception_handlers={Refused: _on_refused, 404: _on_404, 405: _on_405})
    logged = RequestLog(app, [metrics.record])
    return logged


@contextmanager
def running(app: Any, **options: Any) -> Iterator[str]:
    """Serves an application on a free port of loopback and gives its URL."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(128)
        config = uvicorn.Config(app, log_level="error", lifespan="off", **options)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        end = time.monotonic() + 30
        while not server.started:
            assert thread.is_alive()
            assert time.monotonic() < end
            time.sleep(0.005)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(30)


@dataclass(frozen=True)
class Served:
    """A server of the guide: without keys at `url`, and one that asks for `key` at `keyed_url`.

    Both have the collection `faq` with the documents of `ROWS`, a reranker and labels to classify by.
    """

    url: str
    keyed_url: str
    key: str


# --- routes ---------------------------------------------------------------------------------------------------


def _post(handler: _Handler, key: str | None) -> Callable[[Request], Any]:
    async def route(request: Request) -> Response:
        _check_key(request, key)
        raw = await request.body()
        if len(raw) > MAX_BODY_BYTES:
            raise Refused(413, "too_large", "the body is too large")
        if request.headers.get("content-encoding") == "gzip":
            raw = gzip.decompress(raw)
        try:
            body = json.loads(raw) if raw else {}
        except ValueError as error:
            raise Refused(400, "invalid_json", f"the body is not valid JSON: {error}") from error
        answer = handler(request, body)
        headers = {"x-raytower-generation": _SERVED["generation"]}
        return JSONResponse(answer, headers=headers) if answer is not None else Response(status_code=202)

    return route


def _get(handler: Callable[[Request], Any], key: str | None) -> Callable[[Request], Any]:
    async def route(request: Request) -> Response:
        if request.url.path not in ("/healthz", "/readyz"):
            _check_key(request, key)
        return JSONResponse(handler(request))

    return route


def _check_key(request: Request, key: str | None) -> None:
    if key is not None and request.headers.get("authorization") != f"Bearer {key}":
        raise Refused(401, "wrong_key", "wrong API key; send it as 'Authorization: Bearer KEY'")


def _fields(body: dict[str, Any], known: dict[str, type | tuple[type, ...]], *needed: str) -> None:
    for name in needed:
        if name not in body:
            raise Refused(422, "invalid_value", f"{name}: field required")
    for name, value in body.items():
        if name not in known:
            raise Refused(422, "unknown_field", f"{name}: unknown field")
        if not isinstance(value, known[name]):
            raise Refused(422, "invalid_value", f"{name}: wrong type")


def _search(request: Request, body: dict[str, Any]) -> Any:
    known = {"query": str, "queries": list, "k": int, "recall_k": int, "rerank": bool, "filter": dict}
    _fields(body, {**known, "mode": str, "fields": list, "explain": bool, "timeout_ms": int})
    if ("query" in body) == ("queries" in body):
        raise Refused(422, "invalid_value", "query, queries: exactly one of the two must be given")
    collection = request.path_params.get("collection", "faq")
    if collection != "faq":
        raise Refused(404, "no_such_collection", f"there is no collection {collection!r}; there are: 'faq'")
    facts = current()
    facts.collection, facts.k = collection, body.get("k", 10)
    with stage("recall"):
        hits = [_hit(row, place, body) for place, row in enumerate(ROWS[: body.get("k", 10)], start=1)]
    reranked = body.get("rerank", True)
    return {
        "collection": collection,
        **_SERVED,
        "partial": False,
        "missing_shards": [],
        "mode": body.get("mode", "dense"),
        "reranked": reranked,
        "reranked_k": len(ROWS) if reranked else 0,
        "usage": _USAGE,
        "timings_ms": {"encode": 4.1, "recall": 0.6, "fetch": 0.4, "rerank": 20.5, "total": 26.0},
        "results": [hits for _ in body.get("queries", [None])],
    }


def _hit(row: dict[str, Any], place: int, body: dict[str, Any]) -> dict[str, Any]:
    fields = body.get("fields", ["text", "year"])
    scores = {
        "recall_score": 0.9 - place / 10,
        "rerank_score": 3.0 - place,
        "score": 3.0 - place,
        "rank": place,
    }
    hit = {
        "id": row["id"],
        "text": row["text"] if "text" in fields else None,
        "metadata": {name: value for name, value in row["metadata"].items() if name in fields},
        **scores,
    }
    return {**hit, "explain": {"recall_rank": place, "moved": 0}} if body.get("explain") else hit


def _embeddings(request: Request, body: dict[str, Any]) -> Any:
    known = {"input": (str, list), "model": str, "encoding_format": str, "dimensions": int, "input_type": str}
    _fields(body, known, "input")
    texts = [body["input"]] if isinstance(body["input"], str) else body["input"]
    data = [{"object": "embedding", "index": place, "embedding": [0.6, 0.8]} for place in range(len(texts))]
    return {"object": "list", "data": data, "model": "encoder", "usage": _USAGE}


def _cohere_embed(request: Request, body: dict[str, Any]) -> Any:
    known = {"texts": list, "model": str, "input_type": str, "embedding_types": list, "truncate": str}
    _fields(body, known, "texts", "model")
    vectors = [[0.6, 0.8] for _ in body["texts"]]
    meta = {"api_version": {"version": "2"}, "billed_units": {"input_tokens": 9}}
    return {"id": "e1", "embeddings": {"float": vectors}, "texts": body["texts"], "meta": meta}


def _rerank(request: Request, body: dict[str, Any]) -> Any:
    known = {
        "query": str,
        "documents": list,
        "texts": list,
        "model": str,
        "top_n": int,
        "return_documents": bool,
    }
    _fields(body, {**known, "raw_scores": bool}, "query")
    if "texts" in body:
        return [{"index": place, "score": 0.9 - place / 10} for place in range(len(body["texts"]))]
    results = [
        {"index": place, "relevance_score": 0.9 - place / 10, "document": {"text": text}}
        for place, text in enumerate(body["documents"][: body.get("top_n")])
    ]
    return {"id": "r1", "model": "reranker", "results": results, "usage": _USAGE, "meta": {}}


def _similarity(request: Request, body: dict[str, Any]) -> Any:
    _fields(body, {"pairs": list}, "pairs")
    return {"scores": [0.83 for _ in body["pairs"]], "model": "encoder", "usage": _USAGE}


def _classify(request: Request, body: dict[str, Any]) -> Any:
    _fields(body, {"texts": list, "top_k": int, "mode": str}, "texts")
    labels = [{"label": "loans", "score": 0.91}, {"label": "cards", "score": 0.07}]
    return {"mode": "classifier", "model": "classifier", "results": [labels for _ in body["texts"]]}


def _mcp(request: Request, body: dict[str, Any]) -> Any:
    _fields(body, {"jsonrpc": str, "id": int, "method": str, "params": dict}, "jsonrpc", "method")
    tools = [{"name": name, "description": "", "inputSchema": {}} for name in ("search", "read_document")]
    results = {"tools/list": {"tools": tools}, "tools/call": {"content": [{"type": "text", "text": "…"}]}}
    return {"jsonrpc": "2.0", "id": body.get("id"), "result": results[body["method"]]}


def _swap(request: Request, body: dict[str, Any]) -> Any:
    known = {"collection": str, "index": str, "version": str, "encoder": str, "reranker": str}
    _fields(body, {**known, "fusion_weight": float})
    return {"collection": "faq", **_SERVED, "former": {"index_version": "000006", "generation": "0a44e2d1"}}


def _collections(request: Request) -> Any:
    encoder = {"name": "encoder", "max_length": 256}
    collection = {
        "name": "faq",
        "default": True,
        **_SERVED,
        "rows": len(ROWS),
        "kind": "flat",
        "metric": "cosine",
        "dim": 384,
        "recall": None,
        "encoder": encoder,
        "reranker": {"name": "reranker", "max_length": 512},
        "classifier": None,
        "classify_modes": ["votes"],
        "columns": {"year": "int64"},
        "modes": ["dense"],
    }
    return {"object": "list", "data": [collection]}


def _models(request: Request) -> Any:
    encoder = {"kind": "encoder", "max_length": 256, "dim": 384, "dimensions": [384]}
    reranker = {"kind": "reranker", "max_length": 512}
    common = {"object": "model", "created": 0, "owned_by": "raytower"}
    return {
        "object": "list",
        "data": [{"id": kind["kind"], **common, **kind} for kind in (encoder, reranker)],
    }


def _document(request: Request) -> Any:
    wanted = request.query_params.get("id")
    for row in ROWS:
        if row["id"] == wanted:
            return row
    raise Refused(404, "no_such_document", f"there is no document {wanted!r}")


def _status(request: Request) -> Any:
    replicas = [{"replica": "0", "state": "ready"}]
    return {"collections": {"faq": {**_SERVED, "rows": len(ROWS)}}, "replicas": replicas}


def _busy(request: Request) -> Any:
    raise Refused(503, "draining", "the server is being stopped; try again", **{"Retry-After": "1"})


_POSTS: dict[str, _Handler] = {
    "/v1/search": _search,
    "/v1/{collection}/search": _search,
    "/v1/embeddings": _embeddings,
    "/embeddings": _embeddings,
    "/v2/embed": _cohere_embed,
    "/v1/rerank": _rerank,
    "/v2/rerank": _rerank,
    "/rerank": _rerank,
    "/v1/similarity": _similarity,
    "/v1/classify": _classify,
    "/mcp": _mcp,
    "/v1/admin/reload": _swap,
    "/v1/admin/rollback": _swap,
}
_GETS: dict[str, Callable[[Request], Any]] = {
    "/v1/collections": _collections,
    "/v1/models": _models,
    "/v1/documents": _document,
    "/v1/{collection}/documents": _document,
    "/v1/admin/status": _status,
    "/healthz": lambda request: {"status": "ok"},
    "/readyz": lambda request: {"status": "ready"},
    "/openapi.json": lambda request: {"openapi": "3.1.0", "paths": {path: {} for path in [*_POSTS, *_GETS]}},
}


def _error(status: int, code: str, message: str, headers: Any = None) -> Response:
    current().error = code
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return JSONResponse({"error": {"message": message, "type": kind, "code": code}}, status, headers)


async def _on_refused(request: Request, error: Any) -> Response:
    return _error(error.status, error.code, str(error), error.headers)


async def _on_404(request: Request, error: Any) -> Response:
    return _error(404, "not_found", f"there is no {request.url.path!r} here")


async def _on_405(request: Request, error: Any) -> Response:
    return _error(405, "method_not_allowed", f"{request.method} is not allowed here", error.headers)
