"""Ten of the 67 disciplines hidden: their names, or five texts of each, make them labels. Real texts and encoder."""

from __future__ import annotations

import random
from collections import defaultdict
from pathlib import Path

import pytest

from raytower.config import make_config
from raytower.index.change import add_to_index, delete_from_index
from raytower.index.change_config import IndexAddConfig, IndexDeleteConfig
from tests.conftest import SHARED
from tests.support.labelled_index import LabelledIndexes, Rows

pytestmark = pytest.mark.shared

DATA = SHARED / "data" / "csl_disciplines"
NUM_HIDDEN, NUM_EXAMPLES, NUM_ASKED = 10, 5, 2


def _rows(name: str) -> Rows:
    lines = (DATA / name).read_text(encoding="utf-8").splitlines()
    return [(text[:60], label) for text, label in (line.rsplit("\t", 1) for line in lines)]


def _some(rows: Rows, count: int) -> dict[str, list[str]]:
    """The first texts of each label."""
    texts: defaultdict[str, list[str]] = defaultdict(list)
    for text, label in rows:
        if len(texts[label]) < count:
            texts[label].append(text)
    return texts


@pytest.mark.parametrize("mode", ["labels", "votes"])
def test_hidden_labels_work_as_soon_as_they_are_in_the_index(tmp_path: Path, mode: str) -> None:
    world = LabelledIndexes(SHARED / "models" / "e5-small-zh-en", tmp_path)
    labels = (DATA / "label.txt").read_text(encoding="utf-8").split()
    hidden = random.Random(1).sample(labels, NUM_HIDDEN)
    asked = [(text, label) for label, own in _some(_rows("dev.txt"), NUM_ASKED).items() for text in own]
    asked = [(text, label) for text, label in asked if label in hidden]
    if mode == "labels":
        documents = [(label.replace("##", " "), label) for label in labels]
        # Of zero-shot encoders the nearest of 67 names is right for about two in five texts; chance is 1.5 %.
        least = 0.2
    else:
        examples = _some(_rows("train.txt"), NUM_EXAMPLES)
        known = [label for label in labels if label not in hidden][:8]
        documents = [(text, label) for label in [*hidden, *known] for text in examples[label]]
        least = 0.3
    index = world.index([row for row in documents if row[1] not in hidden])
    before, _ = world.classify(index, asked, mode=mode)
    assert (before["accuracy"], before["labels_missing"]) == (0, len(asked))
    new = world.embed([row for row in documents if row[1] in hidden], first=10_000)
    add_to_index(make_config(IndexAddConfig, {"index": index, "embeddings": new}))
    after, _ = world.classify(index, asked, mode=mode)
    assert after["labels_missing"] == 0
    assert after["accuracy"] >= least
    gone = {"index": index, "filter": {"label": {"$in": hidden}}}
    delete_from_index(make_config(IndexDeleteConfig, gone))
    again, lines = world.classify(index, asked, mode=mode)
    assert (again["accuracy"], again["labels_missing"]) == (0, len(asked))
    assert not {label for line in lines for label, _ in line["labels"]} & set(hidden)
