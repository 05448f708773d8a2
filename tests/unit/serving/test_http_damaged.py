"""Right requests, damaged at random: no damage is a 5xx, and each refusal has the error shape.

More of them: RAYTOWER_DAMAGED_CASES=20000 python -m pytest -s tests/unit/serving/test_http_damaged.py
"""

from __future__ import annotations

import asyncio
import collections
import copy
import gzip
import json
import os
import random
from typing import Any

from raytower.serving.http.application import Application, create_app
from raytower.serving.http_config import HttpConfig
from tests.support.asgi import answered
from tests.support.dummy_engine import DummyEngine

CASES = int(os.environ.get("RAYTOWER_DAMAGED_CASES", "600"))
ODD: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1,
    3.0,
    2.5,
    1e308,
    -0.0,
    2**31,
    2**63,
    10**40,
    "",
    " ",
    "\x00",
    "\u200b",
    "a",
    "月亮 🚗",
    "x" * 9000,
    "float",
    "dense",
    "votes",
    [],
    [[]],
    [None],
    [1, "a"],
    ["a", "b"],
    [[1, 2], [3]],
    {},
    {"a": 1},
    {"$or": []},
    {"text": "a"},
    {"year": {"$in": list(range(300))}},
]
HEADERS: list[dict[str, str]] = [
    {"content-type": "text/plain"},
    {"content-type": "application/json; charset=utf-16"},
    {"content-type": "application/json;;;=;charset"},
    {"content-encoding": "gzip"},
    {"content-encoding": "br, ,gzip"},
    {"x-raytower-timeout-ms": "-1"},
    {"x-raytower-timeout-ms": "1e3"},
    {"x-raytower-arrival": "nan"},
    {"x-raytower-arrival": "1e400"},
    {"content-length": "99999999999999999999"},
    {"content-length": "x"},
    {"host": ""},
    {"host": "[::1"},
    {"host": "\xff"},
    {"origin": "//["},
    {"mcp-protocol-version": "x"},
    {"authorization": "Bearer \xe9"},
]
MCP = (
    {
        "jsonrpc": "2.0",
        "id": 1,
        "method": "tools/call",
        "params": {"name": "search", "arguments": {"query": "a"}},
    },
    {"jsonrpc": "2.0", "id": "b", "method": "initialize", "params": {"protocolVersion": "2025-06-18"}},
)


def damaged(value: Any, dice: random.Random) -> Any:
    """A copy of a JSON value with one or two places replaced, dropped or doubled."""
    value = copy.deepcopy(value)
    for _ in range(dice.randint(1, 2)):
        part = value
        while True:
            places = list(part) if isinstance(part, dict) else list(range(len(part)))
            if not places:
                break
            place = dice.choice(places)
            if isinstance(part[place], (dict, list)) and dice.random() < 0.5:
                part = part[place]
                continue
            what = dice.random()
            if what < 0.6:
                part[place] = copy.deepcopy(dice.choice(ODD))
            elif what < 0.75:
                del part[place]
            elif isinstance(part, dict):
                part[dice.choice(["unknown", "top_n", "filter", "\ud800", "k "])] = part[place]
            else:
                part += part[:1] * 300
            break
    return value


def spoiled(body: bytes, dice: random.Random) -> bytes:
    """Bytes cut, changed, in another encoding, or nested."""
    what = dice.randrange(7)
    if what == 0:
        return body[: dice.randrange(len(body) + 1)]
    if what == 1:
        place = dice.randrange(len(body))
        return body[:place] + bytes([dice.randrange(256)]) + body[place + 1 :]
    if what == 2:
        return body.decode("utf-8", "replace").encode(
            dice.choice(["utf-16", "utf-32", "utf-16-be", "utf-8-sig"])
        )
    if what == 3:
        return b'{"a":' * dice.choice([10, 500, 990, 5000]) + body
    if what == 4:
        return body.replace(b"1", b"9" * dice.choice([30, 5000]))
    if what == 5:
        return body.replace(b"1", dice.choice([b"NaN", b"1e999999999", b"-Infinity", b"1E400", b"01", b"1."]))
    return body.replace(b"a", dice.choice([b"\\ud83d", b"\\u0000", b"\xff", b"\\udc00\\ud800"]))


async def ask(
    app: Application, method: str, path: str, query: bytes, headers: dict[str, str], body: bytes
) -> Any:
    scope = {
        "method": method,
        "path": path,
        "query_string": query,
        "headers": [(name.encode(), value.encode("latin-1")) for name, value in headers.items()],
    }
    half = len(body) // 2
    return await answered(app, scope, [body[:half], body[half:]], 60)


def test_damaged_requests_are_refused_by_name() -> None:
    app = create_app(DummyEngine(), HttpConfig(timeout_ms=60_000))
    right = [
        (route.path.format(collection="laws"), example)
        for route in app.routes
        if route.request is not None
        for example in route.request.examples
    ]
    right += [("/mcp", message) for message in MCP]
    assert len(right) > 25
    dice = random.Random(7)
    seen: collections.Counter[int] = collections.Counter()

    async def run() -> None:
        for _ in range(CASES):
            path, value = dice.choice(right)
            headers = {"host": "localhost", "content-type": "application/json"}
            if dice.random() < 0.85:
                value = damaged(value, dice)
            body = json.dumps(value, ensure_ascii=dice.random() < 0.5).encode("utf-8", "surrogatepass")
            if dice.random() < 0.3:
                body = spoiled(body, dice)
            if dice.random() < 0.1:
                body = gzip.compress(body)
                headers["content-encoding"] = "gzip"
                body = spoiled(body, dice) if dice.random() < 0.5 else body
            if dice.random() < 0.1:
                headers.update(dice.choice(HEADERS))
            method = dice.choice(["GET", "PUT", "HEAD", "OPTIONS"]) if dice.random() < 0.03 else "POST"
            query = dice.choice([b"", b"id=%ff", b"id=%00", b"a=1&a=2", b"\xff"])
            path = dice.choice([path, path, path, f"{path}/", path[:-1], f"/v1/\ud800{path}"])
            status, told = await ask(app, method, path, query, headers, body)
            seen[status] += 1
            assert status < 500 or status == 504, (status, path, headers, body[:2000], told)
            if status >= 400 and "mcp" not in path and method != "HEAD":
                assert set(json.loads(told)["error"]) == {"message", "type", "code"}, told

    asyncio.run(run())
    print(dict(seen))
    assert {200, 400, 404, 405, 413, 415, 422} <= set(seen) or CASES < 600
