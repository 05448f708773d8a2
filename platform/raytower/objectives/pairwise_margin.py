"""Pairwise margin: the relevant document of a query scores above each other one by a margin.

For a query whose documents have the logits z₀ (relevant) and z₁ … z₍K₋₁₎, with margin m:

    loss = mean over k ≥ 1 of max(0, m - σ(z₀) + σ(zₖ)),    mean over queries

σ comes first, because a margin such as 0.1 means something on 0..1 only. A pair that keeps the margin adds nothing,
so training ends up on the pairs that are still wrong.

Use it with triples or candidate lists whose negatives may hold unjudged relevant documents: it pushes them down no
further than the margin. Its sibling listwise softmax weighs all negatives of a query at once and never stops pushing;
the pointwise ones need no lists. Source: Joachims 2002 (ranking SVM); Herbrich et al. 1999.

Shape legend: B queries of this worker, K documents of each.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from raytower.config import Config
from raytower.errors import InputError


class PairwiseMargin(Config):
    """The objective; `margin` is a difference of two scores in 0..1."""

    formats: ClassVar[tuple[str, ...]] = ("triples", "candidates")
    num_labels: ClassVar[int] = 1
    activation: ClassVar[Literal["sigmoid", "identity"]] = "sigmoid"

    name: Literal["pairwise_margin"] = "pairwise_margin"
    margin: float = Field(default=0.1, gt=0, le=1)

    def __call__(self, logits_BK: Tensor, labels: Tensor | None = None) -> Tensor:
        """Mean loss, a scalar.

        Args:
            logits_BK: (B, K) of each query's documents, the relevant one first; K at least 2.
            labels: not read; the order of the columns says which document is relevant.

        Raises:
            InputError: K is 1.
        """
        if logits_BK.shape[1] < 2:
            raise InputError(
                f"each query has {logits_BK.shape[1]} document; objective {self.name} compares at least 2: "
                "give a negative for each query"
            )
        scores_BK = logits_BK.sigmoid()
        return (self.margin - scores_BK[:, :1] + scores_BK[:, 1:]).clamp(min=0).mean()
