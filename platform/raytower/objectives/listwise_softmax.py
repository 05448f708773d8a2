"""Listwise softmax: the relevant document of a query against all its others at once.

For a query whose documents have the logits z₀ (relevant) and z₁ … z₍K₋₁₎:

    loss = -log( exp z₀ / sum over k of exp zₖ ),    mean over queries

Only differences inside a list are trained, so a logit says how documents of one query compare, not how relevant one is
by itself; it is read as it is.

Use it with candidate lists, the harder and longer the better: it is the usual choice for rerankers over mined
negatives. Its sibling pairwise margin leaves pairs alone that are far enough apart; the pointwise ones give logits
that compare between queries. Source: Cao et al. 2007 (ListNet, top one); Gao et al. 2021 (localised contrastive).

Shape legend: B queries of this worker, K documents of each.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from raytower.objectives.config import ListwiseSoftmax
from raytower.objectives.targets import refuse_single_documents


def listwise_softmax(settings: ListwiseSoftmax, logits_BK: Tensor, labels: Tensor | None = None) -> Tensor:
    """Mean loss, a scalar, of logits (B, K) whose first column is of the relevant documents; `labels` are not read.

    A logit is -inf where a query has no such document: its share of the sum is 0.

    Raises:
        InputError: K is 1.
    """
    refuse_single_documents(logits_BK, settings.name)
    first_B = torch.zeros(len(logits_BK), dtype=torch.long, device=logits_BK.device)
    return nn.functional.cross_entropy(logits_BK, first_B)
