"""The page of the HTTP routes, from the openapi.json that a server with keys and default limits answers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from docs.site.reference import slug
from raytower.serving.calls import Engine
from raytower.serving.errors import ApiError
from raytower.serving.http.application import create_app
from raytower.serving.http.openapi import describe
from raytower.serving.http.routing import Route
from raytower.serving.http_config import HttpConfig

PAGE, DOCUMENT = "reference/http.md", "reference/openapi.json"
_INTRODUCTION = f"""# HTTP routes

What a server answers, from its own [openapi.json]({DOCUMENT.rpartition("/")[2]}), which `GET /openapi.json` gives
with the limits of that server; here they are the defaults. [The guide](../serving.md) has examples,
clients, keys and limits.

Bodies are JSON in UTF-8, plain or by gzip or deflate. Fields that a route of raytower's own does not know are refused;
those of other services' shapes are ignored. A field that is null counts as absent.
"""
_SIGNS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
_BOUNDS = (*_SIGNS, "maxLength", "maxItems")
# What openapi.json says of no route, since it is said of a wrong one, or by admin routes alone.
_MORE = {
    405: "the path is answered to other methods, which the header Allow names",
    409: "nothing was changed; the message says which member refused, and why",
}


def pages() -> dict[str, str]:
    """The page, and the document that it is made of, each by where it lies."""
    routes, document = _served()
    return {
        PAGE: _page(routes, document),
        DOCUMENT: json.dumps(document, ensure_ascii=False, indent=1) + "\n",
    }


def _served() -> tuple[Sequence[Route], dict[str, Any]]:
    """All routes of an application, and its document. No route is called, so there is no engine behind it."""
    config = HttpConfig()
    routes = create_app(cast(Engine, None), config).routes
    return routes, describe(routes, config.limits, has_keys=True)


def _page(routes: Sequence[Route], document: Mapping[str, Any]) -> str:
    groups: dict[Any, list[Route]] = {}
    for route in routes:
        groups.setdefault((route.method, route.summary, route.request), []).append(route)
    parts = [_INTRODUCTION.rstrip("\n"), "## Routes"]
    for group in groups.values():
        parts += _route(group, document)
    parts.append("## Bodies")
    for name, schema in sorted(document["components"]["schemas"].items()):
        parts += _body(name, schema)
    parts += _errors(document)
    return "\n\n".join(parts) + "\n"


def _route(group: Sequence[Route], document: Mapping[str, Any]) -> Iterator[str]:
    """A route with the other paths under which it is answered."""
    first, *others = group
    yield f"### {first.method} {first.path}"
    yield first.summary
    if others:
        yield "Also at " + ", ".join(f"`{route.path}`" for route in others) + "."
    if first.is_open:
        yield "Answered without a key."
    described = document["paths"].get(first.path, {}).get(first.method.lower())
    if described is None:  # a page, figures of Prometheus, or MCP
        return
    parameters = {
        (item["in"], item["name"]): item
        for route in group
        for item in document["paths"][route.path][route.method.lower()]["parameters"]
    }
    if parameters:
        lines = ["| parameter | in | takes | meaning |", "|---|---|---|---|"]
        for (where, name), item in parameters.items():
            needed = "; required" if item["required"] and where != "path" else ""
            meaning = item.get("description", f"the {name}'s name, in the paths that have it")
            lines.append(f"| `{name}` | {where} | {_kind(item['schema'])}{needed} | {_cell(meaning)} |")
        yield "\n".join(lines)
    if "requestBody" in described:
        content = described["requestBody"]["content"]["application/json"]
        yield f"Body: {_kind(content['schema'])}."
        for example in content.get("examples", {}).values():
            yield f"```json\n{json.dumps(example['value'], ensure_ascii=False)}\n```"
    answer = described["responses"]["200"]["content"]["application/json"]["schema"]
    yield f"Answer: {_kind(answer)}."


def _body(name: str, schema: Mapping[str, Any]) -> Iterator[str]:
    yield f"### {name}"
    if schema.get("description"):
        yield _cell(schema["description"])
    fields = schema.get("properties")
    if not fields:
        yield f"{_kind({**schema, 'description': ''})}."
        return
    lines = ["| field | takes | default | meaning |", "|---|---|---|---|"]
    required = schema.get("required", ())
    for field, rules in fields.items():
        default = "required" if field in required else _default(rules)
        lines.append(f"| `{field}` | {_kind(rules)} | {default} | {_cell(rules.get('description', ''))} |")
    yield "\n".join(lines)


def _default(rules: Mapping[str, Any]) -> str:
    value = rules.get("default")
    return "" if value is None else f"`{_cell(json.dumps(value, ensure_ascii=False))}`"


def _kind(rules: Mapping[str, Any]) -> str:
    """What a field takes, in words: `list of SearchHit`, `integer ≥ 1 or null`."""
    if "$ref" in rules:
        name = rules["$ref"].rpartition("/")[2]
        return f"[{name}](#{slug(name)})"
    for several in ("anyOf", "oneOf"):
        if several in rules and not rules.get("properties"):
            outside = {name: rules[name] for name in _BOUNDS if name in rules}
            kinds = [
                _kind(rule if rule.get("type") == "null" else {**rule, **outside}) for rule in rules[several]
            ]
            return " or ".join(dict.fromkeys(kinds))
    if "const" in rules:
        return f"`{_cell(json.dumps(rules['const'], ensure_ascii=False))}`"
    if "enum" in rules:
        return ", ".join(f"`{_cell(json.dumps(value, ensure_ascii=False))}`" for value in rules["enum"])
    kind = rules.get("type", "any value")
    if kind == "array":
        if "prefixItems" in rules:
            return "list of " + " and ".join(map(_kind, rules["prefixItems"]))
        return f"list of {_kind(rules.get('items', {}))}" + _bounds(rules)
    if kind == "object" and isinstance(rules.get("additionalProperties"), Mapping):
        return f"object of {_kind(rules['additionalProperties'])}"
    return (" or ".join(kind) if isinstance(kind, list) else str(kind)) + _bounds(rules)


def _bounds(rules: Mapping[str, Any]) -> str:
    """` ≥ 1 ≤ 100`, ` of at most 2000 characters`."""
    said = ""
    for name, sign in _SIGNS.items():
        if name in rules:
            said += f" {sign} {rules[name]:g}" if abs(rules[name]) < 1e6 else f" {sign} {rules[name]}"
    if "maxLength" in rules:
        said += f" of at most {rules['maxLength']} characters"
    if "maxItems" in rules:
        said += f", at most {rules['maxItems']} of them"
    return said


def _errors(document: Mapping[str, Any]) -> Iterator[str]:
    """Statuses with what they mean, and the type and the usual code of their errors."""
    yield "## Errors"
    yield (
        'Errors have the shape of OpenAI\'s, `{"error": {"message": …, "type": …, "code": …}}`, on all routes. Code '
        "is a word for programs; this table has the usual one of each status."
    )
    lines = ["| status | means | type | code |", "|---|---|---|---|"]
    meanings = {
        int(status): answer["description"]
        for methods in document["paths"].values()
        for described in methods.values()
        for status, answer in described["responses"].items()
        if status != "200"
    }
    kinds = _error_classes(ApiError)
    for status in sorted({*meanings, *_MORE, *(kind.status for kind in kinds)}):
        own = [kind for kind in kinds if kind.status == status]
        types = ", ".join(dict.fromkeys(f"`{kind.type}`" for kind in own))
        codes = ", ".join(dict.fromkeys(f"`{kind.code}`" for kind in own))
        meaning = meanings.get(status) or _MORE[status]
        lines.append(f"| {status} | {_cell(meaning)} | {types} | {codes} |")
    yield "\n".join(lines)


def _error_classes(base: type[ApiError]) -> list[type[ApiError]]:
    return [base, *(kind for below in base.__subclasses__() for kind in _error_classes(below))]


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
