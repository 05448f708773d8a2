"""Pointwise classification of pairs: is this document relevant to this query, as two classes.

For a pair with the logits z₀ (irrelevant) and z₁ (relevant) and the label y, 0 or 1:

    loss = -w(y)·log softmax(z)_y,    w(1) = positive_weight, w(0) = 1,    mean over pairs

The mean divides by the number of pairs, not by the sum of weights: a heavier positive makes a larger loss.

Use it with judged pairs, or with positives and mined negatives. With graded labels use its sibling pointwise
regression, which has one logit; to order the documents of one query against each other, pairwise margin or listwise
softmax. Source: Nogueira and Cho 2019 (monoBERT).

Shape legend: B pairs of this worker.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from raytower.errors import InputError
from raytower.objectives.config import PointwiseCrossEntropy
from raytower.objectives.targets import found_wrong


def pointwise_cross_entropy(settings: PointwiseCrossEntropy, logits_B2: Tensor, labels_B: Tensor) -> Tensor:
    """Mean loss, a scalar.

    Args:
        logits_B2: (B, 2), the class irrelevant first.
        labels_B: (B,), each 0 or 1.

    Raises:
        InputError: a label is neither.
    """
    wrong_B = (labels_B != 0) & (labels_B != 1)
    if found_wrong(wrong_B):
        raise InputError(
            f"label {float(labels_B[wrong_B][0]):g} is neither 0 nor 1, which objective {settings.name} needs; "
            "train graded labels with pointwise_regression"
        )
    losses_B = nn.functional.cross_entropy(logits_B2, labels_B.long(), reduction="none")
    return torch.where(labels_B == 1, settings.positive_weight * losses_B, losses_B).mean()
