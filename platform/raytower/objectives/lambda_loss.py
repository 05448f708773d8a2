"""LambdaLoss: RankNet, with each two documents weighed by what their order is worth to nDCG.

For a query whose documents have the labels y, the logits z and, by falling logit, the places p = 1 … K:

    loss = sum over k, l with y_k > y_l of w(k, l)·log2( 1 + exp(z_l - z_k) ),    mean over queries

With the gain G = (2^y - 1) / (the DCG of the best order) and the discount D(p) = log2(1 + p), w is |G_k - G_l| times

    lambda_rank      | 1/D(p_k) - 1/D(p_l) |                            what nDCG changes by if the two change places
    ndcg_loss2       1/D(d) - 1/D(d + 1), with d = |p_k - p_l|          a tighter bound of what nDCG lacks
    ndcg_loss2pp     lambda_rank's plus 10 times ndcg_loss2's           the paper's best

With `k`, pairs count of which one document at least is among the first k places, and the best order's DCG is cut there.
Weights follow the logits and have no gradient. A query whose labels are all equal adds 0.

Use it for a reranker that is judged by nDCG, with candidate lists whose scores are grades: the top of the list counts
most. Gains are powers of two, so labels lie in 0 to 30; for a teacher's logits take its sibling rank_net, which reads
their order alone. Source: Wang et al. 2018 (LambdaLoss, with their mu of 10); lambda_rank: Burges et al. 2006.

Shape legend: B queries of this worker, K documents of each. Each two documents are compared: memory is B·K·K.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from raytower.errors import InputError
from raytower.objectives.config import LambdaLoss
from raytower.objectives.rank_net import losses_of_order
from raytower.objectives.targets import found_wrong, refuse_single_documents

_LARGEST_LABEL = 30
_MU = 10.0


def lambda_loss(settings: LambdaLoss, logits_BK: Tensor, labels_BK: Tensor) -> Tensor:
    """Mean loss, a scalar, of logits and labels (B, K); both are -inf where a query has no such document.

    Raises:
        InputError: K is 1, or a label lies outside 0..30.
    """
    refuse_single_documents(logits_BK, settings.name)
    present_BK = logits_BK > -torch.inf
    wrong_BK = present_BK & ~(
        (labels_BK >= 0) & (labels_BK <= _LARGEST_LABEL)
    )  # written so that NaN is wrong too
    if found_wrong(wrong_BK):
        raise InputError(
            f"label {float(labels_BK[wrong_BK][0]):g} is outside 0..{_LARGEST_LABEL}; objective {settings.name} makes "
            "gains 2^label - 1 of them: give grades, or choose rank_net, which reads their order alone"
        )
    losses_BKK, ordered_BKK = losses_of_order(logits_BK, labels_BK)
    place_BK = 1 + logits_BK.detach().argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    if settings.k is not None:
        among_BK = place_BK <= settings.k
        ordered_BKK = ordered_BKK & (among_BK[:, :, None] | among_BK[:, None, :])
    weight_BKK = _weights(settings, place_BK, labels_BK.where(present_BK, 0).to(losses_BKK))
    return (weight_BKK * losses_BKK * ordered_BKK).sum((1, 2)).mean() / math.log(2)


def _weights(settings: LambdaLoss, place_BK: Tensor, labels_BK: Tensor) -> Tensor:
    """(B, K, K) of the places 1 … K and the labels, 0 for a missing document."""
    gain_BK = labels_BK.exp2() - 1
    rank_K = torch.arange(1, place_BK.shape[1] + 1, device=place_BK.device)
    ideal_BK = gain_BK.sort(dim=-1, descending=True).values / _discount(rank_K)
    # Where it is 0, all gains are: there is nothing to order.
    ideal_B1 = ideal_BK[:, : settings.k].sum(-1, keepdim=True).clamp(min=torch.finfo(gain_BK.dtype).tiny)
    gain_BK = gain_BK / ideal_B1
    change_BKK = (gain_BK[:, :, None] - gain_BK[:, None, :]).abs()
    inverse_BK = 1 / _discount(place_BK)
    swap_BKK = (inverse_BK[:, :, None] - inverse_BK[:, None, :]).abs()
    # A document and itself are no pair: any distance will do.
    apart_BKK = (place_BK[:, :, None] - place_BK[:, None, :]).abs().clamp(min=1)
    step_BKK = 1 / _discount(apart_BKK) - 1 / _discount(apart_BKK + 1)
    factor_BKK = {
        "lambda_rank": swap_BKK,
        "ndcg_loss2": step_BKK,
        "ndcg_loss2pp": _MU * step_BKK + swap_BKK,
    }[settings.weighting]
    return change_BKK * factor_BKK


def _discount(places: Tensor) -> Tensor:
    return (1.0 + places).log2()
