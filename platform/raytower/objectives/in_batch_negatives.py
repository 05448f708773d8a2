"""In-batch negatives: every other document of the batch, on whatever worker, is a negative.

For query i with positive p(i) and cosine similarities s:

    e_i = exp(a·(s[i, p(i)] - m)),    loss_i = -log( e_i / ( e_i + sum over j in negatives(i) of exp(a·s[i, j]) ) )

with scale a and margin m. Documents known to be relevant to query i (the same text or id as its positive, or the
positive of an equal query) are no negatives and leave the sum.

Use it wherever pairs of matching texts are all there is; larger batches give more and harder negatives.
Source: Henderson et al. 2017 (smart reply); Karpukhin et al. 2020 (DPR); margin on the positive: Yang et al. 2019.

Shape legend: B queries of this worker, N queries of all workers, C documents of all workers, D embedding dimension.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from raytower.errors import InputError
from raytower.objectives.gather import gather_constants, gather_rows, rank

NO_KEY = 0


@dataclass(frozen=True, kw_only=True)
class InBatchNegatives:
    """The objective with its settings. Raises InputError for a scale that is not positive or a margin outside 0..2."""

    scale: float = 20.0
    margin: float = 0.0

    def __post_init__(self) -> None:
        if not self.scale > 0:
            raise InputError(f"objective.scale is {self.scale}; it must be above 0 (20 is usual)")
        if not 0 <= self.margin <= 2:
            raise InputError(
                f"objective.margin is {self.margin}; cosines differ by at most 2, so it must be in 0..2"
            )

    def __call__(self, query_BD: Tensor, documents: Sequence[Tensor], keys: BatchKeys) -> Tensor:
        """Mean loss over this worker's queries, a scalar.

        Args:
            query_BD: normalised query embeddings of this worker.
            documents: normalised document embeddings of this worker, each (B, D): the positives first, then one
                tensor for each column of hard negatives.
            keys: what tells equal queries and documents.
        """
        document_CD = torch.cat([gather_rows(column_BD) for column_BD in documents])
        cosine_BC = query_BD @ document_CD.T
        positive_B = torch.arange(len(query_BD), device=query_BD.device) + rank() * len(query_BD)
        rows_B = torch.arange(len(query_BD), device=query_BD.device)
        known_BC = known_relevant(keys.to(query_BD.device))
        known_BC[rows_B, positive_B] = False
        margin_BC = torch.zeros_like(cosine_BC)
        margin_BC[rows_B, positive_B] = self.margin
        logits_BC = self.scale * (cosine_BC - margin_BC)
        return nn.functional.cross_entropy(logits_BC.masked_fill(known_BC, -torch.inf), positive_B)


@dataclass(frozen=True, kw_only=True)
class BatchKeys:
    """Hashes that tell equal texts and ids; NO_KEY where there is none, and NO_KEY equals nothing.

    query: (B, 2) keys of text and id. documents: one (B, 2) for each document column, in the order of the columns.
    """

    query: Tensor
    documents: tuple[Tensor, ...]

    def to(self, device: torch.device) -> BatchKeys:
        return BatchKeys(
            query=self.query.to(device), documents=tuple(column.to(device) for column in self.documents)
        )


def known_relevant(keys: BatchKeys) -> Tensor:
    """(B, C) True where a document of the gathered batch is known to be relevant to a query of this worker."""
    positive_B2 = keys.documents[0]
    document_C2 = torch.cat([gather_constants(column) for column in keys.documents])
    asker_N2 = gather_constants(keys.query)
    known_BC = _same(positive_B2, document_C2)
    # The positive of an equal query is relevant too; only the first N documents are positives.
    known_BC[:, : len(asker_N2)] |= _same(keys.query, asker_N2)
    return known_BC


def _same(left_B2: Tensor, right_C2: Tensor) -> Tensor:
    equal_BC2 = (left_B2[:, None] == right_C2[None]) & (left_B2[:, None] != NO_KEY)
    return equal_BC2.any(-1)


def text_keys(texts: Sequence[str], ids: Sequence[str | None] | None = None) -> Tensor:
    """(len(texts), 2) keys of the stripped text and of the id, for BatchKeys."""
    given = ids if ids is not None else [None] * len(texts)
    rows = [
        [_key(text.strip()), NO_KEY if name is None else _key(name)]
        for text, name in zip(texts, given, strict=True)
    ]
    return torch.tensor(rows, dtype=torch.int64).reshape(len(texts), 2)


def _key(value: str) -> int:
    digest = hashlib.blake2b(value.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True) or 1
