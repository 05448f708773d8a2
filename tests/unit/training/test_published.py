"""Folders as trainings publish them: what others load from them, and that they can be uploaded as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray.train
from huggingface_hub import ModelCard
from sentence_transformers import CrossEncoder as PeerCrossEncoder
from sentence_transformers import SentenceTransformer
from transformers import pipeline

from raytower.config import make_config
from raytower.models.cross_encoder import CrossEncoder, CrossScorer
from raytower.models.encoder import Encoder
from raytower.models.forward import ForwardEngine
from raytower.models.text_classifier import TextClassifier
from raytower.storage import Location
from raytower.training.classifier import ClassifierTask
from raytower.training.config import TrainClassifierConfig, TrainRerankerConfig, TrainRetrieverConfig
from raytower.training.model_card import model_card
from raytower.training.reranker import RerankerTask
from raytower.training.retriever import RetrieverTask
from raytower.training.runner import _publish
from tests.support.tiny_training import write_labelled, write_pairs, write_scored

TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}
EVERYWHERE = {"README.md", "config.json", "model.safetensors", "raytower.json", *TOKENIZER}
ENCODER = {
    *EVERYWHERE,
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "1_Pooling/config.json",
}
TEXTS = ["what is aaa 0?", "bbbbb is 9"]


def publish(kind: str, start: Path, place: Path, **changes: Any) -> Path:
    """A model of `kind` from `start`, saved in a checkpoint as its task saves it, and published from there."""
    config_class, task_class, write = {
        "encoder": (TrainRetrieverConfig, RetrieverTask, write_pairs),
        "reranker": (TrainRerankerConfig, RerankerTask, write_scored),
        "classifier": (TrainClassifierConfig, ClassifierTask, write_labelled),
    }[kind]
    output = place / "published"
    values = {
        "model": str(start),
        "train": str(write(place / "rows.tsv", 16)),
        "output": str(output),
        "batch_size": 8,
        "max_length": 32,
        **changes,
    }
    config: Any = make_config(config_class, values)
    task: Any = task_class.prepare(config, task_class.survey(config))
    (place / "checkpoint").mkdir()
    task.save(task.build(None).eval(), place / "checkpoint" / "model", {})
    figures = {"steps": 2, "seconds": 1.0, "best": None, "best_step": 2}
    info = {"config": config.model_dump(mode="json"), "figures": figures}
    _publish(
        ray.train.Checkpoint.from_directory(str(place / "checkpoint")),
        Location.of(output),
        info,
        model_card(config, figures, []),
    )
    return output


def check_folder(folder: Path, files: set[str], pipeline_tag: str) -> None:
    """All of these files and no others; none but raytower.json says where it was made; the card is one."""
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert found == files
    for name in found - {"raytower.json"}:
        if not name.endswith(".safetensors"):
            assert str(folder.parent.parent) not in (folder / name).read_text(encoding="utf-8"), name
    assert json.loads((folder / "raytower.json").read_text(encoding="utf-8"))["figures"]["steps"] == 2
    card = ModelCard.load(folder / "README.md")
    data = card.data.to_dict()
    assert data["pipeline_tag"] == pipeline_tag
    assert len(data["tags"]) == len(set(data["tags"]))
    assert all(value for value in data.values())


@pytest.mark.parametrize(
    ("changes", "more"),
    [
        ({}, set()),
        (
            {"lora": {"rank": 2}, "projection_dim": 8, "query_prefix": "q: "},
            {"2_Dense/config.json", "2_Dense/model.safetensors"},
        ),
    ],
    ids=["plain", "lora and projection"],
)
def test_an_encoder(dummy_encoder_dir: Path, tmp_path: Path, changes: dict[str, Any], more: set[str]) -> None:
    folder = publish("encoder", dummy_encoder_dir, tmp_path, **changes)
    check_folder(folder, ENCODER | more, "sentence-similarity")
    engine = ForwardEngine(Encoder.load(folder))
    peer = SentenceTransformer(str(folder), device="cpu")
    ours = engine.encode(TEXTS, engine.encoder.prefix_for("query"))
    assert np.abs(peer.encode_query(TEXTS) - ours).max() < 1e-6


def test_a_reranker(dummy_encoder_dir: Path, tmp_path: Path) -> None:
    folder = publish("reranker", dummy_encoder_dir, tmp_path)
    check_folder(folder, EVERYWHERE, "text-ranking")
    ours = CrossScorer(CrossEncoder.load(folder)).score([TEXTS[0]], [TEXTS[1]])
    peer = PeerCrossEncoder(str(folder), device="cpu").predict([(TEXTS[0], TEXTS[1])], activation_fn=None)
    assert 1 / (1 + np.exp(-ours[0])) == pytest.approx(float(peer[0]), abs=1e-6)


def test_a_classifier(dummy_encoder_dir: Path, tmp_path: Path) -> None:
    folder = publish("classifier", dummy_encoder_dir, tmp_path)
    check_folder(folder, EVERYWHERE, "text-classification")
    found = pipeline("text-classification", model=str(folder), device="cpu")(TEXTS)
    assert {item["label"] for item in found} <= set(TextClassifier.load(folder).labels)
