"""In-batch negatives: every other document of the batch, on whatever worker, is a negative.

For query i with positive p(i) and cosine similarities s:

    e_i = exp(a·(s[i, p(i)] - m)),    loss_i = -log( e_i / ( e_i + sum over j in negatives(i) of exp(a·s[i, j]) ) )

with scale a and margin m. Documents known to be relevant to query i (objectives/keys.py) are no negatives and leave
the sum. Symmetric: the mean of this and of the same formula with the roles exchanged, where each positive document
looks for its query among the queries of the batch.

    columns      queries (B, D), positives (B, D), then any number of hard-negative columns (B, D), all of unit length
    targets      keys of the texts

Use it wherever pairs of matching texts are all there is; larger batches give more and harder negatives. Symmetric fits
where both sides are queried, such as equal questions; hard negatives stand in the first direction only. Siblings:
hardest_negative and random_negative look at one negative of the batch; margin_mse and kl_divergence follow a teacher.
Source: Henderson et al. 2017 (smart reply); Karpukhin et al. 2020 (DPR); margin on the positive: Yang et al. 2019;
symmetric: Radford et al. 2021 (CLIP).

Shape legend: B queries of this worker, N queries of all workers, C documents of all workers, D embedding dimension.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from raytower.collectives import gather_rows
from raytower.objectives.config import InBatchNegatives
from raytower.objectives.keys import BatchKeys, known_relevant, own_places
from raytower.objectives.targets import Targets, needed


def in_batch_negatives(settings: InBatchNegatives, columns: Sequence[Tensor], targets: Targets) -> Tensor:
    """Mean loss, a scalar, over this worker's queries; columns (B, D). Raises InputError without keys."""
    query_BD, *documents = columns
    keys = needed(targets.keys, "the keys of its texts", settings.name).to(query_BD.device)
    loss = _one_direction(settings, query_BD, documents, keys)
    if not settings.symmetric:
        return loss
    exchanged = BatchKeys(query=keys.documents[0], documents=(keys.query,))
    return (loss + _one_direction(settings, documents[0], [query_BD], exchanged)) / 2


def _one_direction(
    settings: InBatchNegatives, query_BD: Tensor, documents: Sequence[Tensor], keys: BatchKeys
) -> Tensor:
    """Mean cross-entropy of finding each query's first document among the documents of all workers."""
    document_CD = torch.cat([gather_rows(column_BD) for column_BD in documents])
    cosine_BC = query_BD @ document_CD.T
    rows_B, positive_B = torch.arange(len(query_BD), device=query_BD.device), own_places(query_BD)
    known_BC = known_relevant(keys)
    known_BC[rows_B, positive_B] = False
    margin_BC = torch.zeros_like(cosine_BC)
    margin_BC[rows_B, positive_B] = settings.margin
    logits_BC = settings.scale * (cosine_BC - margin_BC)
    return nn.functional.cross_entropy(logits_BC.masked_fill(known_BC, -torch.inf), positive_B)
