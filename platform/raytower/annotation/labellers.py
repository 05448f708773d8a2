"""Three ways to label a text: by the nearest label texts, by votes of the nearest labelled texts, by a classifier.

Labels are compared and written as the data has them; see `labels`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from raytower.annotation.classify_settings import VoteKind
from raytower.annotation.labels import (
    DOCUMENTS_AT_ONCE,
    WIDER,
    Prediction,
    count_labels,
    count_votes,
    label_logits,
    label_of,
    needs_more,
    rank_labels,
)
from raytower.data.plain_labels import plain_label
from raytower.index.reader import Index
from raytower.index.table import DocumentTable
from raytower.models.forward import ForwardEngine
from raytower.models.text_classifier import ClassifierEngine
from raytower.retrieval.lookup import find_in_table
from raytower.retrieval.retriever import Candidate, index_recall


class KnownLabels(Protocol):
    """The labels that can be given."""

    def missing(self, labels: Collection[str]) -> set[str]:
        """Those of `labels` that never are."""


class Labeller(KnownLabels, Protocol):
    """What the job asks of each way."""

    @property
    def figures(self) -> dict[str, Any]:
        """What was used, for the job's result."""

    def label(self, texts: Sequence[str]) -> list[list[Prediction]]:
        """The ranked labels of each text, best first."""


@dataclass(frozen=True, slots=True)
class LabelsOfDocuments:
    """Those of an index's documents, which a document has in `label_field` or, without such a column, as its text."""

    table: DocumentTable
    label_field: str

    def missing(self, labels: Collection[str]) -> set[str]:
        has_field = self.label_field in self.table.schema.names
        column = self.label_field if has_field else "text"
        wanted = set(labels)
        wanted -= find_in_table(self.table, column, wanted, "id").keys()
        if wanted:  # documents may write them otherwise (1.0), or have one in their text alone
            for batch in self.table.scan(["id", "text", *([self.label_field] if has_field else [])]):
                if not wanted:
                    break
                for row in batch.to_pylist():
                    wanted.discard(label_of(row["id"], row["text"], row, self.label_field, "labels"))
        return wanted


class LabelsOfClassifier:
    """Those of a trained classifier."""

    def __init__(self, names: Sequence[str]) -> None:
        # In the form in which rows bring theirs: a model that others trained may call a class 1.0.
        self.names = [plain_label(name) for name in names]

    def missing(self, labels: Collection[str]) -> set[str]:
        return set(labels) - set(self.names)


@dataclass(frozen=True, slots=True)
class Neighbours:
    """What an index says of a text."""

    voters: Sequence[tuple[str, float]]
    """Label and score of each document that counts, best first."""
    nearest: str | None
    """The text of the first of them; None without any."""
    same: Sequence[str]
    """Labels of the documents with the very text, where those do not count."""


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
        votes: VoteKind = "similarity",
        temperature: float = 1.0,
        prefix: str = "",
        leave_out_same: bool = False,
    ) -> None:
        """`prefix` is put before each text; the rest as in ClassifyConfig.

        Args:
            depth: in mode votes the neighbours that vote, in mode labels the labels that are ranked, if the index has
                as many: documents are recalled until there are so many labels among them.
            leave_out_same: documents with the very text of a text do not count.
        """
        self._engine = engine
        self._index = index
        self._recall = index_recall(index)
        self._mode = mode
        self._label_field = label_field
        self._votes = votes
        self._temperature = temperature
        self._prefix = prefix
        self._leave_out_same = leave_out_same
        self._depth = depth if mode == "votes" else self._count_labels(depth)

    @property
    def figures(self) -> dict[str, Any]:
        return {"index_version": self._index.version}

    def label(self, texts: Sequence[str]) -> list[list[Prediction]]:
        """Raises InputError: a document without the label field in mode votes."""
        return [self.rank(found.voters) for found in self.neighbours(texts)]

    def rank(self, voters: Sequence[tuple[str, float]]) -> list[Prediction]:
        """The labels of what `neighbours` gives, best first."""
        if self._mode == "labels":
            return rank_labels(voters)[: self._depth]
        return count_votes(voters, self._temperature, self._votes)

    def neighbours(self, texts: Sequence[str]) -> list[Neighbours]:
        """Of each text as many documents as it takes. Raises InputError: as `label`."""
        vectors_ND = self._engine.encode(texts, self._prefix)
        depth, num_documents = max(self._depth, 1), self._index.num_rows
        found = [
            self._weigh(text, row) for text, row in zip(texts, self._recall(vectors_ND, depth), strict=True)
        ]
        while depth < num_documents and (short := self._short(found)):
            depth = min(WIDER * depth, num_documents)
            # Where few labels have most of the documents, one text may need them all: not those of many texts at once.
            at_once = max(1, DOCUMENTS_AT_ONCE // depth)
            for start in range(0, len(short), at_once):
                rows = short[start : start + at_once]
                for row, candidates in zip(rows, self._recall(vectors_ND[rows], depth), strict=True):
                    found[row] = self._weigh(texts[row], candidates)
        return found

    def missing(self, labels: Collection[str]) -> set[str]:
        return LabelsOfDocuments(self._index.table, self._label_field).missing(labels)

    def _short(self, found: Sequence[Neighbours]) -> list[int]:
        """The texts that need more documents."""
        if self._mode == "votes":
            return [row for row, each in enumerate(found) if len(each.voters) < self._depth]
        return needs_more([each.voters for each in found], self._depth)

    def _weigh(self, text: str, candidates: Sequence[Candidate]) -> Neighbours:
        voters: list[tuple[str, float]] = []
        same: list[str] = []
        nearest = None
        for item in candidates:
            label = label_of(item.id, item.text, item.metadata, self._label_field, self._mode)
            if self._leave_out_same and item.text.strip() == text.strip():
                same.append(label)
                continue
            voters.append((label, item.score))
            nearest = item.text if nearest is None else nearest
        return Neighbours(voters if self._mode == "labels" else voters[: self._depth], nearest, same)

    def _count_labels(self, at_most: int) -> int:
        has_field = self._label_field in self._index.table.schema.names
        columns = ["id", "text", *([self._label_field] if has_field else [])]
        return count_labels(self._index.batches(columns), self._label_field, at_most)


class ClassifierLabeller:
    """Labels by a trained classifier, the first `depth` of them by probability."""

    def __init__(self, engine: ClassifierEngine, depth: int) -> None:
        self._engine = engine
        self._labels = LabelsOfClassifier(engine.labels)
        self._depth = depth

    @property
    def figures(self) -> dict[str, Any]:
        return {"fingerprint": self._engine.fingerprint}

    def label(self, texts: Sequence[str]) -> list[list[Prediction]]:
        return label_logits(self._labels.names, self._engine.logits(texts), self._depth)

    def missing(self, labels: Collection[str]) -> set[str]:
        return self._labels.missing(labels)
