"""How the labels of recalled documents become those of a text: by the nearest, or by votes. No torch.

A label is a path in a tree, its levels parted by `##`; results show it with commas, `A##B` as `A,B`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from raytower.errors import InputError


@dataclass(frozen=True, slots=True)
class Prediction:
    """A label as shown, with its score: the cosine of the nearest label text, its share of the votes, or its
    probability."""

    label: str
    score: float


def shown(label: str) -> str:
    """A label path as people read it: `A##B` is `A,B`."""
    return label.replace("##", ",")


def rank_labels(neighbours: Sequence[tuple[str, float]]) -> list[Prediction]:
    """Labels by their nearest text; a label with several texts (descriptions) counts once, by its best one.

    Args:
        neighbours: label and score of each recalled document, best first.
    """
    best: dict[str, float] = {}
    for label, score in neighbours:
        best.setdefault(label, score)
    return [Prediction(label, score) for label, score in best.items()]


def count_votes(neighbours: Sequence[tuple[str, float]], temperature: float) -> list[Prediction]:
    """Labels by their share of the votes, which sum to 1; of equal shares the label with the nearest text leads.

    Args:
        neighbours: label and score of each recalled document, best first.
        temperature: a vote weighs exp(score / temperature).
    """
    if not neighbours:
        return []
    scores = np.array([score for _, score in neighbours], dtype=np.float64)
    weights = np.exp((scores - scores.max()) / temperature)
    shares: dict[str, float] = {}
    for (label, _), weight in zip(neighbours, (weights / weights.sum()).tolist(), strict=True):
        shares[label] = shares.get(label, 0.0) + weight
    # sorted() is stable and the labels stand in the order of their nearest text.
    return [Prediction(label, share) for label, share in sorted(shares.items(), key=lambda item: -item[1])]


def label_of(
    id: str, text: str, metadata: Mapping[str, Any], label_field: str, mode: Literal["labels", "votes"]
) -> str:
    """A document's label: its `label_field` where it has one; in mode labels else its text.

    Raises:
        InputError: a document without the label field in mode votes.
    """
    label = metadata.get(label_field)
    if label is not None:
        return str(label)
    if mode == "labels":
        return text
    raise InputError(
        f"document {id!r} of the index has no {label_field!r}, so it cannot vote; encode a corpus "
        f"with a column {label_field!r}, name another label_field, or set mode to labels"
    )
