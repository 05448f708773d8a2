"""How the labels of recalled documents, or a classifier's logits, become the labels of a text. No torch.

A label is what the data says, and is compared as it stands. A path in a tree has its levels parted by `##`, which stays
in every result; what shows labels to people may write `A##B` as it likes. `A,B` is another label.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raytower.annotation.classify_settings import VoteKind
from raytower.data.plain_labels import plain_label
from raytower.errors import InputError
from raytower.models.class_ranks import rank_classes

LEVEL_MARK = "##"
# Where the documents that were recalled first have too few labels, so many times as many are asked for; of several
# texts together at most so many.
WIDER = 4
DOCUMENTS_AT_ONCE = 65_536


@dataclass(frozen=True, slots=True)
class Prediction:
    """A label, with its score: the cosine of the nearest label text, its share of the votes, or its probability."""

    label: str
    score: float


def rank_labels(neighbours: Sequence[tuple[str, float]]) -> list[Prediction]:
    """Labels by their nearest text; a label with several texts (descriptions) counts once, by its best one.

    Args:
        neighbours: label and score of each recalled document, best first.
    """
    best: dict[str, float] = {}
    for label, score in neighbours:
        best.setdefault(label, score)
    return [Prediction(label, score) for label, score in best.items()]


def count_votes(
    neighbours: Sequence[tuple[str, float]], temperature: float, kind: VoteKind = "similarity"
) -> list[Prediction]:
    """Labels by their share of the votes, which sum to 1; of equal shares the label with the nearest text leads.

    Args:
        neighbours: label and score of each recalled document, best first.
        temperature: of kind similarity.
        kind: what a vote weighs. similarity: exp(score / temperature); uniform: 1; rank: 1 / rank.
    """
    if not neighbours:
        return []
    weights = vote_weights(np.array([score for _, score in neighbours], dtype=np.float64), temperature, kind)
    shares: dict[str, float] = {}
    for (label, _), weight in zip(neighbours, weights.tolist(), strict=True):
        shares[label] = shares.get(label, 0.0) + weight
    # sorted() is stable and the labels stand in the order of their nearest text. Rounded, since one share summed up in
    # two orders is two floats.
    ranked = sorted(shares.items(), key=lambda item: -round(item[1], 12))
    return [Prediction(label, share) for label, share in ranked]


def vote_weights(scores: NDArray[np.float64], temperature: float, kind: VoteKind) -> NDArray[np.float64]:
    """What each neighbour's vote weighs, (K,) of scores (K,), best first; they sum to 1. See `count_votes`."""
    if kind == "uniform":
        weights = np.ones(len(scores))
    elif kind == "rank":
        weights = 1 / np.arange(1, len(scores) + 1)
    else:
        weights = np.exp((scores - scores.max()) / temperature)
    return weights / weights.sum()


def label_logits(labels: Sequence[str], logits: NDArray[np.float32], depth: int) -> list[list[Prediction]]:
    """The first `depth` of a classifier's C labels by falling probability, from its logits (N, C).

    Raises:
        InputError: a logit that is infinite or no number, which has no probability.
    """
    bad = np.flatnonzero(~np.isfinite(logits).all(axis=1))
    if len(bad):
        raise InputError(
            f"the classifier gives text number {bad[0]} the logits {logits[bad[0]][:5].tolist()}, which have no "
            "probabilities; compute in float32, or check the weights"
        )
    names, probabilities = rank_classes(labels, logits, depth)
    return [
        [Prediction(label, score) for label, score in zip(row, scores, strict=True)]
        for row, scores in zip(names, probabilities.tolist(), strict=True)
    ]


def label_of(
    id: str, text: str, metadata: Mapping[str, Any], label_field: str, mode: Literal["labels", "votes"]
) -> str:
    """A document's label: its `label_field` where it has one; in mode labels else its text. In the form that rows have.

    Raises:
        InputError: a document without the label field in mode votes.
    """
    label = metadata.get(label_field)
    if label is not None:
        # Rows write true as 1: a boolean is refused there, and that is the remedy.
        plain = int(label) if isinstance(label, bool) else label
        return plain_label(plain if isinstance(plain, (str, int, float)) else str(plain))
    if mode == "labels":
        return plain_label(text)
    raise InputError(
        f"document {id!r} of the index has no {label_field!r}, so it cannot vote; encode a corpus "
        f"with a column {label_field!r}, name another label_field, or set mode to labels"
    )


def count_labels(batches: Iterable[pa.RecordBatch], label_field: str, at_most: int) -> int:
    """How many labels documents have in mode labels, counted up to `at_most`, which is all that memory holds.

    Args:
        batches: with id, text and, where documents have it, `label_field`.
    """
    labels: set[str] = set()
    for batch in batches:
        for row in batch.to_pylist():
            labels.add(label_of(row["id"], row["text"], row, label_field, "labels"))
            if len(labels) >= at_most:
                return at_most
    return len(labels)


def needs_more(found: Sequence[Sequence[tuple[str, float]]], num_labels: int) -> list[int]:
    """The texts among whose neighbours, labels and scores, there are fewer than `num_labels` labels."""
    return [row for row, each in enumerate(found) if len({label for label, _ in each}) < num_labels]


def num_levels(label: str) -> int:
    """Levels of a label: 3 for `A##B##C`."""
    return label.count(LEVEL_MARK) + 1


def at_level(label: str, level: int) -> str:
    """The path of a label down to `level`, from 1; the whole of a shorter one."""
    return LEVEL_MARK.join(label.split(LEVEL_MARK)[:level])


def tree_scores(ranked: Sequence[Prediction], are_shares: bool) -> list[list[Prediction]]:
    """For each level of the tree its paths by falling score; a parent's is never below that of a child.

    A path scores what the labels at or below it do: together where scores are shares of one whole, and else as the best
    of them. So with shares .3 of `A##B`, .3 of `A##C` and .4 of `D##E`, A has .6 and leads D, although `D##E` is the
    first label.

    Args:
        ranked: the labels of a text. Labels of unequal depth may be among them: `A` beside `A##B` adds to A alone.
        are_shares: whether scores are parts of one whole: votes and probabilities are, cosines are not.
    """
    levels: list[dict[str, float]] = []
    for item in ranked:
        for level in range(1, num_levels(item.label) + 1):
            if level > len(levels):
                levels.append({})
            path, scores = at_level(item.label, level), levels[level - 1]
            if are_shares:
                scores[path] = scores.get(path, 0.0) + item.score
            else:
                scores[path] = max(scores.get(path, item.score), item.score)
    return [
        [Prediction(path, score) for path, score in sorted(scores.items(), key=lambda pair: -pair[1])]
        for scores in levels
    ]
