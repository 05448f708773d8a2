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

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from raytower.config import Config
from raytower.errors import InputError


class ListwiseSoftmax(Config):
    """The objective; it has no settings."""

    formats: ClassVar[tuple[str, ...]] = ("triples", "candidates")
    num_labels: ClassVar[int] = 1
    activation: ClassVar[Literal["sigmoid", "identity"]] = "identity"

    name: Literal["listwise_softmax"] = "listwise_softmax"

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
        first_B = torch.zeros(len(logits_BK), dtype=torch.long, device=logits_BK.device)
        return nn.functional.cross_entropy(logits_BK, first_B)
