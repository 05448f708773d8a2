"""POST /mcp: the Model Context Protocol without sessions, so that any replica answers any message.

Two eras of the protocol are spoken: the handshake (`initialize`) and, from 2026-07-28 on, messages that each carry
their version. Both need only the five methods below, so they are written here: the official SDK would bring a session
manager, event streams and a dozen packages for them. The tests speak through its client.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, StrictStr

from raytower import __version__
from raytower.serving.errors import ApiError
from raytower.serving.http.answers import HttpAnswer, dump, headers_of, json_answer
from raytower.serving.http.catalogue import read_document
from raytower.serving.http.exchange import Exchange
from raytower.serving.http.requests import Positive, QueryText, Request, read_request, shown
from raytower.serving.http.search import SearchRequest, hit_value, run_search, search_facts

_HANDSHAKE_VERSIONS = ("2025-11-25", "2025-06-18", "2025-03-26", "2024-11-05")
_ENVELOPE_VERSIONS = ("2026-07-28",)
_VERSION_HEADER = "mcp-protocol-version"
_VERSION_KEY = "io.modelcontextprotocol/protocolVersion"
_SERVER_KEY = "io.modelcontextprotocol/serverInfo"
_INVALID_REQUEST, _NO_METHOD, _INVALID_PARAMS = -32600, -32601, -32602
_HEADER_MISMATCH, _UNSUPPORTED_VERSION = -32020, -32022
_MOST_RESULTS = 50
_SHOWN_CHARACTERS = 2000
_SERVER = {"name": "raytower", "title": "raytower", "version": __version__}
_INSTRUCTIONS = "Search documents by meaning with `search`; read one in full by its id with `read_document`."
# The newest era asks every listing how long it may be kept: not at all, for an index may be swapped at any time.
_COMPLETE = {"resultType": "complete"}
_UNCACHED = {**_COMPLETE, "ttlMs": 0, "cacheScope": "private"}


class SearchTool(Request):
    """Find documents by meaning. Gives, best first, ids, texts (long ones cut), metadata and scores."""

    query: QueryText = Field(description="a question or a few words")
    k: Positive | None = Field(default=None, le=_MOST_RESULTS, description="results; default 10")
    filter: dict[str, Any] | None = Field(
        default=None, description='condition on columns, such as {"year": {"$gte": 2020}}'
    )
    collection: StrictStr | None = Field(default=None, description="default: the first")


class ReadTool(Request):
    """Read one document in full, by the id that a search gave."""

    id: QueryText
    collection: StrictStr | None = Field(default=None, description="default: the first")


class _RpcError(Exception):
    def __init__(self, code: int, message: str, data: Any = None) -> None:
        super().__init__(message)
        self.code = code
        self.data = data


async def mcp(exchange: Exchange) -> HttpAnswer:
    """One message of the Model Context Protocol."""
    message = await exchange.value()
    if not isinstance(message, dict) or message.get("jsonrpc") != "2.0":
        return _error(None, _RpcError(_INVALID_REQUEST, "the body must be one JSON-RPC 2.0 message"), 400)
    if "method" not in message or "id" not in message:
        # Notifications and answers ask for nothing.
        return HttpAnswer(b"", 202)
    if isinstance(message["id"], bool) or not isinstance(message["id"], (str, int)):
        return _error(None, _RpcError(_INVALID_REQUEST, "id must be a string or an integer"), 400)
    try:
        params = message.get("params") or {}
        if not isinstance(params, dict):
            raise _RpcError(_INVALID_PARAMS, "params must be an object")
        _check_version(exchange, message["method"], params)
        result = await _result(exchange, message["method"], params)
    except _RpcError as error:
        return _error(message["id"], error, 404 if error.code == _NO_METHOD else 400)
    body = {"jsonrpc": "2.0", "id": message["id"], "result": result}
    return HttpAnswer(dump(body), headers=headers_of(exchange.answer))


def _check_version(exchange: Exchange, method: Any, params: Mapping[str, Any]) -> None:
    told = exchange.header(_VERSION_HEADER)
    meta = params.get("_meta")
    inside = meta.get(_VERSION_KEY) if isinstance(meta, dict) else None
    if method == "initialize" or (not told and inside is None):
        return
    version = told or inside
    if inside is not None and told and told != inside:
        raise _RpcError(_HEADER_MISMATCH, f"{_VERSION_HEADER} and the message name different versions")
    known = (*_ENVELOPE_VERSIONS, *_HANDSHAKE_VERSIONS)
    if version not in known:
        data = {"supported": list(known), "requested": version}
        raise _RpcError(_UNSUPPORTED_VERSION, f"protocol version {shown(version)} is not spoken here", data)


async def _result(exchange: Exchange, method: Any, params: Mapping[str, Any]) -> dict[str, Any]:
    match method:
        case "initialize":
            asked = params.get("protocolVersion")
            return {
                "protocolVersion": asked if asked in _HANDSHAKE_VERSIONS else _HANDSHAKE_VERSIONS[0],
                "capabilities": {"tools": {}},
                "serverInfo": _SERVER,
                "instructions": _INSTRUCTIONS,
            }
        case "server/discover":
            return {
                "supportedVersions": [*_ENVELOPE_VERSIONS, *_HANDSHAKE_VERSIONS],
                "capabilities": {"tools": {}},
                "instructions": _INSTRUCTIONS,
                "_meta": {_SERVER_KEY: _SERVER},
                **_UNCACHED,
            }
        case "ping":
            return {}
        case "tools/list":
            return {"tools": [_tool("search", SearchTool), _tool("read_document", ReadTool)], **_UNCACHED}
        case "tools/call":
            return await _call(exchange, params)
    raise _RpcError(_NO_METHOD, f"there is no method {shown(method)}")


def _tool(name: Literal["search", "read_document"], kind: type[Request]) -> dict[str, Any]:
    properties = {}
    for field, schema in kind.model_json_schema()["properties"].items():
        # Patterns and bounds by name are for openapi.json; a model reads the description.
        kept = {key: value for key, value in schema.items() if key in ("type", "anyOf", "description")}
        properties[field] = kept
    required = [field for field, info in kind.model_fields.items() if info.is_required()]
    return {
        "name": name,
        "title": name.replace("_", " "),
        "description": (kind.__doc__ or "").strip(),
        "inputSchema": {"type": "object", "properties": properties, "required": required},
        "annotations": {"readOnlyHint": True, "openWorldHint": False},
    }


async def _call(exchange: Exchange, params: Mapping[str, Any]) -> dict[str, Any]:
    tools = {"search": _search, "read_document": _read}
    name = params.get("name")
    if not isinstance(name, str) or name not in tools:
        raise _RpcError(_INVALID_PARAMS, f"there is no tool {shown(name)}; there are {', '.join(tools)}")
    arguments = params.get("arguments")
    try:
        found = await tools[name](exchange, {} if arguments is None else arguments)
    except ApiError as error:
        if error.status >= 500 or error.status == 429:
            raise
        # Told inside the result, so that the model that asked can see it and ask better.
        return {"content": [{"type": "text", "text": str(error)}], "isError": True, **_COMPLETE}
    text = dump(found).decode()
    return {
        "content": [{"type": "text", "text": text}],
        "structuredContent": found,
        "isError": False,
        **_COMPLETE,
    }


async def _search(exchange: Exchange, arguments: Any) -> dict[str, Any]:
    limits = exchange.config.limits
    asked = read_request(SearchTool, arguments, limits)
    _choose(exchange, asked.collection)
    request = read_request(
        SearchRequest, {"query": asked.query, "k": asked.k, "filter": asked.filter}, limits
    )
    deadline = exchange.deadline(asked.timeout_ms)
    answer = await run_search(exchange, request, deadline)
    hits = [hit_value(hit) for hit in answer.hits[0]]
    for hit in hits:
        if len(hit["text"]) > _SHOWN_CHARACTERS:
            hit["text"] = hit["text"][:_SHOWN_CHARACTERS] + "…"
            hit["cut"] = True
    return {**search_facts(answer, exchange.collection, deadline), "results": hits}


async def _read(exchange: Exchange, arguments: Any) -> dict[str, Any]:
    asked = read_request(ReadTool, arguments, exchange.config.limits)
    _choose(exchange, asked.collection)
    value, _ = await read_document(exchange, asked.id)
    return value


def _choose(exchange: Exchange, collection: str | None) -> None:
    if collection is not None:
        exchange.parameters = {**exchange.parameters, "collection": collection}


def _error(id: str | int | None, error: _RpcError, status: int) -> HttpAnswer:
    told = {"code": error.code, "message": str(error), **({} if error.data is None else {"data": error.data})}
    return json_answer({"jsonrpc": "2.0", "id": id, "error": told}, status=status)
