"""Hardest negative: a margin between the positive and the most similar document of the batch that is not relevant.

For query i with positive p(i) and cosine similarities s:

    loss_i = max( 0, m - s[i, p(i)] + max over j in negatives(i) of s[i, j] )

with margin m. Documents known to be relevant to query i (objectives/keys.py) are no negatives; a query without any
negative adds 0.

    columns      queries (B, D), positives (B, D), then any number of hard-negative columns (B, D), all of unit length
    targets      keys of the texts

Use it where the last few confusions matter and the data is clean: one wrong negative takes the whole gradient of its
query. From an untrained model it can collapse all texts to one point; start from a trained one, or from its sibling
random_negative. in_batch_negatives weighs all negatives softly instead.
Source: Hermans et al. 2017 (batch-hard triplet loss); Faghri et al. 2018 (VSE++, maximum of hinges).

Negatives are chosen a block of queries at a time, and their cosines computed again for the gradient: memory is linear
in the batch.

Shape legend: B queries of this worker, C documents of all workers, R queries of a block, D embedding dimension.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from raytower.collectives import gather_rows
from raytower.objectives.config import HardestNegative
from raytower.objectives.keys import KnownRelevant
from raytower.objectives.targets import Targets, needed


def hardest_negative(settings: HardestNegative, columns: Sequence[Tensor], targets: Targets) -> Tensor:
    """Mean loss, a scalar, over this worker's queries; columns (B, D). Raises InputError without keys."""
    query_BD, *documents = columns
    keys = needed(targets.keys, "the keys of its texts", settings.name).to(query_BD.device)
    document_CD = torch.cat([gather_rows(column_BD) for column_BD in documents])
    hardest_B, has_any_B = _hardest(query_BD, document_CD, keys.known)
    positive_B = (query_BD * documents[0]).sum(-1)
    negative_B = (query_BD * document_CD[hardest_B]).sum(-1)
    return torch.where(has_any_B, torch.relu(settings.margin - positive_B + negative_B), 0.0).mean()


@torch.no_grad()
def _hardest(query_BD: Tensor, document_CD: Tensor, known: KnownRelevant) -> tuple[Tensor, Tensor]:
    """(B,) the most similar document that is not relevant to each query, the first of equals; (B,) if there is any."""
    found = [
        (query_BD[rows] @ document_CD.T).masked_fill(known.mask(rows), -torch.inf).max(-1)
        for rows in known.blocks()
    ]
    return torch.cat([best.indices for best in found]), torch.cat(
        [best.values for best in found]
    ) > -torch.inf
