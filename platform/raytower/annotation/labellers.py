"""Three ways to label a text: by the nearest label texts, by votes of the nearest labelled texts, by a classifier.

A label is what the data says, compared as it stands. A path in a tree has its levels parted by `##`, which stays in
every result; what shows labels to people may write `A##B` as they like. `VectorLabeller` and `label_logits` take what
a model has computed, so that a server labels as `raytower classify` does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from raytower.errors import InputError
from raytower.index.reader import Index
from raytower.models.forward import ForwardEngine
from raytower.models.text_classifier import ClassifierEngine, rank_classes
from raytower.retrieval.lookup import find_documents
from raytower.retrieval.retriever import Candidate, Vectors, index_recall


@dataclass(frozen=True, slots=True)
class Prediction:
    """A label, with its score: the cosine of the nearest label text, its share of the votes, or its probability."""

    label: str
    score: float


class Labeller(Protocol):
    """What the job asks of each way."""

    @property
    def figures(self) -> dict[str, Any]:
        """What was used, for the job's result."""

    def label(self, texts: Sequence[str]) -> list[list[Prediction]]:
        """The ranked labels of each text, best first."""

    def count_missing(self, label_counts: Mapping[str, int]) -> int:
        """Rows, of so many for each label, whose label could never have been predicted."""


@dataclass(frozen=True, kw_only=True)
class VectorLabeller:
    """Labels of texts by their vectors, from an opened index; safe for threads, as the index is.

    A document's label is its `label_field` where it has one; in mode labels else its text.
    """

    index: Index
    mode: Literal["labels", "votes"]
    depth: int
    """Documents that are recalled for each text: in mode labels those whose labels are ranked, in mode votes voters."""
    label_field: str = "label"
    temperature: float = 0.05

    def label(self, vectors: Vectors) -> list[list[Prediction]]:
        """The ranked labels of each of some query vectors, float32 (N, D), best first.

        Raises:
            InputError: vectors that the index does not take, or in mode votes a document without the label field.
        """
        if not len(vectors):
            return []
        return [self._rank(candidates) for candidates in index_recall(self.index)(vectors, self.depth)]

    @property
    def label_column(self) -> str:
        """The column that labels come from."""
        return self.label_field if self.label_field in self.index.table.schema.names else "text"

    def _rank(self, candidates: Sequence[Candidate]) -> list[Prediction]:
        neighbours = [(self._label_of(item), item.score) for item in candidates]
        return rank_labels(neighbours) if self.mode == "labels" else count_votes(neighbours, self.temperature)

    def _label_of(self, item: Candidate) -> str:
        label = item.metadata.get(self.label_field)
        if label is not None:
            return str(label)
        if self.mode == "labels":
            return item.text
        raise InputError(
            f"document {item.id!r} of the index has no {self.label_field!r}, so it cannot vote; encode a corpus "
            f"with a column {self.label_field!r}, name another label_field, or set mode to labels"
        )


class IndexLabeller:
    """Labels by retrieval: encodes texts, and labels their vectors."""

    def __init__(self, engine: ForwardEngine, labeller: VectorLabeller, prefix: str) -> None:
        """`prefix` is put before each text."""
        self._engine = engine
        self._labeller = labeller
        self._prefix = prefix

    @property
    def figures(self) -> dict[str, Any]:
        return {"index_version": self._labeller.index.version}

    def label(self, texts: Sequence[str]) -> list[list[Prediction]]:
        """Raises InputError: a document without the label field in mode votes."""
        return self._labeller.label(self._engine.encode(texts, self._prefix))

    def count_missing(self, label_counts: Mapping[str, int]) -> int:
        column = self._labeller.label_column
        return _count_absent(
            label_counts, set(find_documents(self._labeller.index, column, set(label_counts), "id"))
        )


class ClassifierLabeller:
    """Labels by a trained classifier, the first `depth` of them by probability."""

    def __init__(self, engine: ClassifierEngine, depth: int) -> None:
        self._engine = engine
        self._depth = depth

    @property
    def figures(self) -> dict[str, Any]:
        return {"fingerprint": self._engine.fingerprint}

    def label(self, texts: Sequence[str]) -> list[list[Prediction]]:
        return label_logits(self._engine.labels, self._engine.logits(texts), self._depth)

    def count_missing(self, label_counts: Mapping[str, int]) -> int:
        return _count_absent(label_counts, set(self._engine.labels))


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


def _count_absent(label_counts: Mapping[str, int], present: set[str]) -> int:
    return sum(count for label, count in label_counts.items() if label not in present)
