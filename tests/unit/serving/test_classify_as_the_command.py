"""/v1/classify gives what `raytower classify` gives, over one index, with and without tuned settings."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from raytower.errors import InputError
from raytower.serving.calls import ClassifyCall
from raytower.serving.config import CollectionConfig
from raytower.serving.engine import EngineLimits, SearchEngine
from raytower.serving.figures import counted_forwards
from raytower.serving.metrics import Metrics
from raytower.serving.models import ModelPool
from raytower.serving.opening import LocalParts
from raytower.serving.resolve import generation_of
from raytower.serving.work import Deadline
from tests.support.labelled_index import LabelledIndexes, Rows

ROWS: Rows = [
    *[(f"apple lemon {number}", "plants##fruit") for number in range(30)],
    ("river ocean", "water"),
    ("ocean lake", "water##salt"),
    ("tiger lion", "beasts"),
]
ASKED = ["apple lemon 7", "ocean river lake", "tiger", "stone candle"]
DEV: Rows = [("lemon apple", "plants##fruit"), ("lake ocean", "water##salt"), ("lion", "beasts")]


@pytest.fixture
def world(dummy_encoder_dir: Path, tmp_path: Path) -> LabelledIndexes:
    return LabelledIndexes(dummy_encoder_dir, tmp_path)


def _served(index: str, mode: Any, top_k: int, **settings: Any) -> list[list[tuple[str, float]]]:
    async def ask() -> list[list[tuple[str, float]]]:
        forwards = counted_forwards(Metrics("0"))
        try:
            engine = SearchEngine(
                ["default"],
                LocalParts(ModelPool(forwards)),
                limits=EngineLimits(),
                render=lambda collection, call, answer: b"",
            )
            config = CollectionConfig(index=index, classify_modes=("labels", "votes"), **settings)
            generation = generation_of("default", config)
            await engine.prepare(generation)
            engine.activate(generation.id)
            call = ClassifyCall(texts=ASKED, top_k=top_k, mode=mode)
            answer = await engine.classify("default", call, Deadline.after(60_000))
            return [list(row) for row in answer.labels]
        finally:
            forwards.close()

    return asyncio.run(ask())


@pytest.mark.parametrize("mode", ["labels", "votes"])
def test_the_server_labels_as_the_command(world: LabelledIndexes, mode: str) -> None:
    """Of 33 documents 30 have one label: by the first 20 documents the server knew of no other."""
    index = world.index(ROWS)
    _, lines = world.classify(index, [(text, "water") for text in ASKED], mode=mode)
    served = _served(index, mode, top_k=10)
    for line, labels in zip(lines, served, strict=True):
        assert [name for name, _ in labels] == [name for name, _ in line["labels"]]
        assert [score for _, score in labels] == pytest.approx([s for _, s in line["labels"]], abs=1e-5)
    if mode == "labels":
        assert {len(labels) for labels in served} == {4}


@pytest.mark.parametrize("mode", ["labels", "votes"])
def test_the_server_uses_tuned_settings_as_the_command(world: LabelledIndexes, mode: str) -> None:
    index = world.index(ROWS)
    tuned = world.tune(index, DEV, mode=mode, folds=2, max_k=5, calibration="temperature", min_accuracy=0.3)
    asked = [(text, "water") for text in ASKED]
    _, lines = world.classify(index, asked, mode=mode, tuned=tuned["output"])
    served = _served(index, mode, top_k=10, classify_tuned=(tuned["output"],))
    for line, labels in zip(lines, served, strict=True):
        expected = line["labels"] if line["label"] is not None else []
        assert [name for name, _ in labels] == [name for name, _ in expected]
        assert [score for _, score in labels] == pytest.approx([s for _, s in expected], abs=1e-4)


def test_settings_of_a_way_that_is_not_served_are_refused(world: LabelledIndexes) -> None:
    index = world.index(ROWS)
    tuned = world.tune(index, DEV, mode="votes", folds=2, max_k=5)["output"]
    config = CollectionConfig(index=index, classify_modes=("labels",), classify_tuned=(tuned,))
    with pytest.raises(InputError, match="was tuned for mode votes, and the collection does not classify"):
        generation_of("default", config)
    twice = CollectionConfig(index=index, classify_modes=("votes",), classify_tuned=(tuned, tuned))
    with pytest.raises(InputError, match="two files that were tuned for mode votes"):
        generation_of("default", twice)
    other = CollectionConfig(
        index=index, classify_modes=("votes",), classify_tuned=(tuned,), label_field="text"
    )
    with pytest.raises(InputError, match="was tuned for label_field 'label', and this one is 'text'"):
        generation_of("default", other)
