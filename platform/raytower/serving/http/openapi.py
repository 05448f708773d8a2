"""GET /openapi.json, made from the routes and their requests, with the server's own limits in it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, TypeAdapter

from raytower import __version__
from raytower.serving.http.exchange import TIMEOUT_HEADER
from raytower.serving.http.routing import Route
from raytower.serving.http_config import Limits

_REFERENCE = "#/components/schemas/{model}"
_ERRORS = {
    400: "the body is not JSON in UTF-8",
    401: "no key, or a wrong one",
    403: "the key does not open this",
    404: "no such route, collection, model or document, or no model for it",
    408: "the body was too slow",
    413: "a text or the body is too large",
    415: "not JSON, or compressed in another way than gzip and deflate",
    421: "a name that this server does not answer to",
    422: "a value breaks its rule",
    429: "too many requests; Retry-After says when",
    500: "an internal error",
    503: "not ready; Retry-After says when",
    504: "no answer in time",
}


class ErrorDetail(BaseModel):
    message: str
    type: str
    code: str


class ErrorResponse(BaseModel):
    error: ErrorDetail


def describe(routes: Iterable[Route], limits: Limits, has_keys: bool) -> dict[str, Any]:
    """The document, of OpenAPI 3.1."""
    schemas: dict[str, Any] = {}
    error = _schema(ErrorResponse, "serialization", schemas)
    paths: dict[str, Any] = {}
    for route in routes:
        if route.response is not None:
            paths.setdefault(route.path, {})[route.method.lower()] = _operation(
                route, schemas, error, has_keys
            )
    document = {
        "openapi": "3.1.0",
        "info": {"title": "raytower", "version": __version__},
        # Relative to this document, so that it holds behind a proxy's prefix.
        "servers": [{"url": "."}],
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }
    resolved: dict[str, Any] = _resolve(document, limits)
    return resolved


def _operation(route: Route, schemas: dict[str, Any], error: Any, has_keys: bool) -> dict[str, Any]:
    answers = {
        "200": {
            "description": "the answer",
            "content": {"application/json": {"schema": _schema(route.response, "serialization", schemas)}},
        }
    }
    for status, meaning in _ERRORS.items():
        answers[str(status)] = {
            "description": meaning,
            "content": {"application/json": {"schema": error}},
        }
    operation: dict[str, Any] = {
        "summary": route.summary,
        "operationId": f"{route.method.lower()}{re.sub(r'[^a-zA-Z0-9]+', '_', route.path).rstrip('_')}",
        "parameters": _parameters(route),
        "responses": answers,
        "security": [{"key": []}] if has_keys and not route.is_open else [],
    }
    if route.request is not None:
        body: dict[str, Any] = {"schema": _schema(route.request, "validation", schemas)}
        if route.request.examples:
            body["examples"] = {
                f"example{number}": {"value": value}
                for number, value in enumerate(route.request.examples, start=1)
            }
        operation["requestBody"] = {"required": True, "content": {"application/json": body}}
    return operation


def _parameters(route: Route) -> list[dict[str, Any]]:
    parameters: list[dict[str, Any]] = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        for name in re.findall(r"\{(\w+)\}", route.path)
    ]
    for name, meaning in route.query.items():
        parameters.append(
            {
                "name": name,
                "in": "query",
                "required": True,
                "description": meaning,
                "schema": {"type": "string", "minLength": 1},
            }
        )
    if route.request is not None:
        parameters.append(
            {
                "name": TIMEOUT_HEADER,
                "in": "header",
                "required": False,
                "description": "milliseconds from the request's arrival; of this and `timeout_ms` the smaller counts",
                "schema": {"type": "integer", "minimum": 1, "maximum": "limits.max_timeout_ms"},
            }
        )
    return parameters


def _schema(kind: Any, mode: Any, schemas: dict[str, Any]) -> dict[str, Any]:
    """The schema of a type, or a reference to it; what it refers to goes into `schemas`."""
    schema = TypeAdapter(kind).json_schema(mode=mode, ref_template=_REFERENCE)
    schemas.update(schema.pop("$defs", {}))
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        schemas[kind.__name__] = schema
        return {"$ref": _REFERENCE.format(model=kind.__name__)}
    return schema


def _resolve(value: Any, limits: Limits) -> Any:
    """The document with the numbers of `limits` where their names stand."""
    if isinstance(value, dict):
        return {key: _resolve(item, limits) for key, item in value.items()}
    if isinstance(value, list):
        return [_resolve(item, limits) for item in value]
    if isinstance(value, str) and re.fullmatch(r"limits\.\w+", value):
        return int(getattr(limits, value.removeprefix("limits.")))
    return value
