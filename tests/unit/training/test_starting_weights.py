"""The identity of a run holds the content of the model that it starts from, whoever wrote it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from raytower.errors import InputError
from raytower.models.encoder import Encoder
from raytower.training.config import TrainRetrieverConfig
from raytower.training.retriever import RetrieverTask
from raytower.training.runner import finished_run, run_identity
from tests.support.tiny_training import retriever_config, write_pairs


def add_one(folder: Path) -> None:
    """All weights + 1.0, in files of the same names and sizes; what else lies in the folder stays as it is."""
    for file in folder.rglob("*.safetensors"):
        save_file({name: tensor + 1.0 for name, tensor in load_file(file).items()}, file)


def as_written(encoder: Path, folder: Path, _: pytest.MonkeyPatch) -> tuple[str, Path]:
    """As raytower wrote it, so that its raytower.json is stale once the weights are edited."""
    shutil.copytree(encoder, folder)
    return str(folder), folder


def sentence_transformers(encoder: Path, folder: Path, _: pytest.MonkeyPatch) -> tuple[str, Path]:
    shutil.copytree(encoder, folder)
    (folder / "raytower.json").unlink()
    return str(folder), folder


def older_layout(encoder: Path, folder: Path, _: pytest.MonkeyPatch) -> tuple[str, Path]:
    """Weights of a module in a folder of its own: the only ones that are edited here."""
    Encoder.load(encoder)
    shutil.copytree(encoder, folder)
    (folder / "2_Dense").mkdir()
    save_file(load_file(encoder / "model.safetensors"), folder / "2_Dense" / "model.safetensors")
    modules = json.loads((folder / "modules.json").read_text())
    dense = {"path": "2_Dense", "type": "sentence_transformers.models.Dense"}
    (folder / "modules.json").write_text(json.dumps([*modules, dense]))
    return str(folder), folder / "2_Dense"


def plain(encoder: Path, folder: Path, _: pytest.MonkeyPatch) -> tuple[str, Path]:
    """What transformers writes of a backbone and its tokenizer, and nothing besides."""
    loaded = Encoder.load(encoder)
    loaded.backbone.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return str(folder), folder


def hub_id(encoder: Path, folder: Path, patch: pytest.MonkeyPatch) -> tuple[str, Path]:
    """A repository in the hub's cache, files by links to blobs as there."""
    repository = folder / "models--tiny--encoder"
    snapshot = repository / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(encoder, repository / "blobs")
    snapshot.mkdir(parents=True)
    for file in (repository / "blobs").glob("*.*"):
        (snapshot / file.name).symlink_to(file)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(snapshot.name)
    patch.setattr(constants, "HF_HUB_CACHE", str(folder))
    return "tiny/encoder", repository / "blobs"


Kind = Callable[[Path, Path, pytest.MonkeyPatch], tuple[str, Path]]
KINDS = [as_written, sentence_transformers, older_layout, plain, hub_id]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_edited_weights_are_another_run(
    kind: Kind, still_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They were the same one, "finished; nothing to do", where raytower.json was stale or there was none."""
    name, weights = kind(still_encoder, tmp_path / "start", monkeypatch)
    config = retriever_config(Path("x"), write_pairs(tmp_path / "pairs.tsv", 8), tmp_path / "out", model=name)
    before = identity_of(config)
    assert identity_of(config) == before
    publish(tmp_path / "out", before)
    assert finished_run(config, before) == {"steps": 1}
    add_one(weights)
    after = identity_of(config)
    assert {key for key in after if after[key] != before[key]} == {"content of start"}
    with pytest.raises(InputError, match=r"by another config or other data \(content of start\)"):
        finished_run(config, after)


def identity_of(config: TrainRetrieverConfig) -> dict[str, Any]:
    return run_identity(config, RetrieverTask.survey(config))


def publish(output: Path, identity: dict[str, Any]) -> None:
    """The record of a finished run."""
    output.mkdir()
    (output / "raytower.json").write_text(json.dumps({"run": identity, "figures": {"steps": 1}}))
    (output / "model.safetensors").touch()


def test_an_output_of_an_older_version_says_so(still_encoder: Path, tmp_path: Path) -> None:
    config = retriever_config(still_encoder, write_pairs(tmp_path / "pairs.tsv", 8), tmp_path / "out")
    identity = identity_of(config)
    former = {key: value for key, value in identity.items() if key != "content of start"}
    publish(tmp_path / "out", {**former, "weights of start": "0" * 64})
    with pytest.raises(InputError, match="an older version of raytower wrote it"):
        finished_run(config, identity)


def test_keys_that_came_later_tell_no_run_from_another_at_their_defaults(
    still_encoder: Path, tmp_path: Path
) -> None:
    """Every output of before refused its own command as soon as any objective got a new setting."""
    pairs = write_pairs(tmp_path / "pairs.tsv", 8)
    config = retriever_config(still_encoder, pairs, tmp_path / "out", objective={"scale": 50})
    identity = identity_of(config)
    former = {key: value for key, value in identity.items() if key not in ("guide", "pooling")}
    former["objective"] = {k: v for k, v in identity["objective"].items() if k != "more_negatives"}
    former["optimizer"] = {k: v for k, v in identity["optimizer"].items() if k not in ("schedule", "head_lr")}
    publish(tmp_path / "out", former)
    assert finished_run(config, identity) == {"steps": 1}
    for changes, named in (
        ({"objective": {"scale": 50, "more_negatives": ["query_query"]}}, "objective"),
        ({"optimizer": {"lr": 1e-3, "schedule": "cosine"}}, "objective, optimizer"),
        ({"objective": {"scale": 50}, "guide": {"encoder": str(still_encoder)}}, "content of guide, guide"),
        ({"objective": {"scale": 20}}, "objective"),
    ):
        other = retriever_config(still_encoder, pairs, tmp_path / "out", **changes)
        with pytest.raises(InputError, match=rf"other data \({named}\)"):
            finished_run(other, identity_of(other))
