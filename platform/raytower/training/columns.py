"""Turns training rows into what an objective compares: columns of texts, and targets. Pure; no Ray.

| rows         | query | documents                     | also              |
|--------------|-------|-------------------------------|-------------------|
| pairs        | query | document                      | ids               |
| triples      | query | document, negative            |                   |
| candidates   | query | the first `num_documents`     | their scores      |
| scored       | query | document                      | label             |
| labelled     | text  | the label's own text          | label             |
| lines        | text  | the same text once more       |                   |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from raytower.objectives.keys import BatchKeys, text_keys
from raytower.objectives.targets import Targets
from raytower.training.batches import Rows


@dataclass(frozen=True)
class TextColumns:
    """The queries of a batch and their document columns, all equally long, with the targets."""

    queries: Sequence[str]
    documents: Sequence[Sequence[str]]
    targets: Targets


def text_columns(rows: Rows, num_documents: int | None = None) -> TextColumns:
    """The columns of an encoder objective from rows of any kind; candidates are cut to their best `num_documents`."""
    queries, documents = _texts(rows, num_documents)
    labels = rows["label"] if "text" in rows and "label" in rows else None
    columns = [
        text_keys(column, rows.get("document_id") if number == 0 else None, labels if number == 0 else None)
        for number, column in enumerate(documents)
    ]
    keys = BatchKeys(query=text_keys(queries, rows.get("query_id"), labels), documents=tuple(columns))
    scores = torch.tensor(rows["label"], dtype=torch.float32) if "query" in rows and "label" in rows else None
    teacher = None
    if "scores" in rows:
        teacher = torch.tensor([row[: len(documents)] for row in rows["scores"]], dtype=torch.float32)
    return TextColumns(queries, documents, Targets(keys=keys, labels_B=scores, teacher_BK=teacher))


def _texts(rows: Rows, num_documents: int | None) -> tuple[list[str], list[list[str]]]:
    if "documents" in rows:
        columns = zip(*(row[:num_documents] for row in rows["documents"]), strict=True)
        return rows["query"], [list(column) for column in columns]
    if "text" in rows:
        return rows["text"], [rows["label"] if "label" in rows else rows["text"]]
    return rows["query"], [rows["document"], *([rows["negative"]] if "negative" in rows else [])]


def best_documents(rows: Rows) -> tuple[list[str], list[str]]:
    """The queries of rows of any kind, and of each the document that it is trained to find."""
    queries, documents = _texts(rows, 1)
    return queries, documents[0]


def judged_pairs(
    rows: Rows, num_documents: int | None = None
) -> tuple[list[str], list[str], list[float], int]:
    """Rows as (query, document, label) for a cross-encoder, and how many of them belong to each query.

    A triple is a relevant and an irrelevant pair; candidates keep their scores. Pairs of a query stand together, the
    relevant one first.
    """
    if "label" in rows:
        return rows["query"], rows["document"], rows["label"], 1
    queries, documents = _texts(rows, num_documents)
    size = len(documents)
    if "scores" in rows:
        labels = [float(score) for row in rows["scores"] for score in row[:size]]
    else:
        labels = [1.0, *[0.0] * (size - 1)] * len(queries)
    flat = [column[row] for row in range(len(queries)) for column in documents]
    return [query for query in queries for _ in range(size)], flat, labels, size
