"""nginx and Caddy with the configurations of deploy/ in front of a server, under a path prefix."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raytower.serving.http.application import create_app
from raytower.serving.http_config import HttpConfig, Limits
from tests.support.dummy_engine import DummyEngine
from tests.support.http_server import listening
from tests.support.metric_names import busy_metrics
from tests.support.processes import free_port
from tests.support.reverse_proxies import PROXIES, Proxy

SEARCH = json.dumps({"query": "怎么开通微粒贷", "k": 2})
JSON = ("-H", "content-type: application/json")
EPOCH = 4711


class Control:
    """What operators would be told."""

    async def status(self) -> dict[str, Any]:
        return {"epoch": EPOCH}

    async def reload(self, wanted: Any) -> dict[str, Any]:
        return {"epoch": EPOCH}

    rollback = reload


@pytest.fixture(scope="module")
def engine() -> DummyEngine:
    return DummyEngine()


@pytest.fixture(scope="module", params=sorted(PROXIES))
def proxy(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, engine: DummyEngine
) -> Iterator[Proxy]:
    """A proxy before an application without keys: whatever reaches it is answered."""
    limits = Limits(max_document_characters=8_000_000)
    app = create_app(engine, HttpConfig(limits=limits), metrics=busy_metrics(), control=Control())
    with listening(app) as port:
        folder = tmp_path_factory.mktemp(request.param)
        with PROXIES[request.param](folder, f"127.0.0.1:{port}") as started:  # type: ignore[attr-defined]
            yield started


def curl(*arguments: str, send: bytes | None = None) -> tuple[int, dict[str, str], str]:
    """Status, headers in lower case and body of one request."""
    done = subprocess.run(
        ["curl", "-sS", "--max-time", "30", "-D", "-", *arguments],
        input=send,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    head, _, body = done.stdout.partition(b"\r\n\r\n")
    # Before the answer to a body, or to an offer of another protocol, there may be one of status 1xx.
    while head.split()[1].startswith(b"1"):
        head, _, body = body.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return int(status.split()[1]), headers, body.decode()


@pytest.mark.parametrize(
    ("secure", "options", "version"),
    [
        (True, ["--http2"], "2"),
        (True, ["--http1.1"], "1.1"),
        (False, ["--http1.1"], "1.1"),
        # As Java's client offers by default: on HTTP/1.1 with a body.
        (False, ["--http2"], "1.1"),
    ],
    ids=["tls http2", "tls http1", "http1", "offer of http2"],
)
def test_the_prefix_is_stripped_and_the_body_arrives(
    proxy: Proxy, secure: bool, options: list[str], version: str
) -> None:
    base = proxy.secure if secure else proxy.plain
    options = [*options, "--cacert", str(proxy.certificate), "-w", "%{http_version}"]
    status, headers, body = curl(*options, f"{base}/v1/search", *JSON, "-d", SEARCH)
    answer, _, spoken = body.rpartition("}")
    assert (status, spoken) == (200, version)
    assert len(json.loads(answer + "}")["results"][0]) == 2
    assert headers["x-raytower-generation"]


def test_the_page_is_there_with_and_without_the_last_slash(proxy: Proxy) -> None:
    status, headers, _ = curl(proxy.plain)
    assert status == 308
    assert headers["location"] == "/search/"
    status, _, body = curl(f"{proxy.plain}/")
    assert (status, "<title>Search</title>" in body) == (200, True)


def test_head_and_query_strings_pass(proxy: Proxy) -> None:
    status, _, body = curl("-I", f"{proxy.plain}/readyz")
    assert (status, body.strip()) == (200, "")
    status, _, body = curl("-G", f"{proxy.plain}/v1/documents", "--data-urlencode", "id=d:0")
    assert (status, json.loads(body)["id"]) == (200, "d:0")


def test_an_id_goes_through_and_one_is_made_where_none_is(proxy: Proxy) -> None:
    assert curl("-H", "x-request-id: req-7", f"{proxy.plain}/readyz")[1]["x-request-id"] == "req-7"
    assert len(curl(f"{proxy.plain}/readyz")[1]["x-request-id"]) == 32


def test_the_servers_errors_pass_as_they_are(proxy: Proxy, engine: DummyEngine) -> None:
    engine.ready = False
    status, headers, body = curl(f"{proxy.plain}/v1/models")
    engine.ready = True
    assert (status, headers["retry-after"]) == (503, "1")
    assert json.loads(body)["error"]["code"] == "not_ready"
    status, _, body = curl(f"{proxy.plain}/no/such/route")
    assert (status, json.loads(body)["error"]["code"]) == (404, "not_found")


INSIDE = ["/metrics", "/metrics/", "/%6detrics", "//metrics", "/v1/../metrics"]
INSIDE += ["/v1/admin", "/v1/admin/status", "/v1/%61dmin/status", "/v1/admin/reload"]


@pytest.mark.parametrize("path", INSIDE)
def test_figures_and_control_are_not_for_the_outside(proxy: Proxy, path: str) -> None:
    status, _, body = curl("--path-as-is", proxy.plain + path)
    assert status in (404, 400)
    assert "raytower_" not in body
    assert str(EPOCH) not in body


def document_of(size: int) -> bytes:
    return json.dumps({"query": "q", "documents": ["x" * size]}).encode()


def test_a_body_within_the_limit_passes(proxy: Proxy) -> None:
    raw = document_of(4 * 1024 * 1024 - 1000)
    status, _, body = curl(f"{proxy.plain}/v1/rerank", *JSON, "--data-binary", "@-", send=raw)
    assert status == 200, body[:200]


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_beyond_the_limit_is_refused_in_the_servers_words(proxy: Proxy, chunked: bool) -> None:
    options = ["-H", "transfer-encoding: chunked"] if chunked else []
    raw = document_of(10 * 1024 * 1024)
    status, headers, body = curl(*options, f"{proxy.plain}/v1/rerank", *JSON, "--data-binary", "@-", send=raw)
    assert status == 413
    assert headers["content-type"].startswith("application/json")
    assert json.loads(body)["error"]["code"] == "too_large"


@pytest.mark.parametrize("name", sorted(PROXIES))
def test_a_server_that_is_away_is_a_502_in_the_servers_words(name: str, tmp_path: Path) -> None:
    start: Any = PROXIES[name]
    with start(tmp_path, f"127.0.0.1:{free_port()}") as proxy:
        since = time.monotonic()
        status, headers, body = curl(f"{proxy.plain}/v1/search", "-d", SEARCH)
        assert time.monotonic() - since < 10
        assert status == 502
        assert headers["retry-after"] == "1"
        assert headers["content-type"].startswith("application/json")
        assert json.loads(body)["error"]["code"] == "unreachable"
