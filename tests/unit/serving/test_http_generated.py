"""Requests that nobody thought of, made by schemathesis from openapi.json: right ones are answered, none is a 5xx.

More of them: RAYTOWER_GENERATED_CASES=20000 python -m pytest tests/unit/serving/test_http_generated.py
"""

from __future__ import annotations

import asyncio
import collections
import functools
import json
import os
from typing import Any
from urllib.parse import urlencode

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from raytower.serving.http.application import Application, create_app
from raytower.serving.http_config import HttpConfig
from tests.support.asgi import answered
from tests.support.dummy_engine import DummyEngine

schemathesis = pytest.importorskip("schemathesis")

CASES = int(os.environ.get("RAYTOWER_GENERATED_CASES", "0"))
# What no schema can say: which columns, modes and lengths a collection has, and what a request costs in all.
_BEYOND_SCHEMAS = ("fields: there is no column", "mode: is", "dimensions: is", "recall_k: ", "filter: ")
_ROUTES = sorted(
    f"{route.method} {route.path}"
    for route in create_app(DummyEngine(), HttpConfig()).routes
    if route.response is not None
)


def answer(app: Application, case: Any) -> tuple[int, bytes]:
    """Status and body of a generated request, asked without a socket."""
    body = case.body if isinstance(case.body, bytes) else b""
    if not isinstance(case.body, (bytes, type(schemathesis.core.NOT_SET))):
        body = json.dumps(case.body).encode()
    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    headers += [
        (name.lower().encode("latin-1"), str(value).encode("utf-8", "replace"))
        for name, value in (case.headers or {}).items()
    ]
    scope = {
        "method": case.method.upper(),
        "path": case.path.format(**{**(case.path_parameters or {}), "collection": "default"}),
        "query_string": urlencode(case.query or {}, errors="replace").encode(),
        "headers": headers,
    }
    return asyncio.run(answered(app, scope, [body], 20))


@functools.cache
def described() -> Any:
    app = create_app(DummyEngine(), HttpConfig())
    return schemathesis.openapi.from_dict(json.loads(app._description))


@pytest.mark.parametrize("route", _ROUTES)
def test_generated_requests(route: str) -> None:
    app = create_app(DummyEngine(), HttpConfig(timeout_ms=60_000, token_ids="model"))
    method, path = route.split(" ")
    operation = described()[path][method]
    examples = max(CASES // sum(name.startswith("POST") for name in _ROUTES), 1) if CASES else 10
    seen: collections.Counter[str] = collections.Counter()
    modes = schemathesis.GenerationMode
    right = operation.as_strategy(generation_mode=modes.POSITIVE)
    wrong = operation.as_strategy(generation_mode=modes.NEGATIVE) if method == "POST" else right

    @seed(1)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=st.one_of(right.map(lambda case: (True, case)), wrong.map(lambda case: (False, case))))
    def run(case: tuple[bool, Any]) -> None:
        is_right, request = case
        status, body = answer(app, request)
        seen[f"{'right' if is_right else 'wrong'} {status}"] += 1
        # A request may ask for an answer within 1 ms.
        assert status < 500 or status == 504, body
        if status != 200:
            told = json.loads(body)["error"]
            assert set(told) == {"message", "type", "code"}
            if is_right and status != 504 and method == "POST" and "/admin/" not in path:
                assert told["message"].startswith(_BEYOND_SCHEMAS), told

    run()
    print(route, dict(seen))
    assert sum(seen.values()) > 0
