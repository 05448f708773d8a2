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

The loss and its gradient are computed together, a block of queries at a time: memory is that of the embeddings and
of one block, linear in the batch, and no product is made twice.

Shape legend: B queries of this worker, C documents of all workers, R queries of a block, D embedding dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from raytower.collectives import gather_rows
from raytower.objectives.config import InBatchNegatives
from raytower.objectives.keys import BatchKeys, KnownRelevant
from raytower.objectives.targets import Targets, needed


def in_batch_negatives(settings: InBatchNegatives, columns: Sequence[Tensor], targets: Targets) -> Tensor:
    """Mean loss, a scalar, over this worker's queries; columns (B, D). Raises InputError without keys."""
    query_BD, *documents = columns
    keys = needed(targets.keys, "the keys of its texts", settings.name).to(query_BD.device)
    loss = _one_direction(settings, query_BD, documents, keys)
    if not settings.symmetric:
        return loss
    return (loss + _one_direction(settings, documents[0], [query_BD], keys.exchanged)) / 2


def _one_direction(
    settings: InBatchNegatives, query_BD: Tensor, documents: Sequence[Tensor], keys: BatchKeys
) -> Tensor:
    """Mean cross-entropy of finding each query's first document among the documents of all workers."""
    gathered = [gather_rows(column_BD) for column_BD in documents]
    document_CD = gathered[0] if len(gathered) == 1 else torch.cat(gathered)
    return cast(
        Tensor, _MeanCrossEntropy.apply(query_BD, document_CD, keys.known, settings.scale, settings.margin)
    )


class _MeanCrossEntropy(torch.autograd.Function):
    """Forward: the mean over the queries, and its gradients, which are all that is kept. Backward multiplies them.

    With p the softmax over the documents that are in the sum, the gradient of loss_i by the logit of document j is
    p[i, j] - [j is the positive of i]. Products are made in the columns' precision, or autocast's; the softmax, its
    sums and the gradients are float32 at least.
    """

    @staticmethod
    def forward(
        context: Any, query_BD: Tensor, document_CD: Tensor, known: KnownRelevant, scale: float, margin: float
    ) -> Tensor:
        device = query_BD.device
        exact = torch.promote_types(query_BD.dtype, torch.float32)
        is_mixed = torch.is_autocast_enabled(device.type)
        precision = torch.get_autocast_dtype(device.type) if is_mixed else query_BD.dtype
        scaled_BD, vector_CD = (query_BD * scale).to(precision), document_CD.to(precision)
        loss = torch.zeros((), dtype=exact, device=device)
        query_gradient_BD = torch.empty_like(query_BD, dtype=exact)
        document_gradient_CD = torch.zeros_like(document_CD, dtype=exact)
        for rows in known.blocks():
            logits_RC = (scaled_BD[rows] @ vector_CD.T).to(exact)
            own_R = known.own_B[rows]
            own = (torch.arange(len(own_R), device=device), own_R)
            positive_R = logits_RC[own] - scale * margin
            logits_RC[known.pairs(rows)] = -torch.inf
            logits_RC[:, known.missing_M] = -torch.inf
            logits_RC[own] = positive_R
            # In place: beside the product, passes over memory are what a block costs.
            largest_R1 = logits_RC.amax(1, keepdim=True)
            share_RC = logits_RC.sub_(largest_R1).exp_()
            sum_R1 = share_RC.sum(1, keepdim=True)
            loss += (largest_R1 + sum_R1.log()).sum() - positive_R.sum()
            share_RC.div_(sum_R1)
            share_RC[own] -= 1
            slope_RC = share_RC.to(precision)
            query_gradient_BD[rows] = slope_RC @ vector_CD
            if precision == exact:  # no (C, D) matrix of each block
                document_gradient_CD.addmm_(slope_RC.T, scaled_BD[rows])
            else:
                document_gradient_CD += slope_RC.T @ scaled_BD[rows]
        num_queries = len(query_BD)
        query_gradient_BD *= scale / num_queries
        document_gradient_CD /= num_queries
        context.save_for_backward(query_gradient_BD, document_gradient_CD)
        context.precisions = (query_BD.dtype, document_CD.dtype)
        return loss / num_queries

    @staticmethod
    @once_differentiable
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        columns = [
            (gradients[0] * kept).to(precision)
            for kept, precision in zip(context.saved_tensors, context.precisions, strict=True)
        ]
        return (*columns, None, None, None)
