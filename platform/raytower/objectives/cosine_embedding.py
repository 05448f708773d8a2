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

import torch
from torch import Tensor

from raytower.errors import InputError
from raytower.objectives.config import CosineEmbedding
from raytower.objectives.targets import Targets, found_wrong, needed


def cosine_embedding(settings: CosineEmbedding, columns: Sequence[Tensor], targets: Targets) -> Tensor:
    """Mean loss, a scalar, over this worker's pairs: two columns (B, D) and labels (B,).

    Raises:
        InputError: a label is none of 1, 0 and -1.
    """
    left_BD, right_BD = columns
    label_B = needed(targets.labels_B, "labels", settings.name).to(left_BD.device)
    wrong_B = (label_B != 1) & (label_B != 0) & (label_B != -1)
    if found_wrong(wrong_B):
        raise InputError(
            f"label {float(label_B[wrong_B][0])} is none of 1, 0 and -1, which objective {settings.name} takes; "
            "use cosine_regression for graded scores"
        )
    cosine_B = (left_BD * right_BD).sum(-1)
    return torch.where(label_B == 1, 1 - cosine_B, torch.relu(cosine_B - settings.margin)).mean()
