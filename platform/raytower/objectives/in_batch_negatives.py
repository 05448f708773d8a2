"""In-batch negatives: every other document of the batch, on whatever worker, is a negative.

For query i with positive p(i) and cosine similarities s:

    e_i = exp(a·(s[i, p(i)] - m)),    loss_i = -log( e_i / ( e_i + sum over j in negatives(i) of exp(a·s[i, j]) ) )

with scale a and margin m. Documents known to be relevant to query i (objectives/keys.py) are no negatives and leave
the sum. Symmetric: the mean of this and of the same formula with the roles exchanged, where each positive document
looks for its query among the queries of the batch.

`more_negatives` puts further similarities of the pair into the one sum:

    query_query              of query i to the other queries
    document_document        of document p(i) to the documents of other rows
    document_query           of document p(i) to all queries, its own once more, which adds another e_i

Queries known to be relevant to p(i), and documents known to be relevant to query i, leave them too. All three together
are the improved contrastive loss of GTE.

With a guide, another encoder's cosines g, whatever is too similar in its eyes leaves each of these sums: what has a
cosine above g[i, p(i)] - d, with guide.margin d (times |g[i, p(i)]| where it is relative). The pair itself stays.

    columns      queries (B, D), positives (B, D), then any number of hard-negative columns (B, D), all of unit length
    targets      keys of the texts; a guide's vectors of each column

Use it wherever pairs of matching texts are all there is; larger batches give more and harder negatives. Symmetric fits
where both sides are queried, such as equal questions; hard negatives stand in the first direction only. More negatives
spread the texts of one side where batches are small; leave them out where many queries of a batch mean the same.
Siblings: hardest_negative and random_negative look at one negative of the batch; margin_mse and kl_divergence follow a
teacher.
Source: Henderson et al. 2017 (smart reply); Karpukhin et al. 2020 (DPR); margin on the positive: Yang et al. 2019;
symmetric: Radford et al. 2021 (CLIP); more negatives: Li et al. 2023 (GTE); guide: Solatorio 2024 (GISTEmbed).

The loss and its gradient are computed together, a block of queries at a time: memory is that of the embeddings and
of one block, linear in the batch, and no product is made twice.

Shape legend: B queries of this worker, N of all workers, C documents of all workers, X candidates (N or C), R queries
of a block, P pairs, D embedding dimension, G the guide's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from raytower.collectives import gather_constants, gather_rows, world_size
from raytower.objectives.config import InBatchNegatives
from raytower.objectives.keys import BatchKeys, KnownRelevant
from raytower.objectives.targets import Targets, needed


def in_batch_negatives(settings: InBatchNegatives, columns: Sequence[Tensor], targets: Targets) -> Tensor:
    """Mean loss, a scalar, over this worker's queries; columns (B, D). Raises InputError without keys."""
    device = columns[0].device
    keys = needed(targets.keys, "the keys of its texts", settings.name).to(device)
    guide = [] if targets.guide is None else [column_BG.to(device) for column_BG in targets.guide.columns]
    limit_B = None if targets.guide is None else targets.guide.limits(guide[0], guide[1])
    query = _Side(columns[:1], keys.exchanged, guide[:1])
    document = _Side(columns[1:], keys, guide[1:])

    def loss_of(*parts: tuple[_Side, _Side, _Own]) -> Tensor:
        return _mean_cross_entropy(settings, [_Part.of(*part, limit_B) for part in parts])

    more: dict[str, tuple[_Side, _Side, _Own]] = {
        "query_query": (query, query, "out"),
        "document_document": (document, document, "out"),
        "document_query": (document, query, "again"),
    }
    loss = loss_of((query, document, "target"), *(more[name] for name in settings.more_negatives or ()))
    if not settings.symmetric:
        return loss
    return (loss + loss_of((document, query, "target"))) / 2


_Own = Literal["target", "again", "out"]
"""What an anchor's own candidate is: the one to be found, found elsewhere and in the sum once more, or left out of it
with all others of its row."""


class _Side:
    """The queries or the documents of the batch: anchors of this worker, candidates of all."""

    def __init__(self, columns: Sequence[Tensor], keys: BatchKeys, guide: Sequence[Tensor]) -> None:
        """`keys` are those to which these texts are the documents; `guide`, a guide's columns or none."""
        self.anchor_BD = columns[0]
        self.guide_BG = guide[0] if guide else None
        self._columns, self._guide, self._keys = columns, guide, keys

    @cached_property
    def candidate_XD(self) -> Tensor:  # noqa: N802 - carries its shape
        gathered = [gather_rows(column_BD) for column_BD in self._columns]
        return gathered[0] if len(gathered) == 1 else torch.cat(gathered)

    @cached_property
    def guide_XG(self) -> Tensor:  # noqa: N802
        return torch.cat([gather_constants(column_BG) for column_BG in self._guide])

    @property
    def known(self) -> KnownRelevant:
        return self._keys.known


@dataclass(frozen=True, kw_only=True)
class _Part:
    """The cosines of one anchor for each query to candidates, and which of them stand in its sum."""

    anchor_BD: Tensor  # noqa: N815 - carries its shape
    candidate_XD: Tensor  # noqa: N815
    known: KnownRelevant
    own: _Own
    guide: tuple[Tensor, Tensor, Tensor] | None
    """The guide's anchors (B, G) and candidates (X, G), and the cosine (B,) above which one is no negative."""

    @classmethod
    def of(cls, anchor: _Side, candidate: _Side, own: _Own, limit_B: Tensor | None) -> _Part:
        guide = None
        if limit_B is not None and anchor.guide_BG is not None:
            guide = (anchor.guide_BG, candidate.guide_XG, limit_B)
        return cls(
            anchor_BD=anchor.anchor_BD,
            candidate_XD=candidate.candidate_XD,
            known=candidate.known,
            own=own,
            guide=guide,
        )

    def own_places(self, rows: slice) -> tuple[Tensor, Tensor]:
        """(R,) queries of the block and (R,) the candidate of each."""
        own_R = self.known.own_B[rows]
        return torch.arange(len(own_R), device=own_R.device), own_R

    def leave_out(self, logits_RX: Tensor, rows: slice, shift: float) -> None:
        """Set, in place, the logits that stand in no sum to -inf, and take `shift` off those of the pair itself."""
        row_R, own_R = self.own_places(rows)
        positive_R = logits_RX[row_R, own_R] - shift
        logits_RX[self.known.pairs(rows)] = -torch.inf
        logits_RX[:, self.known.missing_M] = -torch.inf
        if self.guide is not None:
            anchor_BG, candidate_XG, limit_B = self.guide
            logits_RX.masked_fill_(anchor_BG[rows] @ candidate_XG.T > limit_B[rows, None], -torch.inf)
        if self.own == "out":
            num_rows = len(self.anchor_BD) * world_size()
            row_C = torch.arange(0, logits_RX.shape[1], num_rows, device=logits_RX.device)
            logits_RX[row_R[:, None], own_R[:, None] + row_C] = -torch.inf
        else:
            logits_RX[row_R, own_R] = positive_R


def _mean_cross_entropy(settings: InBatchNegatives, parts: Sequence[_Part]) -> Tensor:
    """Mean over the queries of the cross-entropy of finding the target among the candidates of all parts.

    The first part holds the targets.
    """
    columns = [column for part in parts for column in (part.anchor_BD, part.candidate_XD)]
    return cast(Tensor, _MeanCrossEntropy.apply(parts, settings.scale, settings.margin, *columns))


class _MeanCrossEntropy(torch.autograd.Function):
    """Forward: the mean over the queries, and its gradients, which are all that is kept. Backward multiplies them.

    With p the softmax over the candidates that are in the sum, the gradient of loss_i by the logit of candidate j is
    p[i, j] - [j is the target of i]. Products are made in the columns' precision, or autocast's; the softmax, its
    sums and the gradients are float32 at least.
    """

    @staticmethod
    def forward(
        context: Any, parts: Sequence[_Part], scale: float, margin: float, *columns: Tensor
    ) -> Tensor:
        """`columns` are the parts' anchors and candidates, in turn: those that autograd gives the gradients to."""
        device = columns[0].device
        exact = torch.promote_types(columns[0].dtype, torch.float32)
        is_mixed = torch.is_autocast_enabled(device.type)
        precision = torch.get_autocast_dtype(device.type) if is_mixed else columns[0].dtype
        anchors = [(part.anchor_BD * scale).to(precision) for part in parts]
        candidates = [part.candidate_XD.to(precision) for part in parts]
        loss = torch.zeros((), dtype=exact, device=device)
        anchor_gradients = [torch.empty_like(anchor_BD, dtype=exact) for anchor_BD in anchors]
        candidate_gradients = [torch.zeros_like(candidate_XD, dtype=exact) for candidate_XD in candidates]
        for rows in parts[0].known.blocks(sum(map(len, candidates))):
            logits = []
            for part, anchor_BD, candidate_XD in zip(parts, anchors, candidates, strict=True):
                logits_RX = (anchor_BD[rows] @ candidate_XD.T).to(exact)
                part.leave_out(logits_RX, rows, scale * margin)
                logits.append(logits_RX)
            own = parts[0].own_places(rows)
            positive_R = logits[0][own]
            # In place: beside the products, passes over memory are what a block costs.
            largest_R1 = reduce(torch.maximum, [logits_RX.amax(1, keepdim=True) for logits_RX in logits])
            shares = [logits_RX.sub_(largest_R1).exp_() for logits_RX in logits]
            sum_R1 = reduce(torch.add, [share_RX.sum(1, keepdim=True) for share_RX in shares])
            loss += (largest_R1 + sum_R1.log()).sum() - positive_R.sum()
            for number, share_RX in enumerate(shares):
                share_RX.div_(sum_R1)
                if number == 0:
                    share_RX[own] -= 1
                slope_RX = share_RX.to(precision)
                anchor_gradients[number][rows] = slope_RX @ candidates[number]
                if precision == exact:  # no (X, D) matrix of each block
                    candidate_gradients[number].addmm_(slope_RX.T, anchors[number][rows])
                else:
                    candidate_gradients[number] += slope_RX.T @ anchors[number][rows]
        num_queries = len(columns[0])
        gradients = []
        for anchor_BD, candidate_XD in zip(anchor_gradients, candidate_gradients, strict=True):
            gradients += [anchor_BD.mul_(scale / num_queries), candidate_XD.div_(num_queries)]
        context.save_for_backward(*gradients)
        context.precisions = [column.dtype for column in columns]
        return loss / num_queries

    @staticmethod
    @once_differentiable
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        columns = [
            (gradients[0] * kept).to(precision)
            for kept, precision in zip(context.saved_tensors, context.precisions, strict=True)
        ]
        return (None, None, None, *columns)
