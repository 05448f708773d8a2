"""Cosine regression: the cosine of a pair is its score.

For a pair with score y and cosine similarity s:

    loss = (s - y)²

    columns      left texts (B, D), right texts (B, D), of unit length
    targets      labels (B,), the scores in -1..1

Use it with graded similarity scores, such as those of semantic textual similarity, scaled into -1..1 (0..5 divided
by 5). Siblings: cosine_embedding for pairs judged yes or no; margin_mse for scores that only rank.
Source: Reimers and Gurevych 2019 (Sentence-BERT, regression objective).

Shape legend: B pairs of this worker, D embedding dimension.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from raytower.errors import InputError
from raytower.objectives.config import CosineRegression
from raytower.objectives.targets import Targets, found_wrong, needed


def cosine_regression(settings: CosineRegression, columns: Sequence[Tensor], targets: Targets) -> Tensor:
    """Mean loss, a scalar, over this worker's pairs: two columns (B, D) and labels (B,).

    Raises:
        InputError: a score lies outside -1..1.
    """
    left_BD, right_BD = columns
    score_B = needed(targets.labels_B, "scores", settings.name).to(left_BD.device, left_BD.dtype)
    wrong_B = ~(score_B.abs() <= 1)  # written so that NaN is wrong too
    if found_wrong(wrong_B):
        raise InputError(
            f"score {float(score_B[wrong_B][0])} is outside -1..1, where cosines lie; scale the scores into it"
        )
    return nn.functional.mse_loss((left_BD * right_BD).sum(-1), score_B)
