"""Keys that tell which rows of a batch are relevant to each other beyond their own pair.

A batch holds false negatives: the same document twice, two answers to one question, two texts of one label. Each text
carries three keys, and two texts are equal when any of them agrees:

    text    hash of the stripped text
    id      hash of the user's id
    label   hash of the label; NO_KEY where the rows carry none

Document d is known to be relevant to query i when d equals the first document of i, or of a query equal to i.

A row with fewer documents than others has none in some columns. Such a place carries NO_KEY three times: a document
always has a text, so none looks like that.

Shape legend: B rows of this worker, W workers, N = B·W rows of all, C documents of all workers (N to a column), 3 keys.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raytower.collectives import gather_constants, rank

NO_KEY = 0


@dataclass(frozen=True, kw_only=True)
class BatchKeys:
    """Keys of this worker's rows; NO_KEY where there is none, and NO_KEY equals nothing.

    query: (B, 3). documents: one (B, 3) for each document column, in the order of the columns.
    """

    query: Tensor
    documents: tuple[Tensor, ...]

    def to(self, device: torch.device) -> BatchKeys:
        return BatchKeys(
            query=self.query.to(device), documents=tuple(column.to(device) for column in self.documents)
        )


def known_relevant(keys: BatchKeys) -> Tensor:
    """(B, C) True where a document of the gathered batch is known to be relevant to a query of this worker, or missing.

    A query's own document is among them.
    """
    first_N3 = gather_constants(keys.documents[0])
    document_C3 = torch.cat([first_N3, *(gather_constants(column) for column in keys.documents[1:])])
    asked_BN = equal_keys(keys.query, gather_constants(keys.query))
    rows_B = torch.arange(len(keys.query), device=keys.query.device)
    asked_BN[rows_B, own_places(keys.query)] = True
    # Over all n: query i equals query n, and n's first document equals document c.
    paths_BC = asked_BN.float() @ equal_keys(first_N3, document_C3).float()
    paths_BC[rows_B, own_places(keys.query)] += 1
    return (paths_BC > 0) | missing_documents(document_C3)


def missing_documents(document_C3: Tensor) -> Tensor:
    """(C,) True where a column has no document in this row; such a place is nobody's negative."""
    return (document_C3 == NO_KEY).all(-1)


def own_places(rows: Tensor) -> Tensor:
    """(B,) where this worker's rows (B, …) lie among the rows of all workers."""
    return torch.arange(len(rows), device=rows.device) + rank() * len(rows)


def equal_keys(left_B3: Tensor, right_C3: Tensor) -> Tensor:
    """(B, C) True where text, id or label is the same."""
    equal_BC = torch.zeros(len(left_B3), len(right_C3), dtype=torch.bool, device=left_B3.device)
    for left_B, right_C in zip(left_B3.T, right_C3.T, strict=True):
        equal_BC |= (left_B[:, None] == right_C[None]) & (left_B[:, None] != NO_KEY)
    return equal_BC


def text_keys(
    texts: Sequence[str | None],
    ids: Sequence[str | None] | None = None,
    labels: Sequence[str | None] | None = None,
) -> Tensor:
    """int64 (B, 3): keys of the stripped text, of the id and of the label, for BatchKeys.

    A text is None where a row has no document in this column.
    """
    nothing = [None] * len(texts)
    given_ids = nothing if ids is None else ids
    given_labels = nothing if labels is None else labels
    rows = [
        [_key(None if text is None else text.strip()), _key(name), _key(label)]
        for text, name, label in zip(texts, given_ids, given_labels, strict=True)
    ]
    return torch.tensor(rows, dtype=torch.int64).reshape(len(texts), 3)


def _key(value: str | None) -> int:
    if value is None:
        return NO_KEY
    digest = hashlib.blake2b(value.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True) or 1
