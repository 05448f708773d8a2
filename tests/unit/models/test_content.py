"""The hash of a model directory's files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from raytower.models.content import hash_model


def change_json(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_what_maps_texts_counts_and_what_names_the_model_does_not(
    dummy_encoder_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(dummy_encoder_dir, folder)
    first = hash_model(str(folder))
    assert first == hash_model(str(dummy_encoder_dir)), "a copy is the same model"
    outside: dict[str, Any] = {
        "_name_or_path": "/elsewhere",
        "dtype": "bfloat16",
        "transformers_version": "9.9",
    }
    change_json(folder / "config.json", **outside)
    for name in ("README.md", "README.txt", ".gitattributes", ".DS_Store", "picture.png"):
        (folder / name).write_text("words")
    (folder / ".hidden.json").write_text("{}")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "config.json").write_text("{}")
    change_json(folder / "raytower.json", fingerprint="0", history=[1])
    assert hash_model(str(folder)) == first
    seen = [first]
    for file, values in (
        ("config.json", {"layer_norm_eps": 1e-3}),
        ("tokenizer_config.json", {"model_max_length": 32}),
        ("1_Pooling/config.json", {"pooling_mode_cls_token": True}),
        ("sentence_bert_config.json", {"max_seq_length": 8}),
        ("config_sentence_transformers.json", {"prompts": {"query": "q: "}}),
        ("raytower.json", {"max_length": 8}),
    ):
        change_json(folder / file, **values)
        seen.append(hash_model(str(folder)))
    for name in ("vocab.txt", "merges.txt"):
        (folder / name).write_text("a\n")
        seen.append(hash_model(str(folder)))
    assert len(set(seen)) == len(seen)
