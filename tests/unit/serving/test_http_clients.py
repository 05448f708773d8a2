"""Clients of other services, unchanged, against a real server over a dummy engine. Extra `clients-test` brings them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raytower.serving.calls import EmbedCall, RerankCall
from raytower.serving.http.application import create_app
from raytower.serving.http.security import Key, hash_key
from raytower.serving.http_config import HttpConfig
from tests.support.dummy_engine import DummyEngine
from tests.support.http_server import listening

KEY = "sk-client"
VECTOR = pytest.approx([3 / 13, 4 / 13, 12 / 13], abs=1e-6)


@pytest.fixture(scope="module")
def shared() -> Iterator[tuple[DummyEngine, str]]:
    engine = DummyEngine()
    app = create_app(engine, HttpConfig(timeout_ms=30_000), [Key(name="clients", sha256=hash_key(KEY))])
    with listening(app) as port:
        yield engine, f"http://127.0.0.1:{port}"


@pytest.fixture
def engine(shared: tuple[DummyEngine, str]) -> DummyEngine:
    shared[0].calls.clear()
    return shared[0]


@pytest.fixture
def url(shared: tuple[DummyEngine, str]) -> str:
    return shared[1]


# --- OpenAI's ------------------------------------------------------------------------------------------------


def test_openai(engine: DummyEngine, url: str, tokens_without_network: None) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)
    # Its default asks for base64 and decodes that.
    assert client.embeddings.create(model="m", input="who pays").data[0].embedding == VECTOR
    plain = client.embeddings.create(model="m", input=["a", "b"], encoding_format="float")
    assert [item.embedding for item in plain.data] == [VECTOR, VECTOR]
    assert plain.usage.total_tokens == 2
    assert len(client.embeddings.create(model="m", input=[[1, 2], [3]]).data) == 2
    assert engine.calls[-1] == EmbedCall(texts=["\x01\x02", "\x03"])
    short = client.embeddings.create(model="m", input="a", dimensions=2)
    assert short.data[0].embedding == pytest.approx([0.6, 0.8])
    with pytest.raises(openai.UnprocessableEntityError, match="2, 3"):
        client.embeddings.create(model="m", input="a", dimensions=1)
    assert [model.id for model in client.models.list()] == ["org/dummy", "judge"]
    assert client.models.retrieve("judge").id == "judge"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0).models.list()
    slashed = openai.OpenAI(base_url=f"{url}/v1/", api_key=KEY, max_retries=0)
    assert slashed.embeddings.create(model="m", input="a").data[0].embedding == VECTOR


@pytest.fixture
def tokens_without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """tiktoken fetches its tables; the one here has a token for each byte."""
    tiktoken = pytest.importorskip("tiktoken")
    table = tiktoken.Encoding(
        "bytes", pat_str=r".", mergeable_ranks={bytes([byte]): byte for byte in range(256)}, special_tokens={}
    )
    monkeypatch.setattr(tiktoken, "encoding_for_model", lambda name: table)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: table)


def test_langchain_openai_with_its_defaults_sends_token_ids(
    engine: DummyEngine, url: str, tokens_without_network: None
) -> None:
    module = pytest.importorskip("langchain_openai")
    client = module.OpenAIEmbeddings(base_url=f"{url}/v1", api_key=KEY, model="text-embedding-3-small")
    assert client.embed_query("abc") == VECTOR
    assert engine.calls == [EmbedCall(texts=["abc"])]
    many = client.embed_documents([f"text {number}" for number in range(1200)])
    assert len(many) == 1200
    assert many[-1] == VECTOR


def test_llama_index_openai_like(engine: DummyEngine, url: str) -> None:
    module = pytest.importorskip("llama_index.embeddings.openai_like")
    client = module.OpenAILikeEmbedding(model_name="m", api_base=f"{url}/v1", api_key=KEY)
    assert client.get_query_embedding("a") == VECTOR
    assert client.get_text_embedding_batch(["a", "b"]) == [VECTOR, VECTOR]


# --- Cohere's -------------------------------------------------------------------------------------------------


def test_cohere_v2(engine: DummyEngine, url: str) -> None:
    cohere = pytest.importorskip("cohere")
    client = cohere.ClientV2(api_key=KEY, base_url=url)
    found = client.rerank(model="m", query="q", documents=["ab", "abcd"], top_n=1, max_tokens_per_doc=100)
    assert [(item.index, round(item.relevance_score, 6)) for item in found.results] == [(1, 0.982014)]
    assert found.id
    assert found.meta.api_version.version == "2"
    made = client.embed(
        model="m", texts=["ab"], input_type="search_document", embedding_types=["float", "ubinary"]
    )
    assert made.embeddings.float_ == [VECTOR]
    assert made.embeddings.ubinary == [[224]]
    assert made.meta.billed_units.input_tokens == 2
    assert engine.calls[-1] == EmbedCall(texts=["ab"], role="document")


def test_cohere_v1(engine: DummyEngine, url: str) -> None:
    cohere = pytest.importorskip("cohere")
    client = cohere.Client(api_key=KEY, base_url=url)
    found = client.rerank(model="m", query="q", documents=["ab", "abcd"], return_documents=True)
    assert [item.document.text for item in found.results] == ["abcd", "ab"]
    assert client.embed(model="m", texts=["ab"], input_type="search_query").embeddings == [VECTOR]


# --- LiteLLM's ways -------------------------------------------------------------------------------------------


@pytest.fixture
def litellm() -> Any:
    module = pytest.importorskip("litellm")
    module.suppress_debug_info = True
    return module


@pytest.mark.parametrize(
    ("provider", "path"),
    [
        ("hosted_vllm", ""),
        ("hosted_vllm", "/v1"),
        ("infinity", "/infinity"),
        ("jina_ai", "/v1"),
        ("cohere", "/v1/rerank"),
        ("huggingface", ""),
    ],
)
@pytest.mark.parametrize("asked", [{}, {"return_documents": False}, {"return_documents": True}])
def test_litellm_rerank(
    engine: DummyEngine, url: str, litellm: Any, provider: str, path: str, asked: dict[str, bool]
) -> None:
    found = litellm.rerank(
        model=f"{provider}/m",
        query="q",
        documents=["ab", "abcd"],
        top_n=2,
        api_base=url + path,
        api_key=KEY,
        **asked,
    )
    assert [item["index"] for item in found.results] == [1, 0]
    assert engine.calls == [RerankCall(query="q", documents=["ab", "abcd"])]


def test_litellm_infinity_at_the_root(engine: DummyEngine, url: str, litellm: Any) -> None:
    """Its documents would have to be bare texts, which others at this path do not take."""
    found = litellm.rerank(
        model="infinity/m", query="q", documents=["a"], api_base=url, api_key=KEY, return_documents=False
    )
    assert found.results[0]["index"] == 0


@pytest.mark.parametrize(
    ("provider", "path"),
    [
        ("openai", "/v1"),
        ("hosted_vllm", ""),
        ("hosted_vllm", "/v1"),
        ("infinity", ""),
        ("infinity", "/infinity"),
        ("jina_ai", "/v1"),
        ("huggingface", "/embed"),
    ],
)
def test_litellm_embedding(engine: DummyEngine, url: str, litellm: Any, provider: str, path: str) -> None:
    # Without its task LiteLLM asks the hub for it.
    task = {"input_type": "feature-extraction"} if provider == "huggingface" else {}
    made = litellm.embedding(
        model=f"{provider}/m", input=["ab", "c"], api_base=url + path, api_key=KEY, **task
    )
    assert [item["embedding"] for item in made.data] == [VECTOR, VECTOR]


# --- MCP ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["auto", "legacy"])
def test_the_official_mcp_client(engine: DummyEngine, url: str, mode: str) -> None:
    mcp = pytest.importorskip("mcp.client.client", reason="mcp 2 or later")
    from mcp.client.streamable_http import streamable_http_client

    http = pytest.importorskip("httpx2")

    async def run() -> None:
        async with http.AsyncClient(headers={"Authorization": f"Bearer {KEY}"}) as transport_client:
            transport = streamable_http_client(f"{url}/mcp", http_client=transport_client)
            async with mcp.Client(transport, mode=mode) as client:
                tools = (await client.list_tools()).tools
                assert [tool.name for tool in tools] == ["search", "read_document"]
                found = await client.call_tool("search", {"query": "moon", "k": 2})
                assert not found.is_error
                assert [hit["id"] for hit in found.structured_content["results"]] == ["d:0", "d:1"]
                assert json.loads(found.content[0].text) == found.structured_content
                read = await client.call_tool("read_document", {"id": "d:1", "collection": "laws"})
                assert read.structured_content["text"] == "sun"
                wrong = await client.call_tool("search", {"query": " "})
                assert wrong.is_error
                assert "query: is empty" in wrong.content[0].text

    asyncio.run(run())


# --- HTTP itself ----------------------------------------------------------------------------------------------

BODY = b'{"query": "who pays", "k": 1}'
OFFER = (
    b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
    b"HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA\r\n"
)
HEAD = (
    b"POST /v1/search HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nAuthorization: Bearer "
    + KEY.encode()
    + b"\r\n"
)


@pytest.mark.parametrize(
    "rest",
    [
        b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY,
        b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % len(BODY) + BODY + b"\r\n0\r\n\r\n",
    ],
    ids=["length", "chunks"],
)
def test_an_offer_of_http_2_does_not_lose_the_body(engine: DummyEngine, url: str, rest: bytes) -> None:
    with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])), timeout=20) as connection:
        for _ in range(2):  # the connection goes on
            connection.sendall(HEAD + OFFER + rest)
            got = b""
            while b'"total":' not in got:
                chunk = connection.recv(65536)
                assert chunk, got
                got += chunk
            assert got.startswith(b"HTTP/1.1 200 ")
    assert [call.queries for call in engine.calls] == [["who pays"]] * 2


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl_that_offers_http_2(engine: DummyEngine, url: str) -> None:
    command = [
        "curl",
        "-s",
        "--noproxy",
        "*",
        "--http2",
        "-w",
        " %{http_code}",
        "-H",
        f"Authorization: Bearer {KEY}",
    ]
    command += ["-H", "Content-Type: application/json", "-d", BODY.decode(), f"{url}/v1/search"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert said.endswith(" 200")
    assert engine.calls[0].queries == ["who pays"]


JAVA = """
import java.net.URI;
import java.net.http.*;

public class Ask {
    public static void main(String[] a) throws Exception {
        HttpRequest request = HttpRequest.newBuilder(URI.create(a[0] + "/v1/search"))
            .header("Content-Type", "application/json").header("Authorization", "Bearer " + a[1])
            .POST(HttpRequest.BodyPublishers.ofString("{\\"query\\": \\"who pays\\"}")).build();
        System.out.print(HttpClient.newHttpClient().send(request, HttpResponse.BodyHandlers.ofString()).statusCode());
    }
}
"""


@pytest.mark.skipif(shutil.which("java") is None, reason="needs Java")
def test_java_s_own_client(engine: DummyEngine, url: str, tmp_path: Path) -> None:
    source = tmp_path / "Ask.java"
    source.write_text(JAVA)
    ran = subprocess.run(
        ["java", str(source), url, KEY], capture_output=True, text=True, timeout=120, check=False
    )
    if "compiler" in ran.stderr.lower() and ran.returncode:
        pytest.skip("needs Java's compiler")
    assert ran.stdout == "200", ran.stderr
    assert engine.calls[0].queries == ["who pays"]


def _raw(url: str, data: bytes) -> bytes:
    """What comes back for bytes as they are, until the server closes."""
    got = b""
    with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])), timeout=20) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(data)
        with contextlib.suppress(ConnectionError):
            while chunk := connection.recv(65536):
                got += chunk
    return got


def test_10_mb_are_refused_with_and_without_a_length(engine: DummyEngine, url: str) -> None:
    for head in (
        HEAD + b"Content-Length: 10485760\r\n\r\n" + b" " * 1000,
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"100000\r\n%s\r\n" % (b" " * 0x100000) * 10,
    ):
        assert b" 413 " in _raw(url, head).split(b"\r\n")[0]
    assert engine.calls == []


def test_half_a_body_leaves_the_server_well(engine: DummyEngine, url: str) -> None:
    with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])), timeout=20) as connection:
        connection.sendall(HEAD + b'Content-Length: 100\r\n\r\n{"query": ')
    closing = HEAD + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(BODY) + BODY
    assert _raw(url, closing).startswith(b"HTTP/1.1 200 ")
    assert len(engine.calls) == 1


def test_head_over_the_wire_has_no_body(url: str) -> None:
    said = _raw(url, b"HEAD /readyz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    head, _, body = said.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    assert b"content-length: " in head.lower()
    assert body == b""


def test_offers_of_http_2_in_every_cut_and_one_behind_another(engine: DummyEngine, url: str) -> None:
    """Requests with and without a body, in two pieces cut anywhere, and both at once."""
    length = b"Content-Length: %d\r\n\r\n" % len(BODY)
    asked = HEAD + OFFER + length + BODY
    probe = b"GET /healthz HTTP/1.1\r\nHost: x\r\n" + OFFER + b"\r\n"
    address = ("127.0.0.1", int(url.rsplit(":", 1)[1]))
    with socket.create_connection(address, timeout=20) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for cut in range(1, len(asked), 7):
            connection.sendall(asked[:cut])
            time.sleep(0.002)
            connection.sendall(asked[cut:])
            assert _answer(connection).startswith(b"HTTP/1.1 200 ")
        engine.calls.clear()
        connection.sendall(probe + asked + HEAD + length + BODY + probe)
        answers = [_answer(connection) for _ in range(4)]
    assert [answer[9:12] for answer in answers] == [b"200"] * 4
    assert [call.queries for call in engine.calls] == [["who pays"]] * 2


@pytest.mark.parametrize("hosts", [b"", b"Host: x\r\nHost: y\r\n"], ids=["none", "two"])
def test_a_request_names_one_host(url: str, hosts: bytes) -> None:
    """Which host is meant decides who may ask (RFC 9112, 3.2)."""
    assert b" 400 " in _raw(url, b"GET /healthz HTTP/1.1\r\n" + hosts + b"\r\n").split(b"\r\n")[0]
    assert b" 200 " in _raw(url, b"GET /healthz HTTP/1.0\r\n\r\n").split(b"\r\n")[0]


def _answer(connection: socket.socket) -> bytes:
    """One answer with its body; not a byte of the next."""
    got = b""
    while b"\r\n\r\n" not in got:
        byte = connection.recv(1)
        assert byte, got
        got += byte
    length = int(got.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
    while length > 0:
        piece = connection.recv(length)
        assert piece, got
        got, length = got + piece, length - len(piece)
    return got
