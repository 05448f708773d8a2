"""From a config to generations, and the plan of a server, without serving anything."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve import Application
from ray.serve.schema import ServeDeploySchema

from raytower.errors import FormatError, InputError
from raytower.index.versions import open_manifest
from raytower.models.cross_encoder import CrossEncoder
from raytower.models.encoder import Encoder
from raytower.models.fusion import Fusion
from raytower.serving import graph
from raytower.serving.config import ServeConfig
from raytower.serving.opening import checked_manifest
from raytower.serving.plan import plan_serve, render_serve_file, serve_file, with_gpus
from raytower.serving.resolve import absolute_places, generation_of, resolve_all, resolve_settings
from raytower.workers import Node
from tests.support.served_index import write_version
from tests.support.tiny_models import build_tiny_encoder, build_tiny_reranker

OLD, NEW = "000001", "000002"


@pytest.fixture(scope="module")
def index_dir(tmp_path_factory: pytest.TempPathFactory, dummy_encoder_dir: Path) -> Path:
    folder = tmp_path_factory.mktemp("resolved") / "index"
    write_version(folder, OLD, dummy_encoder_dir)
    write_version(folder, NEW, dummy_encoder_dir)
    return folder


def config(index: Path | str, **values: Any) -> ServeConfig:
    return ServeConfig(index=str(index), port=0, **values)


def generation(index: Path | str, version: str | None = None, **values: Any) -> Any:
    return generation_of("default", config(index, **values).served_collections()["default"], version)


def test_the_newest_version_is_taken_unless_one_is_named(index_dir: Path, dummy_encoder_dir: Path) -> None:
    newest, named = generation(index_dir), generation(index_dir, OLD)
    assert (newest.index_version, named.index_version) == (NEW, OLD)
    assert newest.id != named.id
    assert newest.id == generation(index_dir).id
    assert newest.encoder.fingerprint == Encoder.load(str(dummy_encoder_dir)).fingerprint
    assert checked_manifest(newest) == open_manifest(str(index_dir), NEW)


def test_a_model_without_a_fingerprint_is_loaded_once_for_it(
    index_dir: Path, dummy_encoder_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was loaded whole by every reload, beside the one that is served."""
    reranker = shutil.copytree(build_tiny_reranker(tmp_path / "first"), tmp_path / "second")
    (reranker / "raytower.json").unlink(missing_ok=True)
    loaded: list[Any] = []
    load = CrossEncoder.load

    def counted(uri: Any) -> CrossEncoder:
        loaded.append(uri)
        return load(uri)

    monkeypatch.setattr(CrossEncoder, "load", counted)
    first = generation(index_dir, reranker=str(reranker))
    assert generation(index_dir, OLD, reranker=str(reranker)).reranker == first.reranker
    assert len(loaded) == 1
    os.utime(reranker / "model.safetensors", (1, 1))
    assert generation(index_dir, reranker=str(reranker)).reranker == first.reranker
    assert len(loaded) == 2


def test_prefixes_are_the_encoders_or_the_configs(index_dir: Path, tmp_path: Path) -> None:
    assert generation(index_dir).query_prefix == ""
    assert generation(index_dir, query_prefix="ask: ").query_prefix == "ask: "
    encoder = build_tiny_encoder(tmp_path / "encoder")
    settings = encoder / "config_sentence_transformers.json"
    values = json.loads(settings.read_text()) if settings.is_file() else {}
    settings.write_text(json.dumps(values | {"prompts": {"query": "find: "}}))
    write_version(tmp_path / "index", OLD, encoder)
    assert generation(tmp_path / "index").query_prefix == "find: "


def test_a_weight_needs_a_reranker_that_was_tuned(index_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no reranker"):
        generation(index_dir, fusion_weight=0.5)
    reranker = build_tiny_reranker(tmp_path / "reranker")
    with pytest.raises(InputError, match="stores no fusion"):
        generation(index_dir, reranker=str(reranker), fusion_weight=0.5)
    assert generation(index_dir, reranker=str(reranker)).fusion is None
    info = reranker / "raytower.json"
    fusion = Fusion(weight=0.3, recall_mean=1, recall_std=2, rerank_mean=3, rerank_std=4)
    info.write_text(json.dumps(json.loads(info.read_text()) | {"fusion": fusion.to_dict()}))
    assert generation(index_dir, reranker=str(reranker)).fusion.weight == 0.3
    changed = generation(index_dir, reranker=str(reranker), fusion_weight=0.5).fusion
    assert (changed.weight, changed.rerank_std) == (0.5, 4)


def test_what_cannot_be_served_is_refused(index_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no index"):
        resolve_all(config(tmp_path))
    with pytest.raises(InputError, match="does not exist"):
        resolve_all(config(index_dir, reranker="./missing"))
    other = build_tiny_encoder(tmp_path / "other", seed=5)
    with pytest.raises(FormatError, match="fingerprint"):
        resolve_all(config(index_dir, encoder=str(other)))
    (other / "raytower.json").unlink()
    with pytest.raises(FormatError, match="fingerprint"):
        resolve_all(config(index_dir, encoder=str(other)))


def test_settings_travel_with_absolute_paths(
    index_dir: Path, monkeypatch: pytest.MonkeyPatch, dummy_reranker_dir: Path
) -> None:
    monkeypatch.chdir(index_dir.parent)
    served = resolve_settings("faq", {"index": "index", "reranker": str(dummy_reranker_dir)})
    assert served.settings["index"] == served.generation.index == str(index_dir)
    assert served.settings["encoder"] is None, "a newer version may bring another encoder"
    assert resolve_settings("faq", served.settings).generation == served.generation
    with pytest.raises(InputError, match=r"'faq'.*unknown key 'indx'"):
        resolve_settings("faq", {"indx": "x"})


def test_the_store_of_the_callers_environment_travels_to_replicas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9999")
    monkeypatch.setenv("AWS_REGION", "eu-north-1")
    options = "?endpoint_override=127.0.0.1:9999&region=eu-north-1&scheme=http"
    given = {"index": "s3://bucket/index", "encoder": "owner/name", "reranker": None, "label_field": "label"}
    assert absolute_places(given) == given | {"index": f"s3://bucket/index{options}"}


def test_the_plan_says_what_would_run(index_dir: Path) -> None:
    together = plan_serve(config(index_dir, replicas=2, num_cpus=2))
    digests = {shard.digest for shard in open_manifest(index_dir).shards}
    files = [file for digest in digests for file in (index_dir / "shards" / digest).iterdir()]
    size = sum(file.stat().st_size for file in files if file.name != "shard.json")
    assert together["collections"]["default"]["index_version"] == NEW
    assert together["collections"]["default"]["rows"] == 50
    assert together["index_bytes_per_process"] == together["index_bytes"] == size
    assert (together["processes"], together["cpus"]) == (3, 4), "two replicas and the conductor"
    sharded = plan_serve(config(index_dir, layout="sharded", num_cpus=1, shard_num_cpus=2, shard_replicas=2))
    assert (sharded["processes"], sharded["cpus"]) == (1 + 1 + 2 * 2, 1 + 2 * 2 * 2)
    assert sharded["index_bytes_per_process"] == size // 2
    split = plan_serve(config(index_dir, layout="split", rerank_replicas=2, rerank_num_cpus=3))
    assert (split["processes"], split["cpus"]) == (1 + 1 + 2, 1 + 2 * 3)


@pytest.mark.parametrize(
    ("gpus", "values", "expected"),
    [
        (0, {}, (None, None)),
        (1, {}, (1, None)),
        (8, {"replicas": 2}, (1, None)),
        (1, {"replicas": 2}, (0.5, None)),
        (1, {"layout": "split"}, (0.5, 0.5)),
        (2, {"layout": "split"}, (1, 1)),
        (3, {"layout": "split", "autoscaling": {"min": 1, "max": 2}}, (1, 1)),
        (2, {"layout": "split", "num_gpus": 0}, (0, 1)),
        (2, {"layout": "split", "num_gpus": 1.5}, (1.5, None)),
        (1, {"num_gpus": 0}, (0, None)),
        (4, {"engine": "onnx"}, (None, None)),
    ],
)
def test_replicas_hold_the_gpus_of_the_machine(
    index_dir: Path, gpus: int, values: dict[str, Any], expected: tuple[float | None, float | None]
) -> None:
    """They held none, and computed on CPUs or on a GPU that Ray gave to others as well."""
    found = with_gpus(config(index_dir, **values), [Node(cpus=16, gpus=gpus)])
    assert (found.num_gpus, found.rerank_num_gpus) == expected


@pytest.mark.parametrize("layout", ["together", "split", "sharded"])
def test_processes_with_models_ask_for_the_nodes_of_the_config(index_dir: Path, layout: str) -> None:
    asked = {"resources": {"license": 1.0}, "label_selector": {"ray.io/market-type": "!spot"}}
    values = config(index_dir, layout=layout, **asked).model_dump(mode="json", exclude_unset=True)
    bound = graph.app_builder(values)._bound_deployment
    found = [bound, *(part._bound_deployment for part in bound.init_args if isinstance(part, Application))]
    options = {part.name: {name: part.ray_actor_options.get(name) for name in asked} for part in found}
    assert options.pop("conductor") == {"resources": None, "label_selector": None}
    assert len(options) == {"together": 1, "split": 2, "sharded": 3}[layout]
    assert all(option == asked for option in options.values())


def test_a_serve_config_file_holds_what_was_given(index_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(index_dir.parent)
    given = ServeConfig(
        index="index", port=8123, replicas=2, name="faq", route_prefix="/faq", layout="sharded"
    )
    text = render_serve_file(serve_file(given))
    schema = ServeDeploySchema.model_validate(yaml.safe_load(text))
    (application,) = schema.applications
    assert (schema.http_options.host, schema.http_options.port) == ("127.0.0.1", 8123)
    assert (application.name, application.route_prefix) == ("faq", "/faq")
    assert application.args == {"index": str(index_dir), "replicas": 2, "layout": "sharded"}
    module, _, name = (application.import_path or "").partition(":")
    build = getattr(importlib.import_module(module), name)
    assert isinstance(build(application.args), Application)


def test_a_taken_port_and_a_host_that_is_none_are_refused_by_the_plan(index_dir: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=re.escape(f"127.0.0.1:{port}")):
            plan_serve(ServeConfig(index=str(index_dir), port=port))
    for host in ("http://127.0.0.1", "[::1]"):
        with pytest.raises(InputError, match=r"no address of this machine|no key"):
            plan_serve(config(index_dir, host=host, security={"open": True}))
