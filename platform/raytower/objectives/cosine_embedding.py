"""Cosine embedding: matching pairs are pulled together, others pushed apart until a margin.

For a pair with label y and cosine similarity s:

    loss = 1 - s            where y = 1
    loss = max( 0, s - m )  where y = -1, also written 0

with margin m, the cosine up to which two texts that do not match may stay alike.

    columns      left texts (B, D), right texts (B, D), of unit length
    targets      labels (B,), each 1, 0 or -1

Use it with pairs judged yes or no, where the batch says nothing of other pairs. Siblings: cosine_regression for graded
scores; in_batch_negatives where there are matching pairs only.
Source: Chopra et al. 2005 (contrastive loss), in its cosine form as torch.nn.CosineEmbeddingLoss has it.

Shape legend: B pairs of this worker, D embedding dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from raytower.config import Config
from raytower.errors import InputError
from raytower.objectives.targets import Targets, needed


class CosineEmbedding(Config):
    """The objective with its margin, a cosine."""

    formats: ClassVar[tuple[str, ...]] = ("scored",)

    name: Literal["cosine_embedding"] = "cosine_embedding"
    margin: float = Field(default=0.3, ge=-1, lt=1)

    def __call__(self, columns: Sequence[Tensor], targets: Targets) -> Tensor:
        """Mean loss over this worker's pairs, a scalar.

        Raises:
            InputError: a label is none of 1, 0 and -1.
        """
        left_BD, right_BD = columns
        label_B = needed(targets.labels_B, "labels", self.name).to(left_BD.device)
        wrong_B = (label_B != 1) & (label_B != 0) & (label_B != -1)
        if bool(wrong_B.any()):
            raise InputError(
                f"label {float(label_B[wrong_B][0])} is none of 1, 0 and -1, which objective {self.name} takes; "
                "use cosine_regression for graded scores"
            )
        cosine_B = (left_BD * right_BD).sum(-1)
        return torch.where(label_B == 1, 1 - cosine_B, torch.relu(cosine_B - self.margin)).mean()
