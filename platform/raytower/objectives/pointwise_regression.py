"""Pointwise regression of pairs: one logit z against a graded label y.

    bce:  loss = -( w·y·log σ(z) + (1 - y)·log(1 - σ(z)) ),    y in 0..1, w = positive_weight
    mse:  loss = (z - y)²,                                     any finite y

each the mean over pairs. A reader of a finished reranker puts σ on a logit trained with bce, and takes one trained
with mse as it is.

Use bce for relevance in 0..1, graded or not: it is the usual reranker. Use mse where the score itself is wanted on
its own scale, such as similarity from 0 to 5. Siblings: pointwise cross-entropy has two logits and labels 0 and 1
only; pairwise margin and listwise softmax compare the documents of one query.
Source: Nogueira and Cho 2019 (monoBERT), with one logit in place of two classes.

Shape legend: B pairs of this worker.
"""

from __future__ import annotations

from torch import Tensor, nn

from raytower.errors import InputError
from raytower.objectives.config import PointwiseRegression
from raytower.objectives.targets import found_wrong


def pointwise_regression(settings: PointwiseRegression, logits_B1: Tensor, labels_B: Tensor) -> Tensor:
    """Mean loss, a scalar.

    Args:
        logits_B1: (B, 1).
        labels_B: (B,), in 0..1 for bce, finite for mse.

    Raises:
        InputError: a label breaks that rule.
    """
    logits_B = logits_B1[:, 0]
    targets_B = labels_B.to(logits_B.dtype)
    if settings.loss == "mse":
        _refuse(targets_B, ~targets_B.isfinite(), "not finite; mse needs a number for each pair")
        return nn.functional.mse_loss(logits_B, targets_B)
    # Written so that NaN, which compares false, is outside too.
    outside_B = ~((targets_B >= 0) & (targets_B <= 1))
    _refuse(targets_B, outside_B, "outside 0..1; scale the labels, or set objective.loss to mse")
    weight = logits_B.new_full((), settings.positive_weight)
    return nn.functional.binary_cross_entropy_with_logits(logits_B, targets_B, pos_weight=weight)


def _refuse(labels_B: Tensor, wrong_B: Tensor, rule: str) -> None:
    if found_wrong(wrong_B):
        raise InputError(f"label {float(labels_B[wrong_B][0]):g} is {rule}")
