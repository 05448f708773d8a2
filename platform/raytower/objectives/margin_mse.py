"""Margin MSE: the difference between two documents' similarities to a query is the teacher's difference.

For query i with documents d_1 … d_K, cosine similarities s and the teacher's scores t:

    loss_i = 1/(K-1) · sum over k = 2 … K of ( a·(s[i, d_1] - s[i, d_k]) - (t[i, 1] - t[i, k]) )²

with scale a.

    columns      queries (B, D), then K ≥ 2 document columns (B, D), all of unit length
    targets      teacher's scores (B, K), in the order of the document columns

Use it to distil a teacher whose scores are not on the student's scale: only differences count. Cosines differ by at
most 2, so 2·a should reach the teacher's largest difference: a = 1 for a teacher on 0..1 or -1..1, about 10 for raw
logits. Siblings: kl_divergence compares whole distributions; in_batch_negatives needs no teacher.
Source: Hofstätter et al. 2020 (cross-architecture knowledge distillation).

Shape legend: B queries of this worker, K documents of each, D embedding dimension.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from raytower.objectives.config import MarginMSE
from raytower.objectives.targets import Targets, distilled


def margin_mse(settings: MarginMSE, columns: Sequence[Tensor], targets: Targets) -> Tensor:
    """Mean loss, a scalar, over this worker's queries; columns (B, D), teacher's scores (B, K).

    Raises:
        InputError: fewer than two documents, or no finite teacher score for each.
    """
    cosine_BK, teacher_BK = distilled(columns, targets, settings.name)
    student_margins = settings.scale * (cosine_BK[:, :1] - cosine_BK[:, 1:])  # (B, K-1)
    return nn.functional.mse_loss(student_margins, teacher_BK[:, :1] - teacher_BK[:, 1:])
