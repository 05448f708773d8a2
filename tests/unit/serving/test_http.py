"""The HTTP interface over a dummy engine: no weights, no Ray. Every status code, and what the bodies hold."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from raytower.errors import InputError
from raytower.retrieval.retriever import Hit
from raytower.serving.app import EmbedAnswer, ScoreAnswer, SearchAnswer, SearchCall, create_app
from raytower.serving.config import ServeConfig
from raytower.serving.schemas import NotConfiguredError
from raytower.serving.work import Deadline

KEY = "s3cret-key"
TEXTS = ["月亮 moon", "sun", "star"]


class DummyEngine:
    """Three documents; vectors (3, 4, 0) scaled by the text's length; logits are the documents' lengths."""

    def __init__(self) -> None:
        self.index_version: str | None = "v7"
        self.calls: list[tuple[Any, ...]] = []
        self.work: Callable[[Deadline], None] = lambda deadline: None
        self.has_reranker = True

    def search(self, call: SearchCall, deadline: Deadline) -> SearchAnswer:
        self.calls.append(
            (call.queries, call.k, call.recall_k, call.rerank, deadline.timeout_ms, call.filter)
        )
        self.work(deadline)
        reranked = call.rerank and self.has_reranker
        hits = [
            Hit(
                f"d:{row}",
                text,
                {"lang": "zh", "year": 2020 + row},
                1.0 - row,
                0.5 if reranked else None,
                2.0 - row,
                row + 1,
            )
            for row, text in enumerate(TEXTS[: call.k])
        ]
        timings = {"encode": 1.0, "recall": 2.0, "rerank": 3.0, "total": 6.0}
        return SearchAnswer("v7", False, reranked, [hits for _ in call.queries], timings)

    def embed(self, texts: list[str], role: str | None, deadline: Deadline) -> EmbedAnswer:
        self.calls.append((texts, role))
        vectors = np.array([[3, 4, 12] for _ in texts], dtype=np.float32) / 13
        return EmbedAnswer("v7", "dummy", vectors, sum(len(text) for text in texts))

    def score(self, query: str, documents: list[str], deadline: Deadline) -> ScoreAnswer:
        if not self.has_reranker:
            raise NotConfiguredError("this server has no reranker")
        return ScoreAnswer("v7", "dummy", np.array([len(text) for text in documents], dtype=np.float32))


@pytest.fixture
def engine() -> DummyEngine:
    return DummyEngine()


def make_client(engine: DummyEngine, key: str | None = None, **values: Any) -> TestClient:
    digest = hashlib.sha256(key.encode()).digest() if key else None
    app = create_app(engine, ServeConfig(index="unused", **values), digest)
    return TestClient(app, raise_server_exceptions=False)


@pytest.fixture
def client(engine: DummyEngine) -> Iterator[TestClient]:
    with make_client(engine) as made:
        yield made


def assert_error(response: Any, status: int, code: str, *words: str) -> None:
    """The OpenAI error shape and nothing beside it, with `words` in the message."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"].startswith("application/json")
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "code"}
    assert body["error"]["code"] == code
    for word in words:
        assert word in body["error"]["message"]


# --- search ---------------------------------------------------------------------------------------------------


def test_search_answers_with_the_contract(client: TestClient, engine: DummyEngine) -> None:
    response = client.post("/v1/search", json={"query": "月", "k": 2})
    assert response.status_code == 200
    body = response.json()
    assert set(body) == {"index_version", "partial", "reranked", "timings_ms", "results"}
    assert (body["index_version"], body["partial"], body["reranked"]) == ("v7", False, True)
    assert set(body["timings_ms"]) == {"encode", "recall", "rerank", "total"}
    assert body["timings_ms"]["recall"] == 2.0
    (hits,) = body["results"]
    assert hits[0] == {
        "id": "d:0",
        "text": "月亮 moon",
        "metadata": {"lang": "zh", "year": 2020},
        "recall_score": 1.0,
        "rerank_score": 0.5,
        "score": 2.0,
        "rank": 1,
    }
    assert [hit["rank"] for hit in hits] == [1, 2]
    assert engine.calls == [(["月"], 2, 100, True, 2000, None)]


def test_search_passes_what_was_asked_for(client: TestClient, engine: DummyEngine) -> None:
    body = {
        "queries": ["a", "b"],
        "k": 5,
        "recall_k": 7,
        "rerank": False,
        "timeout_ms": 900,
        "filter": {"year": 2024},
    }
    response = client.post("/v1/search", json=body)
    assert response.status_code == 200
    assert len(response.json()["results"]) == 2
    assert response.json()["reranked"] is False
    assert response.json()["results"][0][0]["rerank_score"] is None
    assert engine.calls == [(["a", "b"], 5, 7, False, 900, {"year": 2024})]


def test_recall_depth_defaults_to_at_least_k(client: TestClient, engine: DummyEngine) -> None:
    client.post("/v1/search", json={"query": "a", "k": 300})
    assert engine.calls[0][1:3] == (300, 300)


def test_k_beyond_the_index_returns_every_row(client: TestClient) -> None:
    response = client.post("/v1/search", json={"query": "a", "k": 1000})
    assert len(response.json()["results"][0]) == 3


@pytest.mark.parametrize(
    ("body", "code", "words"),
    [
        ({"query": ""}, "invalid_value", ("query:", "empty")),
        ({"query": " \t\n　"}, "invalid_value", ("query:", "whitespace")),
        ({"queries": ["fine", "  "]}, "invalid_value", ("queries.1:", "whitespace")),
        ({"queries": []}, "invalid_value", ("queries:", "1 to 64")),
        ({"queries": ["x"] * 65}, "invalid_value", ("queries:", "65", "1 to 64")),
        ({}, "invalid_value", ("query, queries", "neither")),
        ({"query": "a", "queries": ["b"]}, "invalid_value", ("query, queries", "both")),
        ({"query": "a", "k": 0}, "invalid_value", ("k:", "greater than or equal to 1")),
        ({"query": "a", "k": -3}, "invalid_value", ("k:",)),
        ({"query": "a", "k": 1001}, "invalid_value", ("k:", "1001", "1000")),
        ({"query": "a", "k": 10**400}, "invalid_value", ("k:",)),
        ({"query": "a", "k": "10"}, "invalid_value", ("k:", "integer")),
        ({"query": "a", "k": True}, "invalid_value", ("k:", "integer")),
        ({"query": "a", "k": 10, "recall_k": 9}, "invalid_value", ("recall_k:", "9", "10")),
        ({"query": "a", "recall_k": 5000}, "invalid_value", ("recall_k:", "1000")),
        ({"query": "a", "rerank": "yes"}, "invalid_value", ("rerank:", "boolean")),
        ({"query": "a", "timeout_ms": 0}, "invalid_value", ("timeout_ms:",)),
        ({"query": "a", "timeout_ms": 10**9}, "invalid_value", ("timeout_ms:", "60000")),
        ({"query": 5}, "invalid_value", ("query:", "string")),
        ({"query": "a", "filter": "zh"}, "invalid_value", ("filter:",)),
        ({"query": "a", "top_k": 3}, "unknown_field", ("top_k", "unknown field", "recall_k")),
    ],
)
def test_bad_search_values_are_422_naming_field_and_rule(
    client: TestClient, engine: DummyEngine, body: dict[str, Any], code: str, words: tuple[str, ...]
) -> None:
    assert_error(client.post("/v1/search", json=body), 422, code, *words)
    assert engine.calls == []


@pytest.mark.parametrize("half", ["\\ud800", "fine\\udfff"])
def test_lone_surrogates_in_names_and_values_are_no_500(
    client: TestClient, engine: DummyEngine, half: str
) -> None:
    headers = {"content-type": "application/json"}
    as_name = client.post("/v1/search", content=f'{{"query": "a", "{half}": 1}}', headers=headers)
    assert_error(as_name, 422, "invalid_value", "name is not valid Unicode")
    as_value = client.post("/v1/search", content=f'{{"query": "{half}"}}', headers=headers)
    assert_error(as_value, 422, "invalid_value", "query:", "lone surrogate")
    assert engine.calls == []


def test_messages_name_fields_and_not_the_branches_of_unions(client: TestClient) -> None:
    response = client.post("/v1/embeddings", json={"input": 3})
    assert_error(response, 422, "invalid_value", "input: input should be a valid string")
    assert "list[" not in response.text
    response = client.post("/v1/rerank", json={"query": "q", "documents": [{"txt": "a"}]})
    assert_error(response, 422, "invalid_value", "documents.0.txt: unknown field")


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"",
        b"nonsense",
        b'{"query": "a",}',
        b'{"query": "\xff\xfe"}',
        b"[" * 100_000,
        b'{"k": ' + b"9" * 10_000 + b"}",
    ],
)
def test_malformed_json_is_400(client: TestClient, content: bytes) -> None:
    response = client.post("/v1/search", content=content, headers={"content-type": "application/json"})
    if content == b"":
        assert_error(response, 422, "invalid_value", "JSON object")
    else:
        assert_error(response, 400, "invalid_json", "JSON")


@pytest.mark.parametrize("content", [b"[]", b'"text"', b"3", b"null"])
def test_json_that_is_no_object_is_422(client: TestClient, content: bytes) -> None:
    response = client.post("/v1/search", content=content, headers={"content-type": "application/json"})
    assert_error(response, 422, "invalid_value", "JSON object")


def test_a_form_body_is_told_what_content_type_to_send(client: TestClient) -> None:
    response = client.post("/v1/search", content=b'{"query": "a"}', headers={"content-type": "text/plain"})
    assert_error(response, 422, "invalid_value", "Content-Type: application/json")


# --- size -----------------------------------------------------------------------------------------------------


def test_a_query_of_1_mb_is_413(client: TestClient, engine: DummyEngine) -> None:
    assert_error(
        client.post("/v1/search", json={"query": "x" * 1_000_000}), 413, "too_large", "query:", "8192"
    )
    assert_error(
        client.post("/v1/search", json={"queries": ["x" * 8193]}), 413, "too_large", "queries.0:", "8193"
    )
    assert client.post("/v1/search", json={"query": "x" * 8192}).status_code == 200
    assert len(engine.calls) == 1


def test_a_body_over_the_limit_is_413_with_and_without_a_stated_length(engine: DummyEngine) -> None:
    with make_client(engine, limits={"max_body_bytes": 2000}) as client:
        headers = {"content-type": "application/json"}
        big = json.dumps({"query": "x" * 2000}).encode()
        assert_error(client.post("/v1/search", content=big, headers=headers), 413, "too_large", "2000 bytes")
        chunks = (big[start : start + 100] for start in range(0, len(big), 100))
        assert_error(
            client.post("/v1/search", content=chunks, headers=headers), 413, "too_large", "2000 bytes"
        )
        fits = json.dumps({"query": "x" * 1900}).encode()
        assert (
            client.post("/v1/search", content=iter([fits[:50], fits[50:]]), headers=headers).status_code
            == 200
        )


# --- embeddings -----------------------------------------------------------------------------------------------


def test_embeddings_have_openai_s_shape(client: TestClient, engine: DummyEngine) -> None:
    response = client.post("/v1/embeddings", json={"input": ["ab", "cde"], "model": "any", "user": "me"})
    assert response.status_code == 200
    body = response.json()
    assert body["object"] == "list"
    assert body["model"] == "dummy"
    assert body["usage"] == {"prompt_tokens": 5, "total_tokens": 5}
    assert body["index_version"] == "v7"
    assert [item["index"] for item in body["data"]] == [0, 1]
    assert body["data"][0]["object"] == "embedding"
    assert body["data"][0]["embedding"] == pytest.approx([3 / 13, 4 / 13, 12 / 13])
    assert engine.calls == [(["ab", "cde"], None)]


def test_embeddings_of_one_string_in_base64_are_little_endian_float32(client: TestClient) -> None:
    asked = {"input": "text", "encoding_format": "base64", "input_type": "query"}
    body = client.post("/v1/embeddings", json=asked).json()
    values = struct.unpack("<3f", base64.b64decode(body["data"][0]["embedding"]))
    assert values == pytest.approx([3 / 13, 4 / 13, 12 / 13])


def test_dimensions_cut_and_bring_back_to_length_one(client: TestClient) -> None:
    body = client.post("/v1/embeddings", json={"input": "text", "dimensions": 2}).json()
    assert body["data"][0]["embedding"] == pytest.approx([0.6, 0.8])
    response = client.post("/v1/embeddings", json={"input": "text", "dimensions": 4})
    assert_error(response, 422, "invalid_value", "dimensions:", "4", "3")


@pytest.mark.parametrize(
    ("body", "status", "code", "words"),
    [
        ({}, 422, "invalid_value", ("input", "required")),
        ({"input": []}, 422, "invalid_value", ("input:", "1 to 256")),
        ({"input": ["a"] * 257}, 422, "invalid_value", ("input:", "257")),
        ({"input": ["a", " "]}, 422, "invalid_value", ("input.1:",)),
        ({"input": [1, 2]}, 422, "invalid_value", ("input",)),
        ({"input": "a", "dimensions": 0}, 422, "invalid_value", ("dimensions:",)),
        ({"input": "a", "encoding_format": "hex"}, 422, "invalid_value", ("encoding_format:",)),
        ({"input": "a", "truncate": True}, 422, "unknown_field", ("truncate",)),
        ({"input": "a" * 70_000}, 413, "too_large", ("input:", "65536")),
    ],
)
def test_bad_embeddings_requests(
    client: TestClient, body: dict[str, Any], status: int, code: str, words: tuple[str, ...]
) -> None:
    assert_error(client.post("/v1/embeddings", json=body), status, code, *words)


# --- rerank ---------------------------------------------------------------------------------------------------


def test_rerank_sorts_and_squashes(client: TestClient) -> None:
    body = {"query": "q", "documents": ["ab", {"text": "abcd"}, "a"], "top_n": 2, "return_documents": True}
    answer = client.post("/v1/rerank", json=body).json()
    assert answer["model"] == "dummy"
    assert answer["index_version"] == "v7"
    assert [item["index"] for item in answer["results"]] == [1, 0]
    assert answer["results"][0]["document"] == {"text": "abcd"}
    # logistic(4) and logistic(2), from a table
    assert [item["relevance_score"] for item in answer["results"]] == pytest.approx([0.98201379, 0.88079708])
    without = client.post("/v1/rerank", json={"query": "q", "documents": ["ab", "b"]}).json()
    assert len(without["results"]) == 2
    assert without["results"][0]["document"] is None


def test_rerank_keeps_the_order_of_logits_that_squash_to_one(client: TestClient) -> None:
    answer = client.post("/v1/rerank", json={"query": "q", "documents": ["a" * 100, "a" * 200]}).json()
    assert [item["index"] for item in answer["results"]] == [1, 0]
    assert [item["relevance_score"] for item in answer["results"]] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"query": "q", "documents": []}, ("documents:", "1 to 1000")),
        ({"query": "q", "documents": ["a"] * 1001}, ("documents:", "1001")),
        ({"query": "q", "documents": ["a", ""]}, ("documents.1:",)),
        ({"query": "q", "documents": [{"txt": "a"}]}, ("documents.0",)),
        ({"query": "", "documents": ["a"]}, ("query:",)),
        ({"query": "q", "documents": ["a"], "top_n": 0}, ("top_n:",)),
    ],
)
def test_bad_rerank_requests_are_422(
    client: TestClient, body: dict[str, Any], words: tuple[str, ...]
) -> None:
    response = client.post("/v1/rerank", json=body)
    assert response.status_code == 422
    for word in words:
        assert word in response.json()["error"]["message"]


def test_rerank_without_a_reranker_is_404_that_says_so(client: TestClient, engine: DummyEngine) -> None:
    engine.has_reranker = False
    response = client.post("/v1/rerank", json={"query": "q", "documents": ["a"]})
    assert_error(response, 404, "not_configured", "no reranker")


# --- overload, time, failure ----------------------------------------------------------------------------------


def test_overload_is_429_with_retry_after_and_recovers(engine: DummyEngine) -> None:
    release = threading.Event()
    engine.work = lambda deadline: bool(release.wait(10)) and None
    with (
        make_client(engine, max_ongoing_requests=1, max_queued_requests=1, timeout_ms=10_000) as client,
        ThreadPoolExecutor(4) as pool,
    ):
        ask = lambda: client.post("/v1/search", json={"query": "a"})  # noqa: E731
        admitted = [pool.submit(ask), pool.submit(ask)]
        deadline = time.monotonic() + 5
        response = ask() if _wait(lambda: len(engine.calls) == 1, deadline) else None
        while response is not None and response.status_code == 200:
            response = ask()
        assert_error(response, 429, "overloaded")
        assert response is not None
        assert int(response.headers["retry-after"]) >= 1
        assert client.get("/healthz").status_code == 200
        assert len(engine.calls) == 1, "the queued request must not have begun"
        release.set()
        assert [future.result().status_code for future in admitted] == [200, 200]
        assert ask().status_code == 200


def test_work_that_outlives_its_answer_still_holds_its_place(engine: DummyEngine) -> None:
    release = threading.Event()
    engine.work = lambda deadline: bool(release.wait(10)) and None
    with make_client(engine, max_ongoing_requests=1, max_queued_requests=0) as client:
        late = client.post("/v1/search", json={"query": "a", "timeout_ms": 50})
        assert_error(late, 504, "out_of_time", "50 ms")
        assert_error(client.post("/v1/search", json={"query": "a"}), 429, "overloaded")
        release.set()
        assert _wait(
            lambda: client.post("/v1/search", json={"query": "a"}).status_code == 200, time.monotonic() + 5
        )


def test_a_request_that_waited_too_long_is_504_and_never_begins(engine: DummyEngine) -> None:
    release = threading.Event()
    engine.work = lambda deadline: bool(release.wait(10)) and None
    with (
        make_client(engine, max_ongoing_requests=1, max_queued_requests=4, timeout_ms=10_000) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        first = pool.submit(lambda: client.post("/v1/search", json={"query": "first"}))
        assert _wait(lambda: len(engine.calls) == 1, time.monotonic() + 5)
        response = client.post("/v1/search", json={"query": "second", "timeout_ms": 50})
        assert_error(response, 504, "out_of_time")
        release.set()
        assert first.result().status_code == 200
        assert client.post("/v1/search", json={"query": "third"}).status_code == 200
        assert [call[0] for call in engine.calls] == [["first"], ["third"]]


def test_a_surprise_is_500_without_internals(client: TestClient, engine: DummyEngine, caplog: Any) -> None:
    def fail(deadline: Deadline) -> None:
        raise InputError("/home/secret/path is broken")

    engine.work = fail
    response = client.post("/v1/search", json={"query": "a"})
    assert_error(response, 500, "internal_error")
    assert "secret" not in response.text
    mark = response.json()["error"]["message"].rsplit(" ", 1)[1]
    assert mark in caplog.text
    assert "secret" in caplog.text


def test_not_ready_is_503_everywhere_but_healthz(client: TestClient, engine: DummyEngine) -> None:
    engine.index_version = None
    assert client.get("/healthz").status_code == 200
    assert_error(client.get("/readyz"), 503, "not_ready")
    assert_error(client.post("/v1/search", json={"query": "a"}), 503, "not_ready")
    assert_error(client.post("/v1/search", json={"query": ""}), 422, "invalid_value")
    engine.index_version = "v8"
    assert client.get("/readyz").json() == {"status": "ready", "index_version": "v8"}


def test_unknown_paths_and_methods_have_the_error_shape(client: TestClient) -> None:
    assert_error(client.get("/v1/nothing"), 404, "not_found", "/v1/nothing")
    response = client.get("/v1/search")
    assert_error(response, 405, "method_not_allowed", "GET", "POST")
    assert response.headers["allow"] == "POST"


# --- key ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [{}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}, {"Authorization": f"Basic {KEY}"}],
)
def test_no_or_wrong_key_is_401(engine: DummyEngine, headers: dict[str, str]) -> None:
    with make_client(engine, key=KEY) as client:
        for path in ("/v1/search", "/v1/embeddings", "/v1/rerank", "/nothing"):
            response = client.post(path, json={"query": "a"}, headers=headers)
            assert_error(response, 401, "invalid_api_key", "Bearer")
            assert response.headers["www-authenticate"] == "Bearer"
            assert KEY not in response.text
        assert_error(client.get("/openapi.json", headers=headers), 401, "invalid_api_key")
        assert engine.calls == []


def test_the_key_opens_and_health_and_page_need_none(engine: DummyEngine) -> None:
    with make_client(engine, key=KEY) as client:
        headers = {"Authorization": f"Bearer {KEY}"}
        assert client.post("/v1/search", json={"query": "a"}, headers=headers).status_code == 200
        for path in ("/", "/healthz", "/readyz"):
            assert client.get(path).status_code == 200


def test_the_key_comes_from_the_named_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ServeConfig(index="x", api_key_env="SEARCH_KEY_FOR_TEST")
    monkeypatch.delenv("SEARCH_KEY_FOR_TEST", raising=False)
    with pytest.raises(InputError, match="SEARCH_KEY_FOR_TEST"):
        config.api_key_sha256()
    monkeypatch.setenv("SEARCH_KEY_FOR_TEST", KEY)
    assert config.api_key_sha256() == hashlib.sha256(KEY.encode()).digest()
    assert ServeConfig(index="x").api_key_sha256() is None


# --- page and description -------------------------------------------------------------------------------------


class PageParts(HTMLParser):
    """Bodies of style and script, the title, and every address that the page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.bodies: dict[str, str] = {}
        self.addresses: list[str] = []
        self.handlers: list[str] = []
        self._inside = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside = tag
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "action")]
        self.handlers += [name for name, _ in attrs if name.startswith("on") or name == "style"]

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.bodies[self._inside] = data


def test_the_page_is_self_contained_and_its_policy_fits(engine: DummyEngine) -> None:
    with make_client(engine, page_title="<b>法律 & search</b>") as client:
        response = client.get("/")
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    parts = PageParts()
    parts.feed(response.text)
    assert parts.bodies["title"] == "<b>法律 & search</b>", "the title must arrive as text"
    assert parts.addresses == ["data:,"]
    assert parts.handlers == []
    policy = dict(rule.split(" ", 1) for rule in response.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == "'none'"
    for tag, rule in (("script", "script-src"), ("style", "style-src")):
        digest = base64.b64encode(hashlib.sha256(parts.bodies[tag].encode()).digest()).decode()
        assert policy[rule] == f"'sha256-{digest}'"
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", response.text)
    assert "https://" not in response.text
    assert "http://" not in response.text


def test_openapi_describes_every_route(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    paths = {"/v1/search", "/v1/embeddings", "/v1/rerank", "/healthz", "/readyz"}
    assert set(document["paths"]) == paths
    for path in ("/v1/search", "/v1/embeddings", "/v1/rerank"):
        answers = document["paths"][path]["post"]["responses"]
        assert {"200", "400", "401", "413", "422", "429", "503", "504"} <= set(answers)
        assert answers["422"]["content"]["application/json"]["schema"]["$ref"].endswith("/ErrorResponse")


def _wait(condition: Callable[[], bool], deadline: float) -> bool:
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.01)
    return False
