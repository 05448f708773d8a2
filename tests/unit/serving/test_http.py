"""The HTTP interface over a dummy engine: no weights, no Ray. Every status code, and what the bodies hold."""

from __future__ import annotations

import ast
import asyncio
import base64
import gzip
import hashlib
import json
import math
import re
import struct
import time
import zlib
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from starlette.testclient import TestClient

from raytower.errors import InputError
from raytower.retrieval.retriever import Hit
from raytower.serving.access_log import UNMATCHED, RequestFacts
from raytower.serving.calls import EmbedCall, RerankCall, SearchAnswer, SearchCall
from raytower.serving.errors import NotFiniteError, OverloadedError
from raytower.serving.http import catalogue
from raytower.serving.http.answers import json_value
from raytower.serving.http.application import create_app
from raytower.serving.http.exchange import Parts
from raytower.serving.http.search import render
from raytower.serving.http_config import HttpConfig
from tests.support.dummy_engine import DummyEngine

KEY = "s3cret-key"


@pytest.fixture
def engine() -> DummyEngine:
    return DummyEngine()


def make_client(engine: DummyEngine, **values: Any) -> TestClient:
    app = create_app(engine, HttpConfig(**values))
    return TestClient(app, base_url="http://localhost", raise_server_exceptions=False)


@pytest.fixture
def client(engine: DummyEngine) -> Iterator[TestClient]:
    with make_client(engine, token_ids="model") as made:
        yield made


def post(client: TestClient, content: bytes, path: str = "/v1/search", **headers: str) -> Any:
    """Bytes as they are, as JSON unless `headers` say otherwise; _ in a header's name is -."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return client.post(path, content=content, headers={"content-type": "application/json", **named})


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
    total = body["timings_ms"].pop("total")
    assert total >= 0
    hits = body.pop("results")
    assert body == {
        "collection": "default",
        "index_version": "v7",
        "generation": "0123456789ab",
        "partial": False,
        "missing_shards": [],
        "mode": "dense",
        "reranked": True,
        "reranked_k": 100,
        "queries_without_words": 0,
        "usage": {"prompt_tokens": 1, "total_tokens": 1, "truncated": 0},
        "timings_ms": {"encode": 1.0, "recall": 2.0, "fetch": 0.5, "rerank": 3.0},
    }
    assert hits[0][0] == {
        "id": "d:0",
        "text": "月亮 moon",
        "metadata": {"lang": "zh", "year": 2020},
        "recall_score": 1.0,
        "rerank_score": 0.5,
        "score": 2.0,
        "rank": 1,
    }
    assert [hit["rank"] for hit in hits[0]] == [1, 2]
    assert engine.calls == [SearchCall(queries=["月"], k=2, recall_k=100, rerank=True)]
    assert engine.deadlines[0].timeout_ms == 2000
    assert response.headers["x-raytower-generation"] == "0123456789ab"


def test_search_passes_what_was_asked_for(client: TestClient, engine: DummyEngine) -> None:
    body = {
        "queries": ["a", "b"],
        "k": 5,
        "recall_k": 7,
        "rerank": False,
        "timeout_ms": 900,
        "filter": {"year": 2024},
        "mode": "hybrid",
    }
    response = client.post("/v1/search", json=body)
    assert response.status_code == 200
    assert len(response.json()["results"]) == 2
    assert response.json()["reranked"] is False
    assert response.json()["mode"] == "hybrid"
    assert response.json()["results"][0][0]["rerank_score"] is None
    wanted = SearchCall(
        queries=["a", "b"], k=5, recall_k=5, rerank=False, filter={"year": 2024}, mode="hybrid"
    )
    assert engine.calls == [wanted]
    assert engine.deadlines[0].timeout_ms == 900


def test_others_are_answered_while_a_large_body_is_read(client: TestClient, engine: DummyEngine) -> None:
    """A million numbers took the event loop a second."""
    body = b'{"query": "a", "numbers": [' + b"1.5," * 400_000 + b"1]}"
    app = client.app
    gaps: list[float] = []
    took: list[float] = []

    async def watch() -> None:
        last = time.perf_counter()
        while True:
            await asyncio.sleep(0.001)
            gaps.append(time.perf_counter() - last)
            last = time.perf_counter()

    async def ask() -> None:
        watching = asyncio.create_task(watch())
        await asyncio.sleep(0.01)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as http:  # type: ignore[arg-type]
            headers = {"content-type": "application/json"}
            started = time.perf_counter()
            assert (await http.post("/v1/search", content=body, headers=headers)).status_code == 422
            took.append(time.perf_counter() - started)
        await asyncio.sleep(0.01)
        watching.cancel()

    asyncio.run(ask())
    assert max(gaps) < took[0] / 2


def test_recall_depth_is_at_least_k(client: TestClient, engine: DummyEngine) -> None:
    client.post("/v1/search", json={"query": "a", "k": 300})
    client.post("/v1/search", json={"query": "a", "k": 10, "recall_k": 9})
    assert [(call.k, call.recall_k) for call in engine.calls] == [(300, 300), (10, 10)]


def test_k_beyond_the_index_returns_every_row(client: TestClient) -> None:
    response = client.post("/v1/search", json={"query": "a", "k": 1000})
    assert len(response.json()["results"][0]) == 3


def test_without_a_reranker_nothing_is_reranked_and_k_has_its_own_limit(engine: DummyEngine) -> None:
    engine.has_reranker = False
    with make_client(engine, limits={"max_recall_k": 50}) as client:
        answer = client.post("/v1/search", json={"query": "a", "k": 1000, "rerank": True}).json()
    assert answer["reranked"] is False
    assert engine.calls == [SearchCall(queries=["a"], k=1000, recall_k=1000, rerank=False)]


@pytest.mark.parametrize(
    ("limits", "queries", "wanted"),
    [
        ({"max_k": 4}, 1, (4, 100)),
        ({"max_recall_k": 20}, 1, (10, 20)),
        ({"max_recall_k": 5}, 1, (5, 5)),
        ({"max_pairs": 60}, 4, (10, 15)),
    ],
)
def test_defaults_keep_to_lowered_limits(
    engine: DummyEngine, limits: dict[str, int], queries: int, wanted: tuple[int, int]
) -> None:
    with make_client(engine, limits=limits) as client:
        assert client.post("/v1/search", json={"queries": ["a"] * queries}).status_code == 200
    assert [(call.k, call.recall_k) for call in engine.calls] == [wanted]


def test_reranking_is_bounded_in_depth_and_in_pairs(engine: DummyEngine) -> None:
    with make_client(engine, limits={"max_recall_k": 50, "max_pairs": 100}) as client:
        deep = client.post("/v1/search", json={"query": "a", "k": 1000})
        assert_error(deep, 422, "invalid_value", "k: is 1000", "50", "rerank: false")
        wide = client.post("/v1/search", json={"queries": ["a"] * 5, "recall_k": 30})
        assert_error(wide, 422, "invalid_value", "recall_k:", "150 pairs", "100")
        plain = client.post("/v1/search", json={"query": "a", "k": 1000, "rerank": False})
        assert plain.status_code == 200
    assert len(engine.calls) == 1


def test_fields_choose_what_hits_bring(client: TestClient, engine: DummyEngine) -> None:
    body = client.post("/v1/search", json={"query": "a", "k": 1, "fields": ["year", "year"]}).json()
    (hit,) = body["results"][0]
    assert set(hit) == {"id", "metadata", "recall_score", "rerank_score", "score", "rank"}
    assert hit["metadata"] == {"year": 2020}
    assert engine.calls[0].fields == ("year",)
    body = client.post("/v1/search", json={"query": "a", "k": 1, "fields": ["text"]}).json()
    assert body["results"][0][0]["text"] == "月亮 moon"
    assert body["results"][0][0]["metadata"] == {}
    response = client.post("/v1/search", json={"query": "a", "fields": ["yeer"]})
    assert_error(response, 422, "invalid_value", "fields:", "'yeer'", "id, lang, text, year")


def test_explain_says_what_the_reranker_moved(client: TestClient) -> None:
    hits = client.post("/v1/search", json={"query": "a", "explain": True}).json()["results"][0]
    told = [hit["explain"] for hit in hits]
    assert told == [
        {"recall_rank": 3, "moved": 2},
        {"recall_rank": 1, "moved": -1},
        {"recall_rank": 2, "moved": -1},
    ]


def test_metadata_of_every_type_is_json(client: TestClient) -> None:
    hits = client.post("/v1/search", json={"query": "a"}).json()["results"][0]
    assert hits[1]["metadata"]["year"] == 2**62 + 1
    assert hits[2]["metadata"] == {
        "raw": "/wA=",
        "price": "32.90",
        "day": "2024-01-31",
        "parts": ["YQ==", None],
    }


def test_values_become_json() -> None:
    assert json_value({1: (np.float32(0.5), np.array([1, 2]), None, True)}) == {
        "1": [0.5, [1, 2], None, True]
    }
    assert json_value(math.inf) is None


def test_what_is_partial_or_less_reranked_is_said(client: TestClient, engine: DummyEngine) -> None:
    engine.changes = {"missing_shards": (1, 4), "reranked_k": 7}
    body = client.post("/v1/search", json={"query": "a"}).json()
    assert (body["partial"], body["missing_shards"]) == (True, [1, 4])
    assert (body["reranked"], body["reranked_k"]) == (True, 7)


def test_an_answer_can_be_rendered_without_a_request() -> None:
    """As an engine does before a generation is served."""
    answer = SearchAnswer(
        generation="g",
        index_version="v1",
        hits=[[Hit("d", "a", {"raw": b"a"}, 1.0, None, 1.0, 1)]],
        timings_ms={},
        recall_ranks=[[1]],
    )
    call = SearchCall(queries=["a"], k=1, recall_k=1, rerank=False)
    body = json.loads(render("laws", call, answer))
    assert (body["collection"], body["results"][0][0]["metadata"]) == ("laws", {"raw": "YQ=="})
    with pytest.raises(NotFiniteError):
        render("laws", call, replace(answer, hits=[[Hit("d", "a", {}, math.nan, None, 1.0, 1)]]))


def test_a_mode_that_the_collection_lacks_is_422_naming_its_modes(client: TestClient) -> None:
    response = client.post("/v1/search", json={"query": "a", "mode": "lexical"})
    assert_error(response, 422, "invalid_value", "mode:", "lexical", "dense, hybrid")


@pytest.mark.parametrize(
    ("body", "code", "words"),
    [
        ({"query": ""}, "invalid_value", ("query:", "empty")),
        ({"query": " \t\n\u3000"}, "invalid_value", ("query:", "whitespace")),
        ({"queries": ["fine", "  "]}, "invalid_value", ("queries.1:", "whitespace")),
        ({"queries": []}, "invalid_value", ("queries:", "at least 1")),
        ({"queries": ["x"] * 65}, "invalid_value", ("queries:", "65", "1 to 64")),
        ({}, "invalid_value", ("query, queries", "neither")),
        ({"query": "a", "queries": ["b"]}, "invalid_value", ("query, queries", "both")),
        ({"query": "a", "k": 0}, "invalid_value", ("k: is 0", "greater than or equal to 1")),
        ({"query": "a", "k": -3}, "invalid_value", ("k:",)),
        ({"query": "a", "k": 1001}, "invalid_value", ("k:", "1001", "1000")),
        ({"query": "a", "k": 10**400}, "invalid_value", ("k:", "1000000000… (401 digits)")),
        ({"query": "a", "k": "10"}, "invalid_value", ("k:", "integer")),
        ({"query": "a", "k": 2.5}, "invalid_value", ("k: is 2.5", "integer")),
        ({"query": "a", "k": True}, "invalid_value", ("k:", "integer")),
        ({"query": "a", "recall_k": 5000}, "invalid_value", ("recall_k:", "1000")),
        ({"query": "a", "rerank": "yes"}, "invalid_value", ("rerank:", "boolean")),
        ({"query": "a", "timeout_ms": 0}, "invalid_value", ("timeout_ms:",)),
        ({"query": "a", "timeout_ms": 10**9}, "invalid_value", ("timeout_ms:", "60000")),
        ({"query": 5}, "invalid_value", ("query:", "string")),
        ({"query": "a", "filter": "zh"}, "invalid_value", ("filter:",)),
        ({"query": "a", "mode": "sparse"}, "invalid_value", ("mode:", "'dense'")),
        ({"query": "a", "top_k": 3}, "unknown_field", ("top_k", "unknown field", "recall_k")),
        ({"query": "a", "filtre": {}}, "unknown_field", ("filtre", "did you mean filter?")),
    ],
)
def test_bad_search_values_are_422_naming_field_and_rule(
    client: TestClient, engine: DummyEngine, body: dict[str, Any], code: str, words: tuple[str, ...]
) -> None:
    assert_error(client.post("/v1/search", json=body), 422, code, *words)
    assert engine.calls == []


@pytest.mark.parametrize("text", ["\u200b\u200b", "\ufeff", "\u00ad", "\u2060", "\x00", "\x01\x02"])
def test_text_of_which_nothing_shows_is_as_empty_as_blanks(
    client: TestClient, engine: DummyEngine, text: str
) -> None:
    for path, body in (
        ("/v1/search", {"query": text}),
        ("/v1/embeddings", {"input": text}),
        ("/v1/rerank", {"query": "q", "documents": [text]}),
        ("/v1/classify", {"texts": [text]}),
    ):
        assert_error(client.post(path, json=body), 422, "invalid_value", "invisible")
    assert engine.calls == []
    assert client.post("/v1/search", json={"query": f"a{text}"}).status_code == 200


def test_a_number_of_5000_digits_is_valid_json_and_named(client: TestClient) -> None:
    response = post(client, b'{"query": "a", "k": ' + b"9" * 5000 + b"}")
    assert_error(response, 422, "invalid_value", "k: is 9999999999… (5000 digits)", "integer")
    assert_error(post(client, b'{"query": "a", "k": 1e999999999}'), 422, "invalid_value", "k:", "integer")


def test_a_whole_number_may_have_a_point(client: TestClient, engine: DummyEngine) -> None:
    assert post(client, b'{"query": "a", "k": 3.0, "recall_k": 2e1}').status_code == 200
    assert (engine.calls[0].k, engine.calls[0].recall_k) == (3, 20)


def test_the_filter_s_numbers_keep_their_digits(client: TestClient, engine: DummyEngine) -> None:
    exact = b'{"query": "a", "filter": {"a": 0.1, "b": [12345678901234567890.1234567891, 9007199254740993]}}'
    assert post(client, exact).status_code == 200
    found = engine.calls[0].filter
    assert found["a"] == 0.1
    assert isinstance(found["a"], float)
    assert [str(value) for value in found["b"]] == ["12345678901234567890.1234567891", "9007199254740993"]
    assert_error(post(client, b'{"query": "a", "filter": {"a": 1e99999}}'), 422, "invalid_value", "filter:")


def test_filters_are_measured_before_anything_else(client: TestClient, engine: DummyEngine) -> None:
    wide = {"query": "a", "filter": {"$or": [{"row": 1}] * 2000}}
    assert_error(client.post("/v1/search", json=wide), 422, "invalid_value", "2001 conditions", "256")
    long = {"query": "a", "filter": {"row": {"$in": list(range(10_001))}}}
    assert_error(client.post("/v1/search", json=long), 422, "invalid_value", "10001 members", "10000")
    deep = b'{"query": "a", "filter": ' + b'{"$not":' * 100 + b"{}" + b"}" * 101
    assert_error(post(client, deep), 422, "invalid_value", "levels", "64")
    assert engine.calls == []
    assert client.post("/v1/search", json={"query": "a", "filter": {}}).status_code == 200
    assert engine.calls[0].filter is None


@pytest.mark.parametrize("half", ["\\ud800", "fine\\udfff"])
def test_lone_surrogates_in_names_and_values_are_no_500(
    client: TestClient, engine: DummyEngine, half: str
) -> None:
    as_name = post(client, f'{{"query": "a", "{half}": 1}}'.encode())
    assert_error(as_name, 422, "invalid_value", "name is not valid Unicode")
    as_value = post(client, f'{{"query": "{half}"}}'.encode())
    assert_error(as_value, 422, "invalid_value", "query:", "lone surrogate")
    inside = post(client, f'{{"query": "a", "filter": {{"x": ["b", "{half}"]}}}}'.encode())
    assert_error(inside, 422, "invalid_value", "filter.x.1:", "lone surrogate")
    assert engine.calls == []
    whole = post(client, rb'{"query": "\ud83d\ude97"}')
    assert whole.status_code == 200
    assert engine.calls[0].queries == ["🚗"]


def test_messages_name_fields_and_not_the_branches_of_unions(client: TestClient) -> None:
    response = client.post("/v1/embeddings", json={"input": 3})
    assert_error(response, 422, "invalid_value", "input: must be a string")
    response = client.post("/v1/rerank", json={"query": "q", "documents": [{"txt": "a"}]})
    assert_error(response, 422, "invalid_value", "documents.0.text: is required")
    assert "RerankText" not in response.text


# --- nulls and the fields of other services -------------------------------------------------------------------

OPTIONAL = [
    (
        "/v1/search",
        {"query": "flood"},
        [
            "queries",
            "k",
            "recall_k",
            "rerank",
            "filter",
            "mode",
            "fields",
            "explain",
            "timeout_ms",
        ],
    ),
    (
        "/v1/embeddings",
        {"input": "a will"},
        ["model", "encoding_format", "dimensions", "user", "input_type", "timeout_ms"],
    ),
    (
        "/v1/rerank",
        {"query": "flood", "documents": ["a will"]},
        [
            "texts",
            "model",
            "top_n",
            "return_documents",
            "return_text",
            "raw_scores",
            "truncate",
            "timeout_ms",
        ],
    ),
    ("/v1/classify", {"texts": ["a will"]}, ["top_k", "mode", "timeout_ms"]),
    ("/v1/similarity", {"pairs": [["a", "b"]]}, ["timeout_ms"]),
    (
        "/v2/embed",
        {"texts": ["a will"]},
        ["model", "input_type", "embedding_types", "output_dimension", "truncate", "timeout_ms"],
    ),
    ("/embed", {"inputs": "a will"}, ["truncate", "prompt_name", "dimensions", "timeout_ms"]),
]


@pytest.mark.parametrize(("path", "body", "fields"), OPTIONAL)
def test_null_means_absent_for_every_optional_field(
    client: TestClient, engine: DummyEngine, path: str, body: dict[str, Any], fields: list[str]
) -> None:
    plain = client.post(path, json=body)
    assert plain.status_code == 200
    (request,) = {route.request for route in create_app(engine, HttpConfig()).routes if route.path == path}
    assert request is not None
    assert set(fields) == request.model_fields.keys() - body.keys(), "every optional field stands here"
    for name in fields:
        assert client.post(path, json={**body, name: None}).status_code == 200, name
        assert engine.calls[-1] == engine.calls[0]
    assert client.post(path, json=dict.fromkeys(body)).status_code == 422


def test_fields_of_other_services_are_ignored_where_their_clients_send_them(client: TestClient) -> None:
    more = {"priority": 1, "extra_body": {"a": []}, "max_chunks_per_doc": 10, "return_embeddings": True}
    for path, body, _ in OPTIONAL:
        response = client.post(path, json={**body, **more})
        if path in ("/v1/search", "/v1/classify", "/v1/similarity"):
            assert_error(response, 422, "unknown_field", "priority: unknown field")
        else:
            assert response.status_code == 200


# --- bodies ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "code", "words"),
    [
        (b"{", "invalid_json", "line 1, column 2"),
        (b"", "invalid_json", "Expecting value"),
        (b"nonsense", "invalid_json", "JSON"),
        (b'{"query": "a",}', "invalid_json", "JSON"),
        (b'{"query": "a", "k": NaN}', "invalid_json", "NaN"),
        (b'{"query": "a", "k": -Infinity}', "invalid_json", "-Infinity"),
        (b'{"query": "\xff\xfe"}', "invalid_encoding", "not UTF-8 (byte 11)"),
        (b'{"query": "caf\xe9"}', "invalid_encoding", "not UTF-8"),
        ('{"query": "a"}'.encode("utf-16"), "invalid_encoding", "UTF-16"),
        ('{"query": "a"}'.encode("utf-16-be"), "invalid_encoding", "UTF-16"),
        ('{"query": "a"}'.encode("utf-32"), "invalid_encoding", "UTF-32"),
        ('{"query": "a"}'.encode("utf-32-be"), "invalid_encoding", "UTF-32"),
        (b"[" * 100_000, "invalid_json", "nested too deeply"),
        (b'{"filter":' * 100_000, "invalid_json", "nested too deeply"),
        (b'{"k": 1e99999999999999999999}', "invalid_json", "exponent"),
    ],
)
def test_malformed_json_is_400(client: TestClient, content: bytes, code: str, words: str) -> None:
    assert_error(post(client, content), 400, code, words)


@pytest.mark.parametrize("content", [b"[]", b'"text"', b"3", b"null"])
def test_json_that_is_no_object_is_422(client: TestClient, content: bytes) -> None:
    assert_error(post(client, content), 422, "invalid_value", "JSON object")


@pytest.mark.parametrize("pair", [(b"[", b"]"), (b'{"a":', b"}")])
def test_deep_values_in_any_field_are_no_500(client: TestClient, pair: tuple[bytes, bytes]) -> None:
    deep = pair[0] * 900 + b"1" + pair[1] * 900
    for path, body, fields in OPTIONAL:
        for name in (*body, *fields, "unknown"):
            others = b"".join(
                b"%s:%s," % (json.dumps(key).encode(), json.dumps(value).encode())
                for key, value in body.items()
                if key != name
            )
            response = post(client, b'{%s"%s": %s}' % (others, name.encode(), deep), path)
            assert response.status_code in (200, 422), (path, name, response.text)
    for field in (b"method", b"params", b"id", b"jsonrpc"):
        others = b'"jsonrpc":"2.0","id":1,"method":"tools/call",'
        response = post(client, b'{%s"%s": %s}' % (others, field, deep), "/mcp")
        assert response.status_code in (400, 404), field
    call = b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"search","arguments":%s}}'
    assert post(client, call % deep, "/mcp").json()["result"]["isError"] is True
    assert post(client, call.replace(b'"search"', deep) % b"{}", "/mcp").status_code == 400


def test_token_ids_may_have_a_point(client: TestClient, engine: DummyEngine) -> None:
    assert post(client, b'{"input": [[5.0, 6], [7]]}', "/v1/embeddings").status_code == 200
    assert post(client, b'{"input": [5.0, 6e0]}', "/v1/embeddings").status_code == 200
    assert [call.token_ids for call in engine.calls] == [[[5, 6], [7]], [[5, 6]]]
    assert post(client, b'{"input": [5.5]}', "/v1/embeddings").status_code == 422


def test_a_mark_of_utf_8_is_dropped(client: TestClient, engine: DummyEngine) -> None:
    assert post(client, '\ufeff{"query": "é"}'.encode()).status_code == 200
    assert engine.calls[0].queries == ["é"]


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "", "multipart/form-data"]
)
def test_a_form_body_is_told_what_content_type_to_send(client: TestClient, kind: str) -> None:
    response = client.post("/v1/search", content=b'{"query": "a"}', headers={"content-type": kind})
    assert_error(response, 415, "unsupported_media_type", "Content-Type: application/json")


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("application/json; charset=utf-8", 200),
        ('Application/JSON;Charset="UTF-8"', 200),
        ("application/vnd.search+json", 200),
        ("application/json; charset=latin-1", 415),
    ],
)
def test_json_is_utf_8(client: TestClient, kind: str, status: int) -> None:
    assert post(client, b'{"query": "a"}', content_type=kind).status_code == status


def test_compressed_bodies_are_decoded(client: TestClient, engine: DummyEngine) -> None:
    body = json.dumps({"query": "who pays for a flood", "k": 1}).encode()
    raw = zlib.compressobj(wbits=-15)
    for name, data in (
        ("gzip", gzip.compress(body, mtime=0)),
        ("x-gzip", gzip.compress(body, mtime=0)),
        ("deflate", zlib.compress(body)),
        ("deflate", raw.compress(body) + raw.flush()),
        ("identity", body),
        ("deflate, gzip", gzip.compress(zlib.compress(body), mtime=0)),
    ):
        assert post(client, data, content_encoding=name).status_code == 200, name
    assert len(engine.calls) == 6
    assert {call.queries[0] for call in engine.calls} == {"who pays for a flood"}


@pytest.mark.parametrize(
    ("name", "data", "status", "code", "words"),
    [
        ("br", b"abc", 415, "unsupported_media_type", "Content-Encoding 'br'"),
        ("gzip", b'{"query": "a"}', 400, "invalid_encoding", "gzip"),
        (
            "gzip",
            gzip.compress(b'{"query": "a"}', mtime=0) + b"more",
            400,
            "invalid_encoding",
            "behind the end",
        ),
        ("gzip", gzip.compress(b'{"query": "a"}', mtime=0)[:-9], 400, "invalid_encoding", "too early"),
        (
            "gzip",
            gzip.compress(b"x" * 5_000_000, mtime=0),
            413,
            "too_large",
            "4194304 bytes once it is decompressed",
        ),
    ],
)
def test_bad_compressed_bodies_are_named(
    client: TestClient, name: str, data: bytes, status: int, code: str, words: str
) -> None:
    assert_error(post(client, data, content_encoding=name), status, code, words)


def test_a_query_of_1_mb_is_413(client: TestClient, engine: DummyEngine) -> None:
    assert_error(
        client.post("/v1/search", json={"query": "x" * 1_000_000}), 413, "too_large", "query:", "8192"
    )
    assert_error(
        client.post("/v1/search", json={"queries": ["x" * 8193]}), 413, "too_large", "queries.0:", "8193"
    )
    assert client.post("/v1/search", json={"query": "x" * 8192}).status_code == 200
    assert len(engine.calls) == 1


def test_all_texts_together_are_bounded(engine: DummyEngine) -> None:
    with make_client(engine, limits={"max_characters": 100}) as client:
        for path, body in (
            ("/v1/embeddings", {"input": ["x" * 51, "x" * 50]}),
            ("/v1/embeddings", {"input": [1] * 26}),
            ("/v1/rerank", {"query": "x" * 30, "documents": ["x" * 20, "x" * 21]}),
            ("/v1/similarity", {"pairs": [["x" * 51, "x" * 50]]}),
            ("/v1/classify", {"texts": ["x" * 101]}),
            ("/v1/search", {"queries": ["x" * 51, "x" * 50]}),
        ):
            assert_error(client.post(path, json=body), 413, "too_large", "in all", "100")
        assert client.post("/v1/embeddings", json={"input": ["x" * 50, "x" * 50]}).status_code == 200
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


def test_an_answer_over_its_limit_is_refused(engine: DummyEngine) -> None:
    with make_client(engine, limits={"max_answer_bytes": 4096}) as client:
        assert_error(
            client.post("/v1/search", json={"queries": ["a"] * 20}), 422, "answer_too_large", "4096 bytes"
        )
        assert_error(
            client.post("/v1/embeddings", json={"input": ["a"] * 100}), 422, "answer_too_large", "4096"
        )
        # Under what was foreseen, over the limit once it is written.
        engine.changes = {
            "hits": [[Hit("d", "a", {"long": "x" * 5000}, 1.0, None, 1.0, 1)]],
        }
        assert_error(client.post("/v1/search", json={"query": "a"}), 422, "answer_too_large", "4096")


def test_large_answers_are_written_beside_other_requests(client: TestClient, engine: DummyEngine) -> None:
    many = client.post("/v1/embeddings", json={"input": ["a"] * 2048}).json()
    assert [item["index"] for item in many["data"]] == list(range(2048))
    engine.changes = {"hits": [[Hit("d", "x" * 1_000_000, {}, 1.0, None, 1.0, 1)]] * 3}
    hits = client.post("/v1/search", json={"queries": ["a", "b", "c"]}).json()["results"]
    assert [len(found[0]["text"]) for found in hits] == [1_000_000] * 3


# --- embeddings -----------------------------------------------------------------------------------------------


def test_embeddings_have_openai_s_shape(client: TestClient, engine: DummyEngine) -> None:
    response = client.post("/v1/embeddings", json={"input": ["ab", "cde"], "model": "any", "user": "me"})
    assert response.status_code == 200
    body = response.json()
    assert body["object"] == "list"
    assert body["model"] == "org/dummy"
    assert body["usage"] == {"prompt_tokens": 5, "total_tokens": 5, "truncated": 0}
    assert (body["index_version"], body["generation"]) == ("v7", "0123456789ab")
    assert [item["index"] for item in body["data"]] == [0, 1]
    assert body["data"][0]["object"] == "embedding"
    assert body["data"][0]["embedding"] == pytest.approx([3 / 13, 4 / 13, 12 / 13])
    assert engine.calls == [EmbedCall(texts=["ab", "cde"])]


@pytest.mark.parametrize(
    ("given", "lists"), [([5, 6, 7], [[5, 6, 7]]), ([[5], [6, 7]], [[5], [6, 7]]), ([[0]], [[0]])]
)
def test_embeddings_of_token_ids(client: TestClient, engine: DummyEngine, given: Any, lists: Any) -> None:
    body = client.post("/v1/embeddings", json={"input": given, "input_type": "document"}).json()
    assert len(body["data"]) == len(lists)
    assert engine.calls == [EmbedCall(token_ids=lists, role="document")]


def test_embeddings_of_one_string_in_base64_are_little_endian_float32(client: TestClient) -> None:
    asked = {"input": "text", "encoding_format": "base64", "input_type": "query"}
    body = client.post("/v1/embeddings", json=asked).json()
    values = struct.unpack("<3f", base64.b64decode(body["data"][0]["embedding"]))
    assert values == pytest.approx([3 / 13, 4 / 13, 12 / 13])


def test_dimensions_are_those_that_the_model_was_trained_for(client: TestClient) -> None:
    body = client.post("/v1/embeddings", json={"input": "text", "dimensions": 2}).json()
    assert body["data"][0]["embedding"] == pytest.approx([0.6, 0.8])
    body = client.post("/v1/embeddings", json={"input": "text", "dimensions": 3}).json()
    assert body["data"][0]["embedding"] == pytest.approx([3 / 13, 4 / 13, 12 / 13])
    for dimensions in (1, 4):
        response = client.post("/v1/embeddings", json={"input": "text", "dimensions": dimensions})
        assert_error(response, 422, "invalid_value", f"dimensions: is {dimensions}", "2, 3")


@pytest.mark.parametrize(
    ("body", "status", "code", "words"),
    [
        ({}, 422, "invalid_value", ("input", "required")),
        ({"input": []}, 422, "invalid_value", ("input:", "0 items")),
        ({"input": ["a"] * 2049}, 422, "invalid_value", ("input:", "2049")),
        ({"input": ["a", " "]}, 422, "invalid_value", ("input.1:",)),
        ({"input": ["a", 1]}, 422, "invalid_value", ("input.0",)),
        ({"input": [[1], []]}, 422, "invalid_value", ("input.1:", "empty")),
        ({"input": [[1], [True]]}, 422, "invalid_value", ("input.1:",)),
        ({"input": [[1, -1]]}, 422, "invalid_value", ("input.0:", "-1")),
        ({"input": [1, 2**31]}, 422, "invalid_value", ("input:", "2147483648")),
        ({"input": [[1] * 65_537]}, 413, "too_large", ("input.0:", "65537", "65536")),
        ({"input": "a", "dimensions": 0}, 422, "invalid_value", ("dimensions:",)),
        ({"input": "a", "encoding_format": "hex"}, 422, "invalid_value", ("encoding_format:",)),
        ({"input": "a" * 70_000}, 413, "too_large", ("input.0:", "65536")),
    ],
)
def test_bad_embeddings_requests(
    client: TestClient, body: dict[str, Any], status: int, code: str, words: tuple[str, ...]
) -> None:
    assert_error(client.post("/v1/embeddings", json=body), status, code, *words)


def test_cohere_s_embeddings_by_type(client: TestClient, engine: DummyEngine) -> None:
    asked = {
        "model": "m",
        "texts": ["ab", "c"],
        "input_type": "search_query",
        "embedding_types": ["float", "base64", "ubinary", "binary"],
    }
    body = client.post("/v2/embed", json=asked).json()
    assert engine.calls == [EmbedCall(texts=["ab", "c"], role="query")]
    assert body["response_type"] == "embeddings_by_type"
    assert body["embeddings"]["float"][1] == pytest.approx([3 / 13, 4 / 13, 12 / 13])
    assert struct.unpack("<3f", base64.b64decode(body["embeddings"]["base64"][0])) == pytest.approx(
        [3 / 13, 4 / 13, 12 / 13]
    )
    # Three positive components are the three highest bits: 128 + 64 + 32.
    assert body["embeddings"]["ubinary"] == [[224], [224]]
    assert body["embeddings"]["binary"] == [[96], [96]]
    assert body["texts"] == ["ab", "c"]
    assert body["meta"]["api_version"] == {"version": "2"}
    assert body["meta"]["billed_units"] == {"input_tokens": 3}
    bare = client.post("/v1/embed", json={"texts": ["ab"]}).json()
    assert bare["response_type"] == "embeddings_floats"
    assert bare["embeddings"] == [pytest.approx([3 / 13, 4 / 13, 12 / 13])]
    response = client.post("/v2/embed", json={"texts": ["a"], "embedding_types": ["int8"]})
    assert_error(response, 422, "invalid_value", "embedding_types.0:", "ubinary")


def test_tei_s_embeddings_are_a_bare_list(client: TestClient, engine: DummyEngine) -> None:
    assert client.post("/embed", json={"inputs": "a"}).json() == [pytest.approx([3 / 13, 4 / 13, 12 / 13])]
    client.post("/embed", json={"inputs": ["a", "b"], "prompt_name": "passage", "normalize": True})
    assert engine.calls[1] == EmbedCall(texts=["a", "b"], role="document")


# --- texts that were cut --------------------------------------------------------------------------------------


def test_an_answer_says_when_a_text_was_cut(client: TestClient) -> None:
    long = "x" * 101
    for path, body in (
        ("/v1/search", {"query": long}),
        ("/v1/embeddings", {"input": [long, "short"]}),
        ("/v1/rerank", {"query": "q", "documents": [long, "short"]}),
        ("/v1/similarity", {"pairs": [[long, "short"]]}),
        ("/v1/classify", {"texts": [long]}),
    ):
        response = client.post(path, json=body)
        assert response.json()["usage"]["truncated"] == 1
        assert response.headers["x-raytower-truncated"] == "1"
    assert client.post("/embed", json={"inputs": long}).headers["x-raytower-truncated"] == "1"
    cohere = client.post("/v2/embed", json={"texts": [long]}).json()
    assert cohere["meta"]["warnings"] == ["1 of the texts were cut to the model's length"]
    assert "x-raytower-truncated" not in client.post("/v1/search", json={"query": "x"}).headers


def test_callers_may_have_long_texts_refused(client: TestClient) -> None:
    long = "x" * 101
    for path, body in (
        ("/embed", {"inputs": [long], "truncate": False}),
        ("/v2/embed", {"texts": [long], "truncate": "NONE"}),
        ("/rerank", {"query": "q", "texts": [long], "truncate": False}),
    ):
        assert_error(client.post(path, json=body), 413, "too_large", "1 of the texts", "100 tokens")
    assert client.post("/embed", json={"inputs": ["x"], "truncate": False}).status_code == 200


# --- rerank ---------------------------------------------------------------------------------------------------


def test_rerank_sorts_and_squashes(client: TestClient, engine: DummyEngine) -> None:
    body = {"query": "q", "documents": ["ab", {"text": "abcd"}, "a"], "top_n": 2, "return_documents": True}
    answer = client.post("/v1/rerank", json=body).json()
    assert engine.calls == [RerankCall(query="q", documents=["ab", "abcd", "a"])]
    assert answer["model"] == "judge"
    assert (answer["index_version"], answer["generation"]) == ("v7", "0123456789ab")
    assert [item["index"] for item in answer["results"]] == [1, 0]
    assert answer["results"][0]["document"] == {"text": "abcd"}
    # logistic(4) and logistic(2), from a table
    assert [item["relevance_score"] for item in answer["results"]] == pytest.approx([0.98201379, 0.88079708])
    assert answer["usage"] == {"prompt_tokens": 7, "total_tokens": 7, "truncated": 0}
    assert answer["meta"]["billed_units"] == {"search_units": 1}
    assert answer["meta"]["api_version"] == {"version": "1"}
    assert answer["id"] != client.post("/v1/rerank", json=body).json()["id"]


@pytest.mark.parametrize("extra", [{}, {"return_documents": False}])
def test_rerank_leaves_the_key_document_out(client: TestClient, extra: dict[str, bool]) -> None:
    """Strict clients refuse `document: null`."""
    body = {"query": "q", "documents": ["ab", "b"], **extra}
    results = client.post("/v1/rerank", json=body).json()["results"]
    assert [set(item) for item in results] == [{"index", "relevance_score"}] * 2


def test_rerank_keeps_the_order_of_logits_that_squash_to_one(client: TestClient) -> None:
    answer = client.post("/v1/rerank", json={"query": "q", "documents": ["a" * 100, "a" * 200]}).json()
    assert [item["index"] for item in answer["results"]] == [1, 0]
    assert [item["relevance_score"] for item in answer["results"]] == [1.0, 1.0]


def test_infinity_s_documents_are_bare_texts(client: TestClient) -> None:
    body = {"query": "q", "documents": ["ab", "b"]}
    plain = client.post("/infinity/rerank", json=body).json()["results"]
    assert [set(row) for row in plain] == [{"index", "relevance_score"}] * 2
    told = client.post("/infinity/rerank", json={**body, "return_documents": True}).json()["results"]
    assert [row["document"] for row in told] == ["ab", "b"]


def test_rerank_in_tei_s_shape(client: TestClient) -> None:
    body = {"query": "q", "texts": ["ab", "abcd"]}
    assert client.post("/rerank", json=body).json() == [
        {"index": 1, "score": pytest.approx(0.98201379)},
        {"index": 0, "score": pytest.approx(0.88079708)},
    ]
    raw = client.post("/rerank", json={**body, "raw_scores": True, "return_text": True}).json()
    assert raw == [{"index": 1, "score": 4.0, "text": "abcd"}, {"index": 0, "score": 2.0, "text": "ab"}]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"query": "q", "documents": []}, ("documents:", "at least 1")),
        ({"query": "q", "documents": ["a"] * 1001}, ("documents:", "1001")),
        ({"query": "q", "documents": ["a", ""]}, ("documents.1:",)),
        ({"query": "q", "documents": [{"txt": "a"}]}, ("documents.0.text",)),
        ({"query": "", "documents": ["a"]}, ("query:",)),
        ({"query": "q", "documents": ["a"], "top_n": -1}, ("top_n: is -1",)),
        ({"query": "q"}, ("documents, texts: neither",)),
        ({"query": "q", "documents": ["a"], "texts": ["a"]}, ("documents, texts: both",)),
    ],
)
def test_bad_rerank_requests_are_422(
    client: TestClient, body: dict[str, Any], words: tuple[str, ...]
) -> None:
    assert_error(client.post("/v1/rerank", json=body), 422, "invalid_value", *words)


def test_top_n_0_is_all_as_elsewhere(client: TestClient) -> None:
    answer = client.post("/v1/rerank", json={"query": "q", "documents": ["ab", "b"], "top_n": 0}).json()
    assert len(answer["results"]) == 2


def test_rerank_without_a_reranker_is_404_that_says_so(client: TestClient, engine: DummyEngine) -> None:
    engine.has_reranker = False
    response = client.post("/v1/rerank", json={"query": "q", "documents": ["a"]})
    assert_error(response, 404, "not_configured", "no reranker")


# --- similarity and labels ------------------------------------------------------------------------------------


def test_similarity_compares_pairs(client: TestClient) -> None:
    body = client.post("/v1/similarity", json={"pairs": [["a", "a"], ["a", "b"]]}).json()
    assert body["scores"] == [1.0, 0.0]
    assert (body["model"], body["usage"]["prompt_tokens"]) == ("org/dummy", 4)
    response = client.post("/v1/similarity", json={"pairs": [["a", "a"], ["a"]]})
    assert_error(response, 422, "invalid_value", "pairs.1:", "at least 2")
    response = client.post("/v1/similarity", json={"pairs": [["a", " "]]})
    assert_error(response, 422, "invalid_value", "pairs.0.1:", "whitespace")


def test_classify_gives_labels(client: TestClient, engine: DummyEngine) -> None:
    body = client.post("/v1/classify", json={"texts": ["dark", "bright"], "top_k": 1, "mode": "votes"}).json()
    assert body["mode"] == "votes"
    assert body["results"] == [[{"label": "night", "score": 0.75}]] * 2
    assert client.post("/v1/classify", json={"texts": ["dark"]}).json()["mode"] == "labels"
    assert [call.top_k for call in engine.calls] == [1, 5]
    response = client.post("/v1/classify", json={"texts": ["a"], "mode": "classifier"})
    assert_error(response, 422, "invalid_value", "mode:", "labels, votes")
    response = client.post("/v1/laws/classify", json={"texts": ["a"]})
    assert_error(response, 404, "not_configured", "'laws'")


# --- collections, models, documents ---------------------------------------------------------------------------


def test_collections_have_routes_of_their_own(client: TestClient, engine: DummyEngine) -> None:
    assert client.post("/v1/laws/search", json={"query": "a"}).json()["collection"] == "laws"
    for path, body, _ in OPTIONAL[:2]:
        named = path.replace("/v1/", "/v1/laws/")
        assert client.post(named, json=body).status_code == 200
    response = client.post("/v1/rules/search", json={"query": "a"})
    assert_error(response, 404, "not_found", "'rules'", "default, laws")
    response = client.post("/v1/laws/search", json={"query": "a", "mode": "hybrid"})
    assert_error(response, 422, "invalid_value", "'laws'")


def test_collections_are_listed_with_what_they_serve(client: TestClient, engine: DummyEngine) -> None:
    first, second = client.get("/v1/collections").json()["data"]
    assert first == {
        "name": "default",
        "default": True,
        "generation": "0123456789ab",
        "index_version": "v7",
        "rows": 3,
        "kind": "flat",
        "metric": "cosine",
        "dim": 3,
        "recall": None,
        "encoder": {"name": "org/dummy", "max_length": 100, "dim": 3, "dimensions": [2], "labels": []},
        "reranker": {"name": "judge", "max_length": 100, "dim": None, "dimensions": [], "labels": []},
        "classifier": None,
        "columns": {"lang": "string", "year": "int64"},
        "modes": ["dense", "hybrid"],
        "classify_modes": ["labels", "votes"],
    }
    assert (second["name"], second["default"]) == ("laws", False)
    engine.ready = False
    assert_error(client.get("/v1/collections"), 503, "not_ready")


def test_models_are_listed_with_their_lengths(client: TestClient) -> None:
    encoder, reranker = client.get("/v1/models").json()["data"]
    assert encoder == {
        "id": "org/dummy",
        "object": "model",
        "created": 0,
        "owned_by": "raytower",
        "kind": "encoder",
        "max_length": 100,
        "dim": 3,
        "dimensions": [2],
        "collections": ["default", "laws"],
    }
    assert (reranker["id"], reranker["kind"]) == ("judge", "reranker")
    assert client.get("/v1/models/org/dummy").json() == encoder
    assert_error(client.get("/v1/models/other"), 404, "not_found", "'other'", "org/dummy, judge")


def test_documents_are_read_by_id(client: TestClient) -> None:
    body = client.get("/v1/documents", params={"id": "d:0"}).json()
    assert body == {
        "id": "d:0",
        "text": "月亮 moon",
        "metadata": {"lang": "zh", "year": 2020},
        "index_version": "v7",
        "generation": "0123456789ab",
    }
    assert client.get("/v1/laws/documents?id=d:2").json()["metadata"]["raw"] == "/wA="
    assert_error(client.get("/v1/documents?id=none"), 404, "not_found", "'none'")
    assert_error(client.get("/v1/documents"), 422, "invalid_value", "id: is required")
    assert_error(client.get("/v1/documents?id="), 422, "invalid_value", "id: is empty")


# --- paths ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/search/", "//v1/search", "/v1//search//"])
def test_slashes_too_many_change_nothing_and_redirect_nowhere(client: TestClient, path: str) -> None:
    response = client.post(f"http://localhost{path}", json={"query": "a"}, follow_redirects=False)
    assert response.status_code == 200


def test_a_prefix_may_be_stripped_or_left(engine: DummyEngine) -> None:
    app = create_app(engine, HttpConfig())
    with TestClient(app, base_url="http://localhost", root_path="/raytower") as client:
        for path in ("/raytower/v1/search", "/raytower/v1/search/", "/v1/search"):
            assert client.post(path, json={"query": "a"}).status_code == 200
        for path in ("/raytower", "/raytower/", "/raytower/healthz/"):
            assert client.get(path, follow_redirects=False).status_code == 200
        assert client.post("/raytowers/v1/search", json={"query": "a"}).status_code == 404


def test_head_is_get_without_its_body(client: TestClient) -> None:
    for path in ("/", "/healthz", "/readyz", "/v1/models", "/openapi.json"):
        head, get = client.head(path), client.get(path)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-length"] == get.headers["content-length"] == str(len(get.content))
    assert client.head("/v1/search").status_code == 405


def test_unknown_paths_and_methods_have_the_error_shape(client: TestClient) -> None:
    assert_error(client.get("/v1/nothing"), 404, "not_found", "/v1/nothing")
    response = client.get("/v1/search")
    assert_error(response, 405, "method_not_allowed", "GET", "POST")
    assert response.headers["allow"] == "POST"
    assert client.post("/healthz").headers["allow"] == "GET, HEAD"
    assert client.delete("/v1/laws/search").headers["allow"] == "POST"


# --- overload, time, failure ----------------------------------------------------------------------------------


def test_overload_is_429_with_retry_after(client: TestClient, engine: DummyEngine) -> None:
    async def refuse() -> None:
        raise OverloadedError("it would end too late", headers={"Retry-After": "7"})

    engine.work = refuse
    response = client.post("/v1/search", json={"query": "a"})
    assert_error(response, 429, "overloaded", "too late")
    assert response.headers["retry-after"] == "7"
    engine.work = None
    assert client.post("/v1/search", json={"query": "a"}).status_code == 200


def test_at_the_deadline_the_work_is_cancelled_and_504_is_said(
    client: TestClient, engine: DummyEngine
) -> None:
    ended: list[str] = []

    async def hang() -> None:
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise

    engine.work = hang
    begun = time.monotonic()
    late = client.post("/v1/search", json={"query": "a", "timeout_ms": 50})
    assert_error(late, 504, "out_of_time", "50 ms")
    assert time.monotonic() - begun < 5
    assert ended == ["cancelled"]


@pytest.mark.parametrize(
    ("header", "body", "wanted"),
    [("300", 900, 300), ("900", 300, 300), ("300", None, 300), (None, None, 2000)],
)
def test_of_two_timeouts_the_smaller_counts(
    client: TestClient, engine: DummyEngine, header: str | None, body: int | None, wanted: int
) -> None:
    headers = {} if header is None else {"x-raytower-timeout-ms": header}
    assert (
        client.post("/v1/search", json={"query": "a", "timeout_ms": body}, headers=headers).status_code == 200
    )
    assert engine.deadlines[0].timeout_ms == wanted


@pytest.mark.parametrize("text", ["0", "-5", "soon", "1.5", "60001", "9" * 5000, "٣"])
def test_a_bad_timeout_header_is_named(client: TestClient, text: str) -> None:
    response = client.post(
        "/v1/search", json={"query": "a"}, headers={"x-raytower-timeout-ms": text.encode()}
    )
    assert_error(response, 422, "invalid_value", "x-raytower-timeout-ms:")


def test_deadlines_count_from_the_arrival_at_the_proxy(client: TestClient, engine: DummyEngine) -> None:
    waited = {"x-raytower-arrival": str(time.time() - 1.5)}
    assert client.post("/v1/search", json={"query": "a"}, headers=waited).status_code == 200
    assert 1.4 < time.monotonic() - engine.deadlines[0].start < 3
    late = client.post("/v1/search", json={"query": "a", "timeout_ms": 900}, headers=waited)
    assert_error(late, 504, "out_of_time", "900 ms")
    for odd in ("nan", "inf", "-inf", "tomorrow", str(time.time() + 1000)):
        headers = {"x-raytower-arrival": odd, "x-raytower-timeout-ms": "60000"}
        assert client.post("/v1/search", json={"query": "a"}, headers=headers).status_code in (200, 504)


class Connection:
    """An ASGI connection by hand: what the client sends, and when."""

    def __init__(self, *messages: dict[str, Any], body: bytes = b"") -> None:
        self.waiting: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        for message in messages:
            self.waiting.put_nowait(message)
        self.sent: list[dict[str, Any]] = []
        self.scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/search",
            "query_string": b"",
            "headers": [(b"content-type", b"application/json"), (b"host", b"localhost")],
        }

    async def send(self, message: Any) -> None:
        self.sent.append(message)


WHOLE = {"type": "http.request", "body": b'{"query": "a", "timeout_ms": 60000}', "more_body": False}
HALF = {"type": "http.request", "body": b'{"query": ', "more_body": True}
GONE = {"type": "http.disconnect"}


def test_a_client_that_leaves_takes_its_work_along(engine: DummyEngine) -> None:
    ended: list[str] = []
    records: list[RequestFacts] = []

    async def run() -> None:
        connection = Connection(WHOLE)

        async def hang() -> None:
            connection.waiting.put_nowait(GONE)
            try:
                await asyncio.sleep(30)
            finally:
                ended.append("cancelled")

        engine.work = hang
        app = create_app(engine, HttpConfig(), metrics=Recorder(records))
        await asyncio.wait_for(app(connection.scope, connection.waiting.get, connection.send), 5)
        await asyncio.sleep(0)
        assert connection.sent == []

    asyncio.run(run())
    assert ended == ["cancelled"]
    assert records[0].status == 499


def test_a_client_that_leaves_within_its_body_is_no_error(engine: DummyEngine, caplog: Any) -> None:
    async def run() -> None:
        connection = Connection(HALF, GONE)
        await create_app(engine, HttpConfig())(connection.scope, connection.waiting.get, connection.send)
        assert connection.sent == []

    asyncio.run(run())
    assert engine.calls == []
    assert caplog.text == ""


def test_a_slow_body_is_408(engine: DummyEngine) -> None:
    async def run() -> None:
        connection = Connection(HALF)
        app = create_app(engine, HttpConfig(limits={"body_timeout_ms": 30}))
        await asyncio.wait_for(app(connection.scope, connection.waiting.get, connection.send), 5)
        start, body = connection.sent
        assert start["status"] == 408
        assert dict(start["headers"])[b"connection"] == b"close"
        assert json.loads(body["body"])["error"]["code"] == "body_too_slow"

    asyncio.run(run())
    assert engine.calls == []


class Recorder:
    def __init__(self, records: list[RequestFacts]) -> None:
        self.records = records

    def record(self, record: RequestFacts) -> None:
        self.records.append(record)

    def render(self) -> tuple[bytes, str]:
        return b"up 1\n", "text/plain; version=0.0.4"


def test_every_request_is_told_to_the_metrics(engine: DummyEngine) -> None:
    records: list[RequestFacts] = []
    app = create_app(engine, HttpConfig(), metrics=Recorder(records))
    with TestClient(app, base_url="http://localhost") as client:
        client.post("/v1/laws/search", json={"query": "a"}, headers={"x-request-id": "mine-1"})
        client.post("/v1/search", json={"query": ""})
        client.get("/nothing")
        response = client.get("/metrics")
        assert (response.text, response.headers["content-type"]) == ("up 1\n", "text/plain; version=0.0.4")
    good, bad, lost, scraped = records
    assert (good.route, good.collection, good.status) == ("/v1/{collection}/search", "laws", 200)
    assert (good.request_id, good.error, good.body_bytes) == ("mine-1", None, 13)
    assert (good.generation, good.tokens) == ("0123456789ab", 1)
    assert good.seconds > 0
    assert good.answer_bytes > 100
    assert (bad.status, bad.error, bad.generation) == (422, "invalid_value", None)
    assert (lost.status, lost.route) == (404, UNMATCHED)
    assert (scraped.status, scraped.route) == (200, "/metrics")


def test_without_metrics_there_are_none(client: TestClient) -> None:
    assert_error(client.get("/metrics"), 404, "not_configured")


def test_request_ids_are_kept_if_harmless(client: TestClient) -> None:
    given = client.get("/healthz", headers={"x-request-id": "trace:a-b_c.1"})
    assert given.headers["x-request-id"] == "trace:a-b_c.1"
    for odd in ("a b", "x" * 129, "<script>"):
        made = client.get("/healthz", headers={"x-request-id": odd}).headers["x-request-id"]
        assert re.fullmatch("[0-9a-f]{32}", made)


def test_a_surprise_is_500_without_internals(client: TestClient, engine: DummyEngine, caplog: Any) -> None:
    async def fail() -> None:
        raise InputError("/home/secret/path is broken")

    engine.work = fail
    response = client.post("/v1/search", json={"query": "a"})
    assert_error(response, 500, "internal_error")
    assert "secret" not in response.text
    mark = response.json()["error"]["message"].rsplit(" ", 1)[1]
    assert mark in caplog.text
    assert "secret" in caplog.text
    assert response.headers["x-request-id"] in caplog.text


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_a_number_is_a_500_named_as_such(
    client: TestClient, engine: DummyEngine, value: float
) -> None:
    vector = np.array([[value, 0.0, 0.0]], dtype=np.float32)
    hit = Hit("d", "a", {}, 1.0, value, 1.0, 1)
    for changes, path, body in (
        ({"vectors": vector}, "/v1/embeddings", {"input": "a"}),
        ({"vectors": vector}, "/v2/embed", {"texts": ["a"]}),
        ({"logits": vector[0, :1]}, "/v1/rerank", {"query": "q", "documents": ["a"]}),
        ({"scores": vector[0]}, "/v1/similarity", {"pairs": [["a", "a"]]}),
        ({"hits": [[hit]]}, "/v1/search", {"query": "a"}),
        ({"hits": [[replace(hit, rerank_score=None, score=value)]]}, "/v1/search", {"query": "a"}),
        ({"hits": [[replace(hit, rerank_score=None, recall_score=value)]]}, "/v1/search", {"query": "a"}),
    ):
        engine.changes = changes
        response = client.post(path, json=body)
        assert_error(response, 500, "not_finite", "not a number", "0123456789ab")


def test_not_ready_is_503_everywhere_but_healthz(client: TestClient, engine: DummyEngine) -> None:
    engine.ready = False
    assert client.get("/healthz").status_code == 200
    assert_error(client.get("/readyz"), 503, "not_ready")
    response = client.post("/v1/search", json={"query": "a"})
    assert_error(response, 503, "not_ready")
    assert response.headers["retry-after"] == "1"
    assert_error(client.post("/v1/search", json={"query": ""}), 422, "invalid_value")


def test_readiness_is_a_query_that_askers_share(client: TestClient, engine: DummyEngine) -> None:
    for _ in range(5):
        body = client.get("/readyz").json()
    assert body == {"status": "ready", "index_version": "v7", "generation": "0123456789ab"}
    assert engine.checks < 5


def test_an_asker_does_not_end_the_slow_query_of_those_before(
    engine: DummyEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Probes of two balancers once cancelled each other's queries, so a slow server was never ready."""
    monkeypatch.setattr(catalogue, "_READY_SECONDS", 0.01)

    async def slow() -> None:
        await asyncio.sleep(0.1)

    engine.work = slow

    async def ask() -> None:
        readiness = catalogue.Readiness(Parts(engine=engine, config=HttpConfig()))
        first = asyncio.create_task(readiness.check())
        await asyncio.sleep(0.05)
        await readiness.check()
        await first

    asyncio.run(ask())
    assert engine.checks == 1


@pytest.mark.parametrize(
    ("failure", "words"), [(OverloadedError("full"), "full"), (RuntimeError("/secret"), "log")]
)
def test_a_query_that_fails_is_not_ready(
    client: TestClient, engine: DummyEngine, failure: Exception, words: str
) -> None:
    async def fail() -> None:
        raise failure

    engine.work = fail
    response = client.get("/readyz")
    assert_error(response, 503, "not_ready", words)
    assert "secret" not in response.text


def test_a_query_that_hangs_is_not_ready(engine: DummyEngine) -> None:
    async def hang() -> None:
        await asyncio.sleep(30)

    engine.work = hang
    with make_client(engine, timeout_ms=40) as client:
        assert_error(client.get("/readyz"), 503, "not_ready", "0.04 s")


def test_a_websocket_is_closed(client: TestClient) -> None:
    with pytest.raises(Exception), client.websocket_connect("/v1/search"):  # noqa: B017, PT011
        pass


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
    work = {"/v1/search", "/v1/embeddings", "/v1/rerank", "/v1/similarity", "/v1/classify"}
    named = {path.replace("/v1/", "/v1/{collection}/") for path in work}
    compatible = {"/embeddings", "/rerank", "/v2/rerank", "/v1/embed", "/v2/embed", "/embed"}
    compatible |= {"/infinity/rerank", "/infinity/embeddings"}
    told = {
        "/healthz",
        "/readyz",
        "/v1/collections",
        "/v1/models",
        "/models",
        "/v1/models/{model}",
        "/v1/documents",
        "/v1/{collection}/documents",
        "/v1/admin/status",
        "/v1/admin/reload",
        "/v1/admin/rollback",
    }
    assert set(document["paths"]) == work | named | compatible | told
    for path in work | named | compatible:
        operation = document["paths"][path]["post"]
        assert {"200", "400", "401", "408", "413", "415", "422", "429", "503", "504"} <= set(
            operation["responses"]
        )
        error = operation["responses"]["422"]["content"]["application/json"]["schema"]["$ref"]
        assert error.endswith("/ErrorResponse")
        body = operation["requestBody"]["content"]["application/json"]
        for example in body["examples"].values():
            if path in work:
                assert client.post(path, json=example["value"]).status_code == 200
    assert "limits." not in json.dumps(document)
    assert (
        len({operation["operationId"] for item in document["paths"].values() for operation in item.values()})
        > 20
    )


def test_openapi_holds_the_limits_and_what_excludes_what(engine: DummyEngine) -> None:
    with make_client(engine, limits={"max_k": 77, "max_query_characters": 55}) as client:
        schemas = client.get("/openapi.json").json()["components"]["schemas"]
    search = schemas["SearchRequest"]
    assert search["properties"]["k"]["maximum"] == 77
    assert search["properties"]["query"]["anyOf"][0]["maxLength"] == 55
    assert search["additionalProperties"] is False
    assert [branch["required"] for branch in search["oneOf"]] == [["query"], ["queries"]]
    assert "additionalProperties" not in schemas["EmbeddingsRequest"]


def test_the_interface_imports_neither_ray_nor_models() -> None:
    """So that it can be tested and imported without them; static, for this process may have them."""
    from raytower.serving import http

    folder = Path(http.__file__).parent
    imported = {
        name.split(".")[0]
        for path in folder.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert {"raytower", "starlette"} <= imported
    assert not imported & {"ray", "torch", "faiss", "transformers", "lance", "fastapi"}
