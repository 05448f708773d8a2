"""The commands that speak to a running server, over a server that notes what it is asked."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from raytower.errors import InputError, RaytowerError
from raytower.index.search_config import HybridConfig
from raytower.serving.client import reload_server, roll_server_back, server_status
from raytower.serving.config import ServeReloadConfig, ServeRollbackConfig, ServeStatusConfig


class Admin:
    """Answers every request with `answer`."""

    def __init__(self) -> None:
        self.answer: tuple[int, bytes] = (200, b'{"changed": true}')
        self.asked: list[tuple[str, str, Any, str | None]] = []
        admin = self

        class Handler(BaseHTTPRequestHandler):
            def _reply(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
                value = json.loads(body) if body else None
                admin.asked.append((self.command, self.path, value, self.headers.get("authorization")))
                status, text = admin.answer
                self.send_response(status)
                self.send_header("content-length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            do_GET = do_POST = _reply  # noqa: N815 - named by the library

            def log_message(self, format: str, *arguments: Any) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/below/"


@pytest.fixture
def admin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Admin]:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    admin = Admin()
    thread = threading.Thread(target=admin.server.serve_forever, args=(0.01,))
    thread.start()
    yield admin
    admin.server.shutdown()
    admin.server.server_close()
    thread.join()


def test_only_keys_that_are_given_are_sent(admin: Admin, monkeypatch: pytest.MonkeyPatch) -> None:
    assert reload_server(ServeReloadConfig(url=admin.url)) == {"changed": True}
    monkeypatch.setenv("ADMIN_KEY", "open sesame")
    config = ServeReloadConfig(
        url=admin.url,
        key_env="ADMIN_KEY",
        collection="law",
        reranker="none",
        fusion_weight=0.0,
        mode="hybrid",
        hybrid=HybridConfig(weight=0.4),
    )
    reload_server(config)
    roll_server_back(ServeRollbackConfig(url=admin.url))
    server_status(ServeStatusConfig(url=admin.url))
    wanted: dict[str, Any] = {"collection": "law", "reranker": "none", "fusion_weight": 0.0, "mode": "hybrid"}
    wanted["hybrid"] = {"weight": 0.4}
    assert admin.asked == [
        ("POST", "/below/v1/admin/reload", {}, None),
        ("POST", "/below/v1/admin/reload", wanted, "Bearer open sesame"),
        ("POST", "/below/v1/admin/rollback", {}, None),
        ("GET", "/below/v1/admin/status", None, None),
    ]


@pytest.mark.parametrize(
    ("status", "kind", "words"),
    [
        (401, InputError, "asks for another key"),
        (422, InputError, "422: no such version"),
        (409, RaytowerError, "409: no such version"),
    ],
)
def test_a_refusal_is_told_as_it_was_said(
    admin: Admin, status: int, kind: type[Exception], words: str
) -> None:
    admin.answer = (status, b'{"error": {"message": "no such version"}}')
    with pytest.raises(kind, match=words):
        server_status(ServeStatusConfig(url=admin.url))


def test_what_is_no_server_of_ours_is_told_as_it_is(admin: Admin) -> None:
    admin.answer = (502, b"<html>Bad Gateway</html>")
    with pytest.raises(RaytowerError, match="502: <html>Bad Gateway"):
        server_status(ServeStatusConfig(url=admin.url))
    admin.answer = (200, b"hello")
    with pytest.raises(RaytowerError, match="cannot be reached"):
        server_status(ServeStatusConfig(url=admin.url))
    with pytest.raises(RaytowerError, match="cannot be reached"):
        server_status(ServeStatusConfig(url="http://127.0.0.1:9"))
    with pytest.raises(InputError, match="NO_SUCH_KEY"):
        server_status(ServeStatusConfig(url=admin.url, key_env="NO_SUCH_KEY"))
