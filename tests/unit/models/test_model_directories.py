"""Model directories from anywhere: damaged, foreign and remote ones, and who may read what is written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pyarrow import fs as pafs
from safetensors.torch import load_file, save_file
from torch.optim import AdamW

from raytower.errors import FormatError, InputError
from raytower.index.reader import Index
from raytower.models.cross_encoder import CrossEncoder
from raytower.models.directory import resolve_model, save_tensors
from raytower.models.encoder import Encoder, read_encoder_info
from raytower.models.fetching import fetch_model
from raytower.models.text_classifier import TextClassifier
from raytower.serving.config import ServeConfig
from raytower.serving.resolve import resolve_all
from raytower.storage import Location
from raytower.training.optimizer import save_optimizer
from tests.support.index_cases import build, unit_vectors, write_embeddings
from tests.support.s3_server import s3_server
from tests.support.tiny_models import build_tiny_classifier, build_tiny_encoder, build_tiny_reranker


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """An encoder with a projection, to be damaged."""
    return build_tiny_encoder(tmp_path / "model", projection_dim=8)


def change_json(file: Path, **values: Any) -> None:
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    file.write_text(json.dumps({**found, **values}), encoding="utf-8")


def change_modules(folder: Path, change: Callable[[list[dict[str, Any]]], Any]) -> None:
    file = folder / "modules.json"
    modules = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(change(modules)), encoding="utf-8")


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def add_token_beyond_the_table(folder: Path) -> None:
    file = folder / "tokenizer.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    values["model"]["vocab"]["<new>"] = len(values["model"]["vocab"])
    file.write_text(json.dumps(values), encoding="utf-8")


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 9\n"
WEIGHTS = "model.safetensors"

DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "pointer": (
        lambda f: (f / WEIGHTS).write_text(LFS),
        r"model\.safetensors' are a Git LFS pointer.*git lfs pull",
    ),
    "cut": (lambda f: cut(f / WEIGHTS), r"model\.safetensors' are cut short or damaged .*download"),
    "empty": (lambda f: (f / WEIGHTS).write_bytes(b""), r"are cut short or damaged \(0 bytes"),
    "dense pointer": (lambda f: (f / "2_Dense" / WEIGHTS).write_text(LFS), "Git LFS pointer"),
    "dense too large": (
        lambda f: change_json(f / "2_Dense" / "config.json", in_features=60_000, out_features=60_000),
        "in_features 60000, out_features 60000",
    ),
    "dense of text": (
        lambda f: change_json(f / "2_Dense" / "config.json", out_features="8"),
        "out_features '8'",
    ),
    "dense outside": (
        lambda f: change_modules(f, lambda m: [*m[:2], {**m[2], "path": "../../outside"}]),
        r"names the path '../../outside'; it must lie below",
    ),
    "modules absolute": (
        lambda f: change_modules(f, lambda m: [*m[:2], {**m[2], "path": "/etc"}]),
        r"names the path '/etc'; it must lie below",
    ),
    "modules without path": (
        lambda f: change_modules(f, lambda m: [{"type": "sentence_transformers.models.Transformer"}]),
        "names the path None",
    ),
    "modules a dict": (lambda f: change_modules(f, lambda m: {"a": 1}), "must hold a list of modules"),
    "modules no JSON": (lambda f: (f / "modules.json").write_text("[{"), r"modules\.json' is not valid JSON"),
    "prompts a list": (
        lambda f: change_json(f / "config_sentence_transformers.json", prompts=["query: "]),
        r"has prompts \['query: '\]",
    ),
    "settings no JSON": (
        lambda f: (f / "config_sentence_transformers.json").write_text("{"),
        r"config_sentence_transformers\.json' is not valid JSON",
    ),
    "length of text": (
        lambda f: change_json(f / "sentence_bert_config.json", max_seq_length="abc"),
        "has max_seq_length 'abc'; it must be a whole number",
    ),
    "length below zero": (
        lambda f: change_json(f / "sentence_bert_config.json", max_seq_length=-5),
        "has max_seq_length -5; it must be a whole number",
    ),
    "activation": (lambda f: change_json(f / "config.json", hidden_act="no_such"), "its backbone.*no_such"),
    "quantised": (
        lambda f: change_json(f / "config.json", quantization_config={"bits": 4}),
        "its backbone",
    ),
    "too deep": (
        lambda f: change_json(f / "config.json", num_hidden_layers=10**6),
        "num_hidden_layers 1000000",
    ),
    "config no JSON": (lambda f: (f / "config.json").write_text("{"), r"config\.json' is not valid JSON"),
    "tokenizer": (lambda f: (f / "tokenizer.json").write_text('{"version": "1.0"}'), "its tokenizer"),
    "token beyond the table": (
        add_token_beyond_the_table,
        r"tokens, '<new>' the last, and the embedding table \d+",
    ),
    "adapter": (lambda f: change_json(f / "adapter_config.json", peft_type="LORA"), "holds a LoRA adapter"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_directory_is_refused_in_one_message(model: Path, name: str) -> None:
    Encoder.load(model)
    spoil, message = DAMAGES[name]
    spoil(model)
    with pytest.raises(FormatError, match=message) as refused:
        Encoder.load(model)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "2_Dense/config.json"])
def test_a_pointer_in_place_of_any_file_is_named(model: Path, name: str) -> None:
    (model / name).write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", encoding="utf-8"
    )
    with pytest.raises(FormatError, match=rf"{name}' is a Git LFS pointer.*git lfs pull"):
        Encoder.load(model)


@pytest.mark.parametrize(
    "name", ["pointer", "cut", "empty", "activation", "token beyond the table", "config no JSON"]
)
def test_rerankers_and_classifiers_say_the_same(tmp_path: Path, name: str) -> None:
    folder = build_tiny_classifier(tmp_path / "either")
    spoil, message = DAMAGES[name]
    spoil(folder)
    message = message.replace("its backbone", "its classifier")
    with pytest.raises(FormatError, match=message):
        CrossEncoder.load(folder)
    with pytest.raises(FormatError, match=message):
        TextClassifier.load(folder)


def test_shards_of_weights_lie_in_the_directory_or_are_refused(model: Path) -> None:
    shutil.move(model / WEIGHTS, model / "one.safetensors")
    names = list(load_file(model / "one.safetensors"))
    index = model / "model.safetensors.index.json"

    def point_to(file: object) -> None:
        index.write_text(
            json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, file)}), encoding="utf-8"
        )

    point_to("one.safetensors")
    assert Encoder.load(model).dim == 8
    shutil.copy(model / "one.safetensors", model.parent / "outside.safetensors")
    for file in ("../outside.safetensors", str(model.parent / "outside.safetensors")):
        point_to(file)
        with pytest.raises(FormatError, match="it must lie below the model directory"):
            Encoder.load(model)
    point_to("two.safetensors")
    with pytest.raises(FormatError, match=r"two\.safetensors' do not exist, though their index names them"):
        Encoder.load(model)
    index.write_text("[]", encoding="utf-8")
    with pytest.raises(FormatError, match="must hold a JSON object"):
        Encoder.load(model)


@pytest.fixture
def team_umask() -> Iterator[None]:
    before = os.umask(0o002)
    yield
    os.umask(before)


@pytest.mark.usefixtures("team_umask")
def test_weights_are_as_readable_as_the_umask_allows(tmp_path: Path) -> None:
    build_tiny_encoder(tmp_path / "encoder", projection_dim=8)
    build_tiny_reranker(tmp_path / "reranker")
    (tmp_path / "state").mkdir()
    save_optimizer(AdamW([torch.nn.Parameter(torch.ones(2))]), tmp_path / "state" / "optimizer.safetensors")
    (tmp_path / "old.safetensors").touch(0o600)
    save_tensors({"a": torch.ones(1)}, tmp_path / "old.safetensors")
    modes = {str(path): path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()}
    assert len([name for name in modes if name.endswith("safetensors")]) == 5
    assert {name: mode for name, mode in modes.items() if mode != 0o664} == {}


class TestFingerprint:
    def test_a_corrected_config_is_another_encoder(self, model: Path) -> None:
        before = Encoder.load(model)
        for change in ({"hidden_act": "relu"}, {"layer_norm_eps": 1e-5}, {"num_attention_heads": 4}):
            other = shutil.copytree(model, model.with_name(next(iter(change))))
            change_json(other / "config.json", **change)
            after = Encoder.load(other)
            assert after.fingerprint != before.fingerprint
            assert after.former_fingerprint == before.former_fingerprint

    def test_names_versions_and_defaults_do_not_count(self, model: Path) -> None:
        before = Encoder.load(model).fingerprint
        change_json(
            model / "config.json",
            _name_or_path="elsewhere",
            transformers_version="4.0.0",
            torch_dtype="bfloat16",
        )
        change_json(model / "config.json", architectures=["BertForMaskedLM"], layer_norm_eps=1e-12)
        assert Encoder.load(model).fingerprint == before

    def test_rerankers_too(self, tmp_path: Path) -> None:
        folder = build_tiny_reranker(tmp_path / "reranker")
        before = CrossEncoder.load(folder)
        before.save(tmp_path / "again")
        assert CrossEncoder.load(tmp_path / "again").fingerprint == before.fingerprint
        change_json(folder / "config.json", hidden_act="relu")
        assert CrossEncoder.load(folder).fingerprint != before.fingerprint

    def test_one_that_was_recorded_by_the_older_formula_is_not_taken_for_todays(self, model: Path) -> None:
        assert read_encoder_info(model)["fingerprint"] == Encoder.load(model).fingerprint
        info = json.loads((model / "raytower.json").read_text(encoding="utf-8"))
        del info["fingerprint_version"]
        (model / "raytower.json").write_text(json.dumps(info), encoding="utf-8")
        assert "fingerprint" not in read_encoder_info(model)


class TestRemote:
    @pytest.fixture
    def cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv("RAYTOWER_CACHE", str(tmp_path / "cache"))
        return tmp_path / "cache"

    def test_it_is_fetched_once_and_again_when_either_side_changes(self, model: Path, cache: Path) -> None:
        place = Location(pafs.SubTreeFileSystem(str(model.parent), pafs.LocalFileSystem()), "model")
        folder = fetch_model(place)
        assert Encoder.load(folder).fingerprint == Encoder.load(model).fingerprint
        written = (folder / WEIGHTS).stat().st_ino
        assert fetch_model(place) == folder
        assert (folder / WEIGHTS).stat().st_ino == written
        weights = load_file(folder / WEIGHTS)
        save_file({name: tensor + 1 for name, tensor in weights.items()}, folder / WEIGHTS, {"format": "pt"})
        assert Encoder.load(fetch_model(place)).fingerprint == Encoder.load(model).fingerprint
        change_json(model / "config.json", hidden_act="relu")
        assert fetch_model(place) != folder
        assert Encoder.load(fetch_model(place)).fingerprint == Encoder.load(model).fingerprint
        assert not [path for path in cache.rglob("*") if path.suffix in (".lock", ".tmp")]

    def test_by_uri(self, model: Path, cache: Path, tmp_path: Path) -> None:
        assert resolve_model(model.as_uri()) == model
        with s3_server(tmp_path) as server:
            for file in model.rglob("*"):
                if file.is_file():
                    server.put("bucket", f"runs/encoder/{file.relative_to(model)}", file.read_bytes())
            uri = server.uri("bucket/runs/encoder")
            assert Encoder.load(uri).fingerprint == Encoder.load(model).fingerprint
            assert resolve_model(uri).is_relative_to(cache)
            with pytest.raises(InputError, match="does not exist or is empty"):
                resolve_model(server.uri("bucket/runs/reranker"))


def test_an_index_of_the_older_formula_is_explained(tmp_path: Path) -> None:
    encoder = Encoder.load(build_tiny_encoder(tmp_path / "encoder"))
    for made_by, is_explained in ((encoder.former_fingerprint, True), ("f" * 64, False)):
        folder = tmp_path / made_by
        embeddings = write_embeddings(
            folder / "in", ["a"], unit_vectors(1), fingerprint=made_by, encoder=str(tmp_path / "encoder")
        )
        build(folder / "index", embeddings)
        for check in (
            lambda: Index.open(str(folder / "index")).check_fingerprint(encoder.fingerprint),  # noqa: B023
            lambda: resolve_all(ServeConfig(index=str(folder / "index"))),  # noqa: B023
        ):
            with pytest.raises(FormatError) as caught:
                check()
            assert ("by the older formula" in str(caught.value)) is is_explained


def test_a_server_explains_by_the_encoder_that_it_is_given(tmp_path: Path) -> None:
    given = build_tiny_encoder(tmp_path / "here")
    embeddings = write_embeddings(
        tmp_path / "in",
        ["a"],
        unit_vectors(1),
        fingerprint=Encoder.load(given).former_fingerprint,
        encoder=str(tmp_path / "where it was encoded"),
    )
    build(tmp_path / "index", embeddings)
    with pytest.raises(FormatError, match="by the older formula") as caught:
        resolve_all(ServeConfig(index=str(tmp_path / "index"), encoder=str(given)))
    assert str(given) in str(caught.value)
