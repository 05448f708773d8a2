"""Three ways to label a text: by the nearest label texts, by votes of the nearest labelled texts, by a classifier.

Labels are compared and written as the data has them; see `labels`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

from raytower.annotation.labels import Prediction, count_votes, label_logits, label_of, rank_labels
from raytower.data.plain_labels import plain_label
from raytower.index.reader import Index
from raytower.models.forward import ForwardEngine
from raytower.models.text_classifier import ClassifierEngine
from raytower.retrieval.lookup import find_documents
from raytower.retrieval.retriever import Candidate, index_recall


class Labeller(Protocol):
    """What the job asks of each way."""

    @property
    def figures(self) -> dict[str, Any]:
        """What was used, for the job's result."""

    def label(self, texts: Sequence[str]) -> list[list[Prediction]]:
        """The ranked labels of each text, best first."""

    def count_missing(self, label_counts: Mapping[str, int]) -> int:
        """Rows, of so many for each label, whose label could never have been predicted."""


class IndexLabeller:
    """Labels by retrieval. A document's label is its `label_field` where it has one; in mode labels else its text."""

    def __init__(
        self,
        engine: ForwardEngine,
        index: Index,
        *,
        mode: Literal["labels", "votes"],
        depth: int,
        label_field: str,
        temperature: float,
        prefix: str,
    ) -> None:
        """`depth` documents are recalled for each text; `prefix` is put before it; the rest as in ClassifyConfig."""
        self._engine = engine
        self._index = index
        self._recall = index_recall(index)
        self._mode = mode
        self._depth = depth
        self._label_field = label_field
        self._temperature = temperature
        self._prefix = prefix

    @property
    def figures(self) -> dict[str, Any]:
        return {"index_version": self._index.version}

    def label(self, texts: Sequence[str]) -> list[list[Prediction]]:
        """Raises InputError: a document without the label field in mode votes."""
        recalled = self._recall(self._engine.encode(texts, self._prefix), self._depth)
        return [self._rank(candidates) for candidates in recalled]

    def count_missing(self, label_counts: Mapping[str, int]) -> int:
        column = self._label_field if self._label_field in self._index.table.schema.names else "text"
        return _count_absent(label_counts, set(find_documents(self._index, column, set(label_counts), "id")))

    def _rank(self, candidates: Sequence[Candidate]) -> list[Prediction]:
        neighbours = [
            (label_of(item.id, item.text, item.metadata, self._label_field, self._mode), item.score)
            for item in candidates
        ]
        return (
            rank_labels(neighbours) if self._mode == "labels" else count_votes(neighbours, self._temperature)
        )


class ClassifierLabeller:
    """Labels by a trained classifier, the first `depth` of them by probability."""

    def __init__(self, engine: ClassifierEngine, depth: int) -> None:
        self._engine = engine
        # In the form in which rows bring theirs: a model that others trained may call a class 1.0.
        self._labels = [plain_label(label) for label in engine.labels]
        self._depth = depth

    @property
    def figures(self) -> dict[str, Any]:
        return {"fingerprint": self._engine.fingerprint}

    def label(self, texts: Sequence[str]) -> list[list[Prediction]]:
        return label_logits(self._labels, self._engine.logits(texts), self._depth)

    def count_missing(self, label_counts: Mapping[str, int]) -> int:
        return _count_absent(label_counts, set(self._labels))


def _count_absent(label_counts: Mapping[str, int], present: set[str]) -> int:
    return sum(count for label, count in label_counts.items() if label not in present)
