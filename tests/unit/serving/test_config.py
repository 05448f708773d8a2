"""The config of a server: one index or several, and what cannot go together."""

from __future__ import annotations

from typing import Any

import pytest

from raytower.config import make_config
from raytower.errors import InputError
from raytower.serving.config import CollectionConfig, ServeConfig
from raytower.serving.keys import keys_of


def config(**values: Any) -> ServeConfig:
    return make_config(ServeConfig, values)


def test_one_index_is_the_default_collection() -> None:
    collections = config(index="a", dtype="bfloat16").served_collections()
    assert collections == {"default": CollectionConfig(index="a", dtype="bfloat16")}


def test_keys_beside_collections_are_those_of_each_that_does_not_set_them() -> None:
    collections = config(
        collections={"faq": {"index": "a"}, "law": {"index": "b", "dtype": "float32", "reranker": "r"}},
        dtype="float16",
    ).served_collections()
    assert list(collections) == ["faq", "law"], "the first is the default one"
    assert collections["faq"] == CollectionConfig(index="a", dtype="float16")
    assert collections["law"] == CollectionConfig(index="b", dtype="float32", reranker="r")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "neither given"),
        ({"index": "a", "collections": {"b": {"index": "b"}}}, "both given"),
        ({"collections": {"search": {"index": "a"}}}, "'search' cannot be a collection's name"),
        ({"collections": {"Law": {"index": "a"}}}, "lower-case"),
        ({"index": "a", "engine": "uvicorn"}, "`server: uvicorn`"),
        ({"index": "a", "layout": "apart"}, "called sharded now"),
        ({"index": "a", "server": "uvicorn", "layout": "split"}, "one process"),
        ({"index": "a", "server": "uvicorn", "replicas": 2}, "one process"),
        ({"index": "a", "autoscaling": {"min": 3, "max": 2}}, "lower min or raise max"),
        ({"index": "a", "route_prefix": "a"}, "route_prefix"),
        ({"index": "a", "api_key_env": "A", "security": {"key_env": "B"}}, "set one"),
        ({"index": "a", "access_log": "-"}, "name a file, or set server to uvicorn"),
        ({"index": "a", "fusion_weight": 1.5}, "fusion_weight"),
    ],
)
def test_what_cannot_be_meant_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        config(**values)


def test_one_key_is_said_in_short() -> None:
    assert config(index="a", api_key_env="KEY").security.key_env == "KEY"
    assert config(index="a").security.key_env is None


def test_an_open_address_needs_a_key_or_the_word_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVE_TEST_KEY", " sesame\n")
    assert keys_of(config(index="a")) == []
    with pytest.raises(InputError, match=r"0\.0\.0\.0.*no key"):
        keys_of(config(index="a", host="0.0.0.0"))
    assert keys_of(config(index="a", host="0.0.0.0", security={"open": True})) == []
    # printf sesame | sha256sum
    digest = "d0c04f4b1951e4aeaaec8223ed2039e542f3aae805a6fa7f6d794e5afff5d272"
    keys = keys_of(config(index="a", host="0.0.0.0", api_key_env="SERVE_TEST_KEY"))
    assert keys == [
        {
            "name": "SERVE_TEST_KEY",
            "sha256": digest,
            "admin": False,
            "requests_per_second": None,
            "max_in_flight": None,
        }
    ]
    monkeypatch.setenv("SERVE_TEST_KEY", " ")
    with pytest.raises(InputError, match=r"SERVE_TEST_KEY.*unset or empty"):
        keys_of(config(index="a", api_key_env="SERVE_TEST_KEY"))
