"""What the Serve application hands to its replicas, without starting any."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from raytower.errors import InputError
from raytower.index.manifest import IndexManifest
from raytower.serving.config import ServeConfig
from raytower.serving.graph import config_for_replicas


def of_encoder(name: str) -> IndexManifest:
    """As much of a manifest as the config needs: the encoder that it records."""
    return cast(IndexManifest, cast(Any, SimpleNamespace(encoder=name)))


def test_the_store_of_the_callers_environment_travels_to_replicas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9999")
    monkeypatch.setenv("AWS_REGION", "eu-north-1")
    options = "?endpoint_override=127.0.0.1:9999&region=eu-north-1&scheme=http"
    config = ServeConfig(
        index="s3://bucket/index", encoder="s3://bucket/encoder", reranker="s3://bucket/reranker"
    )
    sent = config_for_replicas(config, of_encoder("unused"))
    assert sent.index == f"s3://bucket/index{options}"
    assert sent.encoder == f"s3://bucket/encoder{options}"
    assert sent.reranker == f"s3://bucket/reranker{options}"
    # The encoder that the index records goes the same way.
    sent = config_for_replicas(ServeConfig(index="s3://bucket/index"), of_encoder("s3://bucket/recorded"))
    assert (sent.encoder, sent.reranker) == (f"s3://bucket/recorded{options}", None)


def test_local_folders_get_absolute_and_hub_ids_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("index", "reranker"):
        (tmp_path / name).mkdir()
    config = ServeConfig(index="index", encoder="owner/name", reranker="reranker")
    sent = config_for_replicas(config, of_encoder(""))
    assert (sent.index, sent.encoder) == (str(tmp_path / "index"), "owner/name")
    assert sent.reranker == str(tmp_path / "reranker")


def test_an_index_that_records_no_encoder_needs_one_named() -> None:
    with pytest.raises(InputError, match="records no encoder"):
        config_for_replicas(ServeConfig(index="index"), of_encoder(""))
