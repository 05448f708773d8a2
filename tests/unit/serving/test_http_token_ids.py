"""Token ids in place of texts: OpenAI's clients send those of tiktoken, which are no ids of the model."""

from __future__ import annotations

import sys
import types
from collections.abc import Sequence
from typing import Any

import pytest
from starlette.testclient import TestClient

from raytower.serving.calls import EmbedCall
from raytower.serving.http.application import create_app
from raytower.serving.http_config import HttpConfig
from tests.support.dummy_engine import DummyEngine


class Letters:
    """An encoding of capital letters by their place."""

    def decode(self, ids: Sequence[int], errors: str) -> str:
        if max(ids) > 25:
            raise KeyError(max(ids))
        return "".join(chr(65 + token) for token in ids)


def ask(monkeypatch: pytest.MonkeyPatch, get_encoding: Any, **values: Any) -> tuple[Any, DummyEngine]:
    module = get_encoding and types.SimpleNamespace(get_encoding=get_encoding)
    monkeypatch.setitem(sys.modules, "tiktoken", module)
    engine = DummyEngine()
    app = create_app(engine, HttpConfig(**values))
    with TestClient(app, base_url="http://localhost") as client:
        return client.post("/v1/embeddings", json={"input": [[0, 1], [25]]}), engine


def test_ids_are_read_as_tiktoken_wrote_them(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def get_encoding(name: str) -> Letters:
        asked.append(name)
        return Letters()

    response, engine = ask(monkeypatch, get_encoding)
    assert response.status_code == 200
    assert engine.calls == [EmbedCall(texts=["AB", "Z"])]
    assert asked == ["cl100k_base"]


def test_ids_of_the_model_reach_it_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    response, engine = ask(monkeypatch, None, token_ids="model")
    assert response.status_code == 200
    assert engine.calls == [EmbedCall(token_ids=[[0, 1], [25]])]


def _unreachable(name: str) -> Any:
    raise ConnectionError("no route to host")


class _Short(Letters):
    def decode(self, ids: Sequence[int], errors: str) -> str:
        raise KeyError(25)


@pytest.mark.parametrize(
    ("get_encoding", "words"),
    [
        (None, "pip install 'raytower[serve]'"),
        (_unreachable, "could not be had on this server (ConnectionError)"),
        (lambda name: _Short(), "input.0: has a token id that cl100k_base has not: 25"),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_ways_out(
    get_encoding: Any, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    response, engine = ask(monkeypatch, get_encoding)
    message = response.json()["error"]["message"]
    assert (response.status_code, engine.calls) == (422, [])
    assert words in message
    assert "check_embedding_ctx_length=False" in message
