"""Turns training rows into what an objective compares: columns of texts, and targets. Pure; no Ray.

| rows         | query | documents                     | also              |
|--------------|-------|-------------------------------|-------------------|
| pairs        | query | document                      | ids               |
| triples      | query | document, negative            |                   |
| candidates   | query | up to `num_documents`         | their scores      |
| scored       | query | document                      | label             |
| labelled     | text  | the label's own text, others  | label             |
| lines        | text  | the same text once more       |                   |

Candidate lists differ in length: shorter ones have no document in the last columns.

Shape legend: B rows of this worker, K document columns, R texts (or pairs) that there are, D embedding dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raytower.data.records import INSTRUCTION
from raytower.models.device import load_tensor
from raytower.objectives.keys import BatchKeys, text_keys
from raytower.objectives.targets import Targets
from raytower.training.batches import Rows


@dataclass(frozen=True)
class TextColumns:
    """The queries of a batch and their document columns, all equally long, with the targets."""

    queries: Sequence[str]
    documents: Sequence[Sequence[str | None]]
    """None where a row has no document in this column; the first column has all."""
    targets: Targets
    instructions: Sequence[str | None] | None = None
    """What each query is asked for, where rows say it."""

    @property
    def present_documents(self) -> list[str]:
        """The documents that there are, column after column."""
        return [text for column in self.documents for text in column if text is not None]

    @property
    def rows_of_texts(self) -> NDArray[np.int64]:
        """(B + R,) the row of each query, and then of each of `present_documents`."""
        rows = [row for column in self.documents for row, text in enumerate(column) if text is not None]
        return np.concatenate([np.arange(len(self.queries)), rows])

    @property
    def asking_queries(self) -> list[str]:
        """The query of each of `present_documents`."""
        return [
            query
            for column in self.documents
            for query, text in zip(self.queries, column, strict=True)
            if text is not None
        ]

    def place(self, values_R: Tensor) -> Tensor:
        """(K, B, …) values (R, …) of `present_documents` in their columns and rows; 0 where there is no document."""
        # 0 1 3 where 4 places hold a document each but the third
        are_there = [text is not None for column in self.documents for text in column]
        places_R = load_tensor(np.flatnonzero(are_there), values_R.device)
        shape = (len(self.documents), len(self.queries), *values_R.shape[1:])
        placed = values_R.new_zeros(shape).flatten(0, 1).index_copy(0, places_R, values_R)
        return placed.reshape(shape)


def without_ties(rows: Rows) -> Rows:
    """Rows without the documents of a candidate list that score as high as its first: right as well, they are no
    negatives. For objectives that take the first document alone for the relevant one."""
    if "scores" not in rows:
        return rows
    kept = [
        [place for place, score in enumerate(scores) if place == 0 or score < scores[0]]
        for scores in rows["scores"]
    ]
    columns = {
        name: [[row[place] for place in places] for row, places in zip(rows[name], kept, strict=True)]
        for name in ("documents", "scores")
    }
    return {**rows, **columns}


def text_columns(
    rows: Rows, num_documents: int | None = None, negatives: Sequence[Sequence[str | None]] = ()
) -> TextColumns:
    """The columns of an encoder objective from rows of any kind.

    Candidates have `num_documents` columns, or as many as the longest of them. `negatives` are further columns.
    """
    queries, documents = _texts(rows, num_documents)
    documents += [list(column) for column in negatives]
    labels = rows["label"] if "text" in rows and "label" in rows else None
    columns = [
        text_keys(column, rows.get("document_id") if number == 0 else None, labels if number == 0 else None)
        for number, column in enumerate(documents)
    ]
    keys = BatchKeys(query=text_keys(queries, rows.get("query_id"), labels), documents=tuple(columns))
    scores = torch.tensor(rows["label"], dtype=torch.float32) if "query" in rows and "label" in rows else None
    present_BK, teacher = None, None
    if "scores" in rows:
        present_BK = torch.tensor([[text is not None for text in column] for column in documents]).T
        filled = [[*row, *[0.0] * (len(documents) - len(row))] for row in rows["scores"]]
        teacher = torch.tensor(filled, dtype=torch.float32)
    targets = Targets(keys=keys, labels_B=scores, teacher_BK=teacher, present_BK=present_BK)
    return TextColumns(queries, documents, targets, rows.get(INSTRUCTION.name))


def query_prefixes(
    instructions: Sequence[str | None] | None, form: str | None, prefix: str
) -> str | list[str]:
    """What stands before the queries of rows: one prefix for all or, where rows say instructions, one for each.

    Args:
        instructions: of each query; of one that is None or blank `prefix` holds.
        form: what an instruction becomes; {} stands for it. None is the instruction alone.
        prefix: of queries without an instruction.
    """
    if instructions is None or not any(text and text.strip() for text in instructions):
        return prefix
    return [(form or "{}").replace("{}", text) if text and text.strip() else prefix for text in instructions]


def _texts(rows: Rows, num_documents: int | None) -> tuple[list[str], list[list[str | None]]]:
    if "documents" in rows:
        width = num_documents or max(len(row) for row in rows["documents"])
        filled = ([*row, *[None] * (width - len(row))] for row in rows["documents"])
        return rows["query"], [list(column) for column in zip(*filled, strict=True)]
    if "text" in rows:
        return rows["text"], [rows["label"] if "label" in rows else rows["text"]]
    return rows["query"], [rows["document"], *([rows["negative"]] if "negative" in rows else [])]


def best_documents(rows: Rows) -> tuple[list[str], list[str]]:
    """The queries of rows of any kind, and of each the document that it is trained to find."""
    if "documents" in rows:
        return rows["query"], [documents[0] for documents in rows["documents"]]
    if "text" in rows:
        return rows["text"], rows["label"] if "label" in rows else rows["text"]
    return rows["query"], rows["document"]


@dataclass(frozen=True)
class JudgedPairs:
    """Pairs of a cross-encoder. Those of a query stand together, the relevant one first.

    list_lengths: pairs of each query. width: the longest list of the run.
    """

    queries: list[str]
    documents: list[str]
    labels: list[float]
    list_lengths: list[int]
    width: int

    @property
    def rows_of_pairs(self) -> NDArray[np.int64]:
        """(R,) the query, counted from 0, of each pair."""
        return np.repeat(np.arange(len(self.list_lengths)), self.list_lengths)

    def as_lists(self, logits_R: Tensor) -> Tensor:
        """(B, K) logits, or labels, (R,) of the pairs, a row for each query; -inf where a shorter list has ended."""
        lengths_B1 = np.array(self.list_lengths)[:, None]
        places_R = load_tensor(np.flatnonzero(np.arange(self.width) < lengths_B1), logits_R.device)
        filled = logits_R.new_full((len(self.list_lengths) * self.width,), -torch.inf)
        return filled.index_copy(0, places_R, logits_R).reshape(-1, self.width)


def judged_pairs(rows: Rows, num_documents: int | None = None) -> JudgedPairs:
    """Rows as pairs for a cross-encoder.

    A pair is relevant; a triple is a relevant and an irrelevant one; candidates keep their scores, and are at most
    `num_documents`.
    """
    if "label" in rows:
        return JudgedPairs(rows["query"], rows["document"], rows["label"], [1] * len(rows["query"]), 1)
    if "scores" in rows:
        lists, scores = rows["documents"], rows["scores"]
    else:
        negatives = [rows["negative"]] if "negative" in rows else []
        lists = [list(texts) for texts in zip(rows["document"], *negatives, strict=True)]
        scores = [[1.0, *[0.0] * len(negatives)]] * len(lists)
    lengths = [len(documents) for documents in lists]
    return JudgedPairs(
        queries=[query for query, length in zip(rows["query"], lengths, strict=True) for _ in range(length)],
        documents=[text for documents in lists for text in documents],
        labels=[float(score) for row in scores for score in row],
        list_lengths=lengths,
        width=num_documents or max(lengths),
    )
