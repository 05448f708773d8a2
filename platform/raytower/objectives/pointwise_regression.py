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

from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from raytower.config import Config
from raytower.errors import InputError


class PointwiseRegression(Config):
    """The objective; `positive_weight` scales the relevant side of bce, where negatives outnumber positives."""

    formats: ClassVar[tuple[str, ...]] = ("scored", "triples", "candidates")
    num_labels: ClassVar[int] = 1

    name: Literal["pointwise_regression"] = "pointwise_regression"
    loss: Literal["bce", "mse"] = "bce"
    positive_weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)

    def model_post_init(self, context: Any) -> None:
        if self.loss == "mse" and self.positive_weight != 1:
            raise ValueError(
                f"positive_weight is {self.positive_weight}, but loss mse knows no positives; set loss to bce, or "
                "leave positive_weight out"
            )

    @property
    def activation(self) -> Literal["sigmoid", "identity"]:
        """What a reader puts on the logit."""
        return "sigmoid" if self.loss == "bce" else "identity"

    def __call__(self, logits_B1: Tensor, labels_B: Tensor) -> Tensor:
        """Mean loss, a scalar.

        Args:
            logits_B1: (B, 1).
            labels_B: (B,), in 0..1 for bce, finite for mse.

        Raises:
            InputError: a label breaks that rule.
        """
        logits_B = logits_B1[:, 0]
        targets_B = labels_B.to(logits_B.dtype)
        if self.loss == "mse":
            _refuse(targets_B, ~targets_B.isfinite(), "not finite; mse needs a number for each pair")
            return nn.functional.mse_loss(logits_B, targets_B)
        # Written so that NaN, which compares false, is outside too.
        outside_B = ~((targets_B >= 0) & (targets_B <= 1))
        _refuse(targets_B, outside_B, "outside 0..1; scale the labels, or set objective.loss to mse")
        weight = logits_B.new_tensor(self.positive_weight)
        return nn.functional.binary_cross_entropy_with_logits(logits_B, targets_B, pos_weight=weight)


def _refuse(labels_B: Tensor, wrong_B: Tensor, rule: str) -> None:
    if bool(wrong_B.any()):
        raise InputError(f"label {float(labels_B[wrong_B][0]):g} is {rule}")
