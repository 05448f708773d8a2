"""What a directory holds is told from its files, and the wrong class is refused by every way to load it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertForSequenceClassification, BertModel

import raytower
from raytower.errors import FormatError
from raytower.library.run import run
from raytower.models.cross_encoder import CrossEncoder
from raytower.models.encoder import Encoder
from raytower.models.model_class import possible_classes
from raytower.models.text_classifier import TextClassifier
from raytower.serving.config import ServeConfig
from raytower.serving.resolve import generation_of
from tests.support.served_index import write_version
from tests.support.tiny_models import build_tiny_encoder, build_tiny_reranker, tiny_config, tiny_tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories of each class; those of two labels are told apart by raytower.json alone."""
    root = tmp_path_factory.mktemp("classes")
    build_tiny_encoder(root / "encoder")
    build_tiny_reranker(root / "reranker")
    build_tiny_reranker(root / "reranker2", num_labels=2)
    torch.manual_seed(0)
    for name, labels in (("classifier", "abc"), ("classifier2", "ab")):
        TextClassifier.start_from(root / "encoder", list(labels)).save(root / name)
    shutil.copytree(root / "reranker2", root / "unknown")
    (root / "unknown" / "raytower.json").unlink()
    BertModel(tiny_config()).save_pretrained(root / "plain")
    BertForSequenceClassification(tiny_config(num_labels=1)).save_pretrained(root / "one label")
    for name in ("plain", "one label"):
        tiny_tokenizer().save_pretrained(root / name)
    return {place.name: place for place in root.iterdir()}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("encoder", ("encoder",)),
        ("plain", ("encoder",)),
        ("reranker", ("reranker",)),
        ("reranker2", ("reranker",)),
        ("one label", ("reranker",)),
        ("classifier", ("classifier",)),
        ("classifier2", ("classifier",)),
        ("unknown", ("reranker", "classifier")),
    ],
)
def test_the_class_of_a_directory(folders: dict[str, Path], name: str, expected: tuple[str, ...]) -> None:
    assert possible_classes(folders[name]) == expected


LOADERS: dict[str, tuple[Callable[[Path], Any], Callable[[Path], Any]]] = {
    "encoder": (Encoder.load, raytower.load_encoder),
    "reranker": (CrossEncoder.load, raytower.load_reranker),
    "classifier": (TextClassifier.load, raytower.load_classifier),
}


@pytest.mark.parametrize(
    ("wanted", "name", "words"),
    [
        ("encoder", "reranker", "is a reranker (BertForSequenceClassification): it is no encoder, and as one it would"),
        ("encoder", "classifier", "is a classifier (BertForSequenceClassification): it is no encoder"),
        ("encoder", "unknown", "is a reranker or a classifier (BertForSequenceClassification): it is no encoder"),
        ("reranker", "encoder", "is an encoder (BertModel): it is no reranker; commands take it by the key `encoder`"),
        ("reranker", "classifier", "is a classifier (BertForSequenceClassification): it is no reranker; commands"),
        ("reranker", "classifier2", "by the key `classifier`. Name a reranker here, or train one of it with"),
        ("classifier", "encoder", "it is no classifier; commands take it by the key `encoder`. Name a classifier here"),
        ("classifier", "reranker", "it is no classifier; commands take it by the key `reranker`"),
        ("classifier", "reranker2", "`raytower train-classifier`"),
    ],
)  # fmt: skip
def test_the_wrong_class_is_refused(folders: dict[str, Path], wanted: str, name: str, words: str) -> None:
    for load in LOADERS[wanted]:
        with pytest.raises(FormatError) as raised:
            load(folders[name])
        assert words in str(raised.value)


def test_what_may_be_either_loads_as_either(folders: dict[str, Path]) -> None:
    assert CrossEncoder.load(folders["unknown"]).num_labels == 2
    assert TextClassifier.load(folders["unknown"]).num_labels == 2
    assert json.loads((folders["classifier2"] / "raytower.json").read_text())["model_class"] == "classifier"


@pytest.fixture(scope="module")
def index(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    place = tmp_path_factory.mktemp("index") / "index"
    write_version(place, "000001", folders["encoder"])
    return str(place)


# Each command with each key that names a model: the class that it wants, and what else it needs.
_IN_OUT = {"input": "pairs.tsv", "output": "out.tsv"}
COMMANDS: list[tuple[str, str, str, dict[str, Any]]] = [
    ("search", "encoder", "encoder", {"query": "a"}),
    ("search", "reranker", "reranker", {"query": "a"}),
    ("search", "encoder", "encoder", {"input": "lines.txt", "output": "out.tsv"}),
    ("search", "reranker", "reranker", {"input": "lines.txt", "output": "out.tsv"}),
    ("rerank", "reranker", "reranker", _IN_OUT),
    ("embed", "encoder", "encoder", {"text": ["a"]}),
    ("evaluate", "encoder", "encoder", {"queries": "pairs.tsv"}),
    ("evaluate", "reranker", "reranker", {"queries": "pairs.tsv", "encoder": "encoder"}),
    ("tune-fusion", "encoder", "encoder", {"queries": "pairs.tsv", "reranker": "reranker", "store": False}),
    ("tune-fusion", "reranker", "reranker", {"queries": "pairs.tsv"}),
    ("mine", "encoder", "encoder", _IN_OUT),
    ("mine", "teacher", "reranker", {**_IN_OUT, "encoder": "encoder", "format": "scored"}),
    ("mine", "screen.reranker", "reranker", {**_IN_OUT, "encoder": "encoder"}),
    ("classify", "encoder", "encoder", _IN_OUT),
    ("classify", "classifier", "classifier", {**_IN_OUT, "mode": "classifier"}),
    ("similarity", "encoder", "encoder", {**_IN_OUT, "labelled": False}),
    ("similarity", "reranker", "reranker", {**_IN_OUT, "labelled": False}),
    ("encode", "encoder", "encoder", {"input": "lines.txt", "output": "out"}),
    ("export", "encoder", "encoder", {"output": "out"}),
    ("export", "reranker", "reranker", {"output": "out"}),
    ("export", "classifier", "classifier", {"output": "out"}),
    ("index sync", "encoder", "encoder", {"input": "lines.txt"}),
    ("index verify", "encoder", "encoder", {}),
]
_WITHOUT_INDEX = {"rerank", "embed", "similarity", "encode", "export"}


@pytest.mark.parametrize("case", COMMANDS, ids=lambda case: f"{case[0]} {case[1]}")
def test_every_command_refuses_the_wrong_class(
    folders: dict[str, Path], index: str, tmp_path: Path, case: tuple[str, str, str, dict[str, Any]]
) -> None:
    command, key, wanted, more = case
    (tmp_path / "pairs.tsv").write_text("sun 3\tmoon 3\n")
    (tmp_path / "lines.txt").write_text("sun 3\nmoon\n")
    values: dict[str, Any] = {} if command in _WITHOUT_INDEX or key == "classifier" else {"index": index}
    for name, value in more.items():
        if name in ("input", "queries", "output"):
            value = str(tmp_path / value)
        elif name in ("encoder", "reranker"):
            value = str(folders[value])
        values[name] = value
    for other in {"encoder", "reranker", "classifier2"} - {wanted, f"{wanted}2"}:
        with pytest.raises(FormatError) as raised:
            run(command, **{**values, key: str(folders[other])})
        found = other.removesuffix("2")
        assert f"it is no {wanted}" in str(raised.value)
        assert f"by the key `{found}`" in str(raised.value)


@pytest.mark.parametrize("key", ["encoder", "reranker", "classifier"])
def test_a_server_refuses_it_before_it_starts(folders: dict[str, Path], index: str, key: str) -> None:
    for other in {"encoder", "reranker", "classifier2"} - {key, f"{key}2"}:
        config = ServeConfig.model_validate({"index": index, key: str(folders[other])})
        with pytest.raises(FormatError, match=f"it is no {key}"):
            generation_of("default", config)
