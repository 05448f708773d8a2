"""Pointwise cross-encoder training: each (query, document) pair has its own relevance label.

    loss = -( y·log σ(z) + (1 - y)·log(1 - σ(z)) ), mean over pairs, with logit z and label y in 0..1

Use it with judged pairs or with positives and mined negatives. Its siblings compare documents of one query instead
(pairwise margin, listwise softmax). Source: Nogueira and Cho 2019 (monoBERT), with one logit in place of two classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from raytower.errors import InputError


@dataclass(frozen=True, kw_only=True)
class PointwiseCrossEntropy:
    """The objective; `positive_weight` scales the loss of relevant pairs where negatives outnumber them."""

    positive_weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.positive_weight > 0:
            raise InputError(f"objective.positive_weight is {self.positive_weight}; it must be above 0")

    def __call__(self, logits_B: Tensor, labels_B: Tensor) -> Tensor:
        """Mean loss, a scalar, of logits (B,) against labels (B,) in 0..1.

        Raises:
            InputError: a label lies outside 0..1.
        """
        if bool(((labels_B < 0) | (labels_B > 1)).any()):
            worst = float(labels_B[(labels_B < 0) | (labels_B > 1)][0])
            raise InputError(f"label {worst} is outside 0..1; scale the labels or use a regression objective")
        weight = torch.tensor(self.positive_weight, device=logits_B.device)
        return nn.functional.binary_cross_entropy_with_logits(logits_B, labels_B, pos_weight=weight)
