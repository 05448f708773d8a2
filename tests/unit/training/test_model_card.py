"""README.md of a trained model, as a hub reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from raytower.config import make_config
from raytower.training.config import TrainClassifierConfig, TrainRerankerConfig, TrainRetrieverConfig
from raytower.training.model_card import model_card

FIGURES = {"steps": 40, "seconds": 12.5, "best": 0.75, "best_step": 20}
HISTORY = [{"step": 20 + 10 * number, "recall@10": 0.75 - number / 100} for number in range(30)]


def card_of(kind: Any, history: Any = (), **changes: Any) -> tuple[str, ModelCard]:
    values = {
        "model": "org/base@main",
        "train": "/secret/rows.tsv",
        "output": "/secret/place/my-model",
        **changes,
    }
    text = model_card(make_config(kind, values), FIGURES, history)
    assert "secret" not in text
    card = ModelCard(text)
    assert card.text.startswith("\n# my-model\n") or card.text.startswith("# my-model\n")
    return text, card


@pytest.mark.parametrize(
    ("kind", "task", "library", "used"),
    [
        (
            TrainRetrieverConfig,
            "sentence-similarity",
            "sentence-transformers",
            'SentenceTransformer("my-model")',
        ),
        (TrainRerankerConfig, "text-ranking", "sentence-transformers", 'CrossEncoder("my-model")'),
        (
            TrainClassifierConfig,
            "text-classification",
            "transformers",
            'pipeline("text-classification", "my-model")',
        ),
    ],
)
def test_a_hub_reads_what_it_is_and_where_it_comes_from(
    kind: Any, task: str, library: str, used: str
) -> None:
    text, card = card_of(kind)
    assert (card.data.pipeline_tag, card.data.library_name, card.data.base_model) == (
        task,
        library,
        "org/base",
    )
    assert used in text
    assert "[org/base@main](https://huggingface.co/org/base)" in text


def test_settings_and_measurements_are_tables() -> None:
    """30 measurements: the last 20, and the published one before them."""
    text, _ = card_of(
        TrainRetrieverConfig,
        HISTORY,
        objective={"name": "in_batch_negatives", "scale": 30},
        lora={"rank": 4},
    )
    for line in (
        "| objective | in_batch_negatives |",
        "| objective.scale | 30.0 |",
        "| lora.rank | 4 |",
        "| steps | 40 |",
    ):
        assert line in text
    measured = [line for line in text.partition("## Dev metrics")[2].splitlines() if line.startswith("| ")]
    assert measured[0] == "| step | recall@10 |"
    assert measured[2] == "| 20 (published) | 0.7500 |"
    assert measured[3] == "| 120 | 0.6500 |"
    assert len(measured) == 2 + 1 + 20


def test_a_directory_of_this_machine_is_not_named() -> None:
    text, card = card_of(TrainRetrieverConfig, model="/secret/start")
    assert card.data.base_model is None
    assert "Trained from a model directory by" in text
    assert card_of(TrainRetrieverConfig, model="./start")[1].data.base_model is None


def test_a_folder_that_looks_like_a_hub_id_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`runs/encoder` on a hub would be somebody else's model."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "encoder").mkdir(parents=True)
    text, card = card_of(TrainRetrieverConfig, model="runs/encoder")
    assert card.data.base_model is None
    assert "huggingface.co" not in text
    assert card_of(TrainRetrieverConfig, model="runs/other")[1].data.base_model == "runs/other"
