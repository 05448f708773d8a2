"""RankNet: of two documents of a query, the one with the higher label has the higher logit.

For a query whose documents have the labels y and the logits z:

    loss = mean over k, l with y_k > y_l of log( 1 + exp(z_l - z_k) ),    mean over queries

Documents of equal labels are not compared; a query whose labels are all equal adds 0. Only the order of a query's
labels counts, so that they may be grades, or a teacher's scores.

Use it with candidate lists that carry more than one relevant document or several grades, where listwise softmax and
pairwise margin see the first document and the others only. Sibling: lambda_loss weighs each two documents by what their
order is worth to nDCG. Source: Burges et al. 2005 (RankNet).

Shape legend: B queries of this worker, K documents of each. Each two documents are compared: memory is B·K·K.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from raytower.objectives.config import RankNet
from raytower.objectives.targets import refuse_single_documents


def rank_net(settings: RankNet, logits_BK: Tensor, labels_BK: Tensor) -> Tensor:
    """Mean loss, a scalar, of logits and labels (B, K); both are -inf where a query has no such document.

    Raises:
        InputError: K is 1.
    """
    refuse_single_documents(logits_BK, settings.name)
    losses_BKK, ordered_BKK = losses_of_order(logits_BK, labels_BK)
    num_B = ordered_BKK.sum((1, 2)).clamp(min=1)
    # Each query's mean first: a mean over all pairs would depend on how the queries lie on the workers.
    return ((losses_BKK * ordered_BKK).sum((1, 2)) / num_B).mean()


def losses_of_order(logits_BK: Tensor, labels_BK: Tensor) -> tuple[Tensor, Tensor]:
    """log(1 + exp(z_l - z_k)), (B, K, K), and True where both documents are there and k has the higher label.

    Losses are finite everywhere, and so are their gradients.
    """
    present_BK = logits_BK > -torch.inf
    finite_BK = logits_BK.masked_fill(~present_BK, 0)
    losses_BKK = nn.functional.softplus(finite_BK[:, None, :] - finite_BK[:, :, None])
    ordered_BKK = (
        (labels_BK[:, :, None] > labels_BK[:, None, :]) & present_BK[:, :, None] & present_BK[:, None, :]
    )
    return losses_BKK, ordered_BKK
