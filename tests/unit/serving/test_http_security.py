"""Who may ask: keys and their limits, names in Host, origins, the admin routes, where a server may listen."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from raytower.errors import InputError
from raytower.serving.errors import OverloadedError
from raytower.serving.http.application import create_app
from raytower.serving.http.security import (
    Access,
    Doorkeeper,
    Key,
    check_security,
    hash_key,
    is_loopback,
    load_keys,
)
from raytower.serving.http_config import HttpConfig, SecurityConfig
from tests.support.dummy_engine import DummyEngine
from tests.unit.serving.test_http import assert_error

KEY = "s3cret-key"
KEYS = [
    Key(name="readers", sha256=hash_key(KEY)),
    Key(name="operators", sha256=hash_key("admin-key").upper(), admin=True),
]
ASK = {"query": "a"}


class Conductor:
    def __init__(self) -> None:
        self.asked: list[Any] = []

    async def status(self) -> Mapping[str, Any]:
        return {"members": ["one"]}

    async def reload(self, wanted: Mapping[str, Any]) -> Mapping[str, Any]:
        self.asked.append(("reload", wanted))
        return {"generation": "new"}

    async def rollback(self, wanted: Mapping[str, Any]) -> Mapping[str, Any]:
        self.asked.append(("rollback", wanted))
        return {"generation": "old"}


def client_of(
    *keys: Key, engine: DummyEngine | None = None, control: Any = None, host: str = "localhost", **values: Any
) -> TestClient:
    app = create_app(engine or DummyEngine(), HttpConfig(**values), keys, control=control)
    return TestClient(app, base_url=f"http://{host}", raise_server_exceptions=False)


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


# --- keys -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [{}, bearer("wrong"), {"Authorization": KEY}, {"Authorization": f"Basic {KEY}"}, bearer("ключ")],
)
def test_no_or_wrong_key_is_401(headers: dict[str, str]) -> None:
    engine = DummyEngine()
    sent = {name: value.encode() for name, value in headers.items()}
    with client_of(*KEYS, engine=engine) as client:
        for path in ("/v1/search", "/v1/embeddings", "/v1/rerank", "/rerank", "/mcp", "/nothing"):
            response = client.post(path, json=ASK, headers=sent)
            assert_error(response, 401, "invalid_api_key", "Bearer")
            assert response.headers["www-authenticate"] == "Bearer"
            assert KEY not in response.text
        for path in ("/openapi.json", "/v1/models", "/v1/collections", "/metrics", "/v1/admin/status"):
            assert_error(client.get(path, headers=sent), 401, "invalid_api_key")
    assert engine.calls == []


def test_the_key_opens_and_health_and_page_need_none() -> None:
    with client_of(*KEYS) as client:
        for key in (KEY, "admin-key"):
            assert client.post("/v1/search", json=ASK, headers=bearer(key)).status_code == 200
        assert (
            client.post("/v1/search", json=ASK, headers={"Authorization": f"bearer  {KEY}"}).status_code
            == 200
        )
        for path in ("/", "/healthz", "/readyz", "/healthz/"):
            assert client.get(path).status_code == 200


def test_a_wrong_key_is_refused_before_the_body_is_read() -> None:
    with client_of(*KEYS, limits={"max_body_bytes": 1024}) as client:
        assert_error(client.post("/v1/search", content=b"x" * 5000), 401, "invalid_api_key")


def test_keys_come_from_a_file_and_from_the_environment(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(
        f"- name: web\n  sha256: {hash_key('one')}\n  requests_per_second: 2.5\n  max_in_flight: 4\n"
        f"- {{name: ops, sha256: {hash_key('two')}, admin: true}}\n"
    )
    environment = {"SEARCH_KEY": " three\n", "ADMIN_KEY": "four", "OTHER": "x"}
    config = SecurityConfig(keys_file=str(path), key_env="SEARCH_KEY", admin_key_env="ADMIN_KEY")
    keys = load_keys(config, environment)
    assert [(key.name, key.admin) for key in keys] == [
        ("web", False),
        ("ops", True),
        ("SEARCH_KEY", False),
        ("ADMIN_KEY", True),
    ]
    assert keys[2].sha256 == hashlib.sha256(b"three").hexdigest()
    assert (keys[0].requests_per_second, keys[0].max_in_flight) == (2.5, 4)
    assert environment == {"OTHER": "x"}, "other processes must not inherit keys"
    assert load_keys(SecurityConfig(), environment) == ()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[]", "holds no key"),
        ("- name: web\n", "0.sha256"),
        ("- {name: web, sha256: s3cret-key}\n", "0.sha256"),
        ("web: s3cret-key\n", "list"),
        ("- [unclosed\n", "cannot be read"),
        ("\xff", "cannot be read"),
    ],
)
def test_a_bad_file_of_keys_is_refused_without_showing_keys(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "keys.yaml"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match="keys_file") as caught:
        load_keys(SecurityConfig(keys_file=str(path)), {})
    assert words in str(caught.value)
    assert "s3cret" not in str(caught.value)


def test_a_missing_file_or_variable_and_keys_twice_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        load_keys(SecurityConfig(keys_file=str(tmp_path / "none")), {})
    for value in ({}, {"SEARCH_KEY": " "}):
        with pytest.raises(InputError, match=r"security.key_env names 'SEARCH_KEY', which is unset or empty"):
            load_keys(SecurityConfig(key_env="SEARCH_KEY"), value)
    with pytest.raises(InputError, match="two keys have the sha256"):
        load_keys(SecurityConfig(key_env="A", admin_key_env="B"), {"A": "same", "B": "same"})


# --- limits of a key ------------------------------------------------------------------------------------------


def test_a_key_s_rate_fills_again() -> None:
    now = [100.0]
    key = Key(name="web", sha256="0" * 64, requests_per_second=2)
    door = Doorkeeper(HttpConfig(), [key], clock=lambda: now[0])
    access = Access(key=key)

    def ask() -> bool:
        try:
            with door.within_limits(access):
                return True
        except OverloadedError as error:
            return (error.code, error.headers["Retry-After"]) != ("rate_limited", "1")

    assert [ask() for _ in range(3)] == [True, True, False]
    now[0] += 0.5  # half a second fills one
    assert [ask(), ask()] == [True, False]
    now[0] += 60  # never more than a second's worth
    assert [ask() for _ in range(3)] == [True, True, False]
    with door.within_limits(Access()):
        pass


def test_a_slow_rate_says_how_long_to_wait() -> None:
    key = Key(name="web", sha256="0" * 64, requests_per_second=0.1)
    door = Doorkeeper(HttpConfig(), [key], clock=lambda: 5.0)
    with door.within_limits(Access(key=key)):
        pass
    with pytest.raises(OverloadedError, match=r"0\.1 times") as caught, door.within_limits(Access(key=key)):
        pass
    assert caught.value.headers == {"Retry-After": "10"}


def test_a_key_s_open_requests_are_bounded_and_end() -> None:
    key = Key(name="web", sha256="0" * 64, max_in_flight=1)
    door = Doorkeeper(HttpConfig(), [key])
    access = Access(key=key)

    def ask(inside: Callable[[], None]) -> None:
        with door.within_limits(access):
            inside()

    with pytest.raises(OverloadedError, match="1 requests open"):
        ask(lambda: ask(lambda: None))
    ask(lambda: None)


def test_over_its_limit_a_key_is_answered_429() -> None:
    key = Key(name="web", sha256=hash_key(KEY), requests_per_second=0.001)
    with client_of(key) as client:
        assert client.post("/v1/search", json=ASK, headers=bearer(KEY)).status_code == 200
        response = client.post("/v1/search", json=ASK, headers=bearer(KEY))
        assert_error(response, 429, "rate_limited", "'web'")
        assert int(response.headers["retry-after"]) > 900
        assert client.get("/readyz").status_code == 200


# --- where it may listen --------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "search.example.com", ""])
def test_a_server_without_keys_listens_on_loopback_alone(host: str) -> None:
    with pytest.raises(InputError, match=r"security\.keys_file.*security\.open"):
        check_security(HttpConfig(host=host))
    for security in ({"open": True}, {"key_env": "X"}, {"admin_key_env": "X"}, {"keys_file": "x"}):
        check_security(HttpConfig(host=host, security=security))


def test_an_application_is_not_left_open_by_mistake() -> None:
    with pytest.raises(InputError, match="none was given"):
        create_app(DummyEngine(), HttpConfig(security={"key_env": "X"}), [])
    with pytest.raises(InputError, match="other machines"):
        create_app(DummyEngine(), HttpConfig(host="0.0.0.0"), KEYS[:0])


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.8.8.8", "::1", "[::1]", "localhost", "LOCALHOST.", "a.localhost"]
)
def test_loopback_needs_no_key(host: str) -> None:
    check_security(HttpConfig(host=host))
    assert is_loopback(host)


# --- names and origins ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("localhost:8000", 200),
        ("127.0.0.1:8000", 200),
        ("[::1]:8000", 200),
        ("10.0.0.7", 200),
        ("raytower", 200),
        ("search.example.test", 200),
        ("other.example.test:8000", 200),
        ("evil.example", 421),
        ("evil.example:8000", 421),
        ("127.0.0.1.evil.example", 421),
        ("localhost.evil.example", 421),
        ("other.example.test", 421),
    ],
)
def test_without_keys_a_stranger_s_name_is_refused(host: str, status: int) -> None:
    allowed = ["search.example.test", "other.example.test:8000"]
    with client_of(security={"allowed_hosts": allowed}) as client:
        response = client.post("/v1/search", json=ASK, headers={"host": host})
        assert response.status_code == status
        if status == 421:
            assert_error(response, 421, "wrong_host", "security.allowed_hosts")
        assert client.get("/healthz", headers={"host": host}).status_code == 200


def test_with_keys_or_open_any_name_will_do() -> None:
    for client in (
        client_of(KEYS[0], host="search.example.com"),
        client_of(host="search.example.com", security={"open": True}),
    ):
        assert client.post("/v1/search", json=ASK, headers=bearer(KEY)).status_code == 200


def test_mcp_refuses_pages_of_other_sites() -> None:
    ping = {"jsonrpc": "2.0", "id": 1, "method": "ping"}
    with client_of(security={"cors_origins": ["https://app.example"]}) as client:
        for origin in (None, "http://localhost", "http://localhost:3000", "https://app.example"):
            headers = {} if origin is None else {"origin": origin}
            assert client.post("/mcp", json=ping, headers=headers).status_code == 200
        for origin in (
            "https://evil.example",
            "null",
            "null.evil.example",
            "//[.x",
            "https://[::1.evil.example",
        ):
            assert_error(client.post("/mcp", json=ping, headers={"origin": origin}), 403, "forbidden")


def test_cors_is_off_and_can_be_opened_to_origins() -> None:
    asked = {
        "origin": "https://app.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type",
    }
    with client_of() as client:
        assert client.options("/v1/search", headers=asked).status_code == 405
        plain = client.post("/v1/search", json=ASK, headers={"origin": "https://app.example"})
        assert "access-control-allow-origin" not in plain.headers
    with client_of(*KEYS, security={"cors_origins": ["https://app.example"]}) as client:
        allowed = client.options("/v1/search", headers=asked)
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == "https://app.example"
        assert "authorization" in allowed.headers["access-control-allow-headers"].lower()
        refused = client.options("/v1/search", headers={**asked, "origin": "https://evil.example"})
        assert "access-control-allow-origin" not in refused.headers
        answer = client.post("/v1/search", json=ASK, headers={**bearer(KEY), "origin": "https://app.example"})
        assert answer.headers["access-control-allow-origin"] == "https://app.example"
        assert "x-raytower-generation" in answer.headers["access-control-expose-headers"]
        # A page must be able to read why it was refused.
        wrong = client.post("/v1/search", json=ASK, headers={"origin": "https://app.example"})
        assert (wrong.status_code, wrong.headers["access-control-allow-origin"]) == (
            401,
            "https://app.example",
        )


def test_every_answer_has_the_security_headers() -> None:
    with client_of(*KEYS) as client:
        for response in (client.get("/healthz"), client.get("/nothing"), client.post("/v1/search", json=ASK)):
            assert response.headers["x-content-type-options"] == "nosniff"
            assert response.headers["x-frame-options"] == "DENY"
            assert response.headers["referrer-policy"] == "no-referrer"
            assert response.headers["cache-control"] == "no-store"
            assert "default-src 'none'" in response.headers["content-security-policy"]
        page = client.get("/")
        assert len(page.headers.get_list("content-security-policy")) == 1
        assert "script-src" in page.headers["content-security-policy"]


# --- admin ----------------------------------------------------------------------------------------------------


def test_admin_routes_ask_for_an_admin_key() -> None:
    control = Conductor()
    with client_of(*KEYS, control=control) as client:
        assert_error(client.get("/v1/admin/status", headers=bearer(KEY)), 403, "forbidden", "marked admin")
        for path in ("/v1/admin/reload", "/v1/admin/rollback"):
            assert_error(client.post(path, json={}, headers=bearer(KEY)), 403, "forbidden")
        admin = bearer("admin-key")
        assert client.get("/v1/admin/status", headers=admin).json() == {"members": ["one"]}
        wanted = {"collection": "laws", "version": None}
        assert client.post("/v1/admin/reload", json=wanted, headers=admin).json() == {"generation": "new"}
        assert client.post("/v1/admin/rollback", headers=admin).json() == {"generation": "old"}
        assert_error(client.post("/v1/admin/reload", json=[1], headers=admin), 422, "invalid_value", "object")
    assert control.asked == [("reload", {"collection": "laws"}), ("rollback", {})]


@pytest.mark.parametrize("origin", ["https://evil.example", "null"])
@pytest.mark.parametrize("path", ["/v1/admin/reload", "/v1/admin/rollback"])
def test_a_page_of_another_site_changes_nothing_that_is_served(path: str, origin: str) -> None:
    """A browser asks nobody before it sends a POST without a body, and a server without keys on loopback would obey."""
    control = Conductor()
    with client_of(control=control) as client:
        assert_error(client.post(path, headers={"origin": origin}), 403, "forbidden", "cors_origins")
        assert control.asked == []
        assert client.post(path, headers={"origin": "http://localhost"}).status_code == 200


def test_without_keys_admin_routes_are_for_loopback() -> None:
    with client_of(control=Conductor()) as client:
        assert client.post("/v1/admin/reload", json={}).status_code == 200
    for values in ({"security": {"open": True}}, {"host": "0.0.0.0", "security": {"open": True}}):
        with client_of(control=Conductor(), **values) as client:
            assert_error(client.post("/v1/admin/reload", json={}), 403, "forbidden")


def test_a_server_without_control_says_so() -> None:
    with client_of() as client:
        assert_error(client.get("/v1/admin/status"), 404, "not_configured")


# --- MCP by hand ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "status", "code"),
    [
        ([], 400, -32600),
        ({"method": "ping", "id": 1}, 400, -32600),
        ({"jsonrpc": "2.0", "id": True, "method": "ping"}, 400, -32600),
        ({"jsonrpc": "2.0", "id": 1, "method": "resources/list"}, 404, -32601),
        ({"jsonrpc": "2.0", "id": 1, "method": ["x"]}, 404, -32601),
        ({"jsonrpc": "2.0", "id": 1, "method": "ping", "params": [1]}, 400, -32602),
        ({"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": "drop"}}, 400, -32602),
        ({"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": ["search"]}}, 400, -32602),
    ],
)
def test_bad_messages_of_mcp_are_told_in_its_shape(message: Any, status: int, code: int) -> None:
    with client_of() as client:
        response = client.post("/mcp", json=message)
        assert response.status_code == status
        assert response.json()["error"]["code"] == code


def test_mcp_without_a_session() -> None:
    with client_of() as client:
        hello = {
            "jsonrpc": "2.0",
            "id": 0,
            "method": "initialize",
            "params": {"protocolVersion": "2025-06-18"},
        }
        assert client.post("/mcp", json=hello).json()["result"]["protocolVersion"] == "2025-06-18"
        hello["params"] = {"protocolVersion": "1999-01-01"}
        assert client.post("/mcp", json=hello).json()["result"]["protocolVersion"] == "2025-11-25"
        noted = client.post("/mcp", json={"jsonrpc": "2.0", "method": "notifications/initialized"})
        assert (noted.status_code, noted.content) == (202, b"")
        ping = {"jsonrpc": "2.0", "id": "p", "method": "ping"}
        assert client.post("/mcp", json=ping).json() == {"jsonrpc": "2.0", "id": "p", "result": {}}
        odd = client.post("/mcp", json=ping, headers={"mcp-protocol-version": "1999-01-01"}).json()
        assert odd["error"]["code"] == -32022
        assert "2026-07-28" in odd["error"]["data"]["supported"]
        assert client.get("/mcp").status_code == 405


@pytest.mark.parametrize("arguments", [[], "x", {"query": "a", "top": 1}, {"query": "a", "k": 51}, {}])
def test_bad_arguments_of_a_tool_are_told_to_the_model(arguments: Any) -> None:
    call = {
        "jsonrpc": "2.0",
        "id": 1,
        "method": "tools/call",
        "params": {"name": "search", "arguments": arguments},
    }
    with client_of() as client:
        result = client.post("/mcp", json=call).json()["result"]
    assert result["isError"] is True
    assert result["content"][0]["text"]


def test_long_texts_are_cut_in_a_search_and_whole_in_read_document() -> None:
    from raytower.retrieval.retriever import Hit

    engine = DummyEngine()
    engine.changes = {"hits": [[Hit("d:1", "x" * 3000, {}, 1.0, None, 1.0, 1)]]}
    call = {"jsonrpc": "2.0", "id": 1, "method": "tools/call"}
    with client_of(engine=engine) as client:
        params = {"name": "search", "arguments": {"query": "a"}}
        result = client.post("/mcp", json={**call, "params": params}).json()["result"]
    (hit,) = result["structuredContent"]["results"]
    assert (len(hit["text"]), hit["cut"]) == (2001, True)


def test_an_engine_s_failure_in_a_tool_is_an_http_error() -> None:
    engine = DummyEngine()

    async def hang() -> None:
        await asyncio.sleep(30)

    engine.work = hang
    params = {"name": "search", "arguments": {"query": "a", "timeout_ms": 30}}
    with client_of(engine=engine) as client:
        response = client.post(
            "/mcp", json={"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params}
        )
        assert_error(response, 504, "out_of_time")
