"""Pairwise margin: the relevant document of a query scores above each other one by a margin.

For a query whose documents have the logits z₀ (relevant) and z₁ … z₍K₋₁₎, with margin m:

    loss = mean over k ≥ 1 of max(0, m - σ(z₀) + σ(zₖ)),    mean over queries

K is the number of the query's own documents; a query without negatives adds 0.

σ comes first, because a margin such as 0.1 means something on 0..1 only. A pair that keeps the margin adds nothing,
so training ends up on the pairs that are still wrong.

Use it with triples or candidate lists whose negatives may hold unjudged relevant documents: it pushes them down no
further than the margin. Its sibling listwise softmax weighs all negatives of a query at once and never stops pushing;
the pointwise ones need no lists. Source: Joachims 2002 (ranking SVM); Herbrich et al. 1999.

Shape legend: B queries of this worker, K documents of each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from raytower.objectives.config import PairwiseMargin
from raytower.objectives.targets import refuse_single_documents


def pairwise_margin(settings: PairwiseMargin, logits_BK: Tensor, labels: Tensor | None = None) -> Tensor:
    """Mean loss, a scalar, of logits (B, K) whose first column is of the relevant documents; `labels` are not read.

    A logit is -inf where a query has no such document.

    Raises:
        InputError: K is 1.
    """
    refuse_single_documents(logits_BK, settings.name)
    scores_BK = logits_BK.sigmoid()
    hinge_BK = (settings.margin - scores_BK[:, :1] + scores_BK[:, 1:]).clamp(min=0)
    present_BK = logits_BK[:, 1:] > -torch.inf
    return ((hinge_BK * present_BK).sum(-1) / present_BK.sum(-1).clamp(min=1)).mean()
