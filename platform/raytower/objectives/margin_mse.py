"""Margin MSE: the difference between two documents' similarities to a query is the teacher's difference.

For query i with documents d_1 … d_K, cosine similarities s and the teacher's scores t:

    loss_i = 1/(K-1) · sum over k = 2 … K of ( a·(s[i, d_1] - s[i, d_k]) - (t[i, 1] - t[i, k]) )²

with scale a. K counts the documents that the row has; a row with d_1 alone adds 0.

    columns      queries (B, D), then K ≥ 2 document columns (B, D), all of unit length
    targets      teacher's scores (B, K), in the order of the document columns

Use it to distil a teacher whose scores are not on the student's scale: only differences count. Hofstätter et al. have
a student of unbounded dot products, which follows any teacher with a = 1. Cosines differ by at most 2, so a fits the
teacher: training takes `fitting_scale` of the teacher's margins in a sample of the rows unless the config says another.
Siblings: kl_divergence compares whole distributions; in_batch_negatives needs no teacher.
Source: Hofstätter et al. 2020 (cross-architecture knowledge distillation).

Shape legend: B queries of this worker, K documents of each, D embedding dimension.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from raytower.errors import InputError
from raytower.objectives.config import MarginMSE
from raytower.objectives.targets import Targets, distilled, needed, present_documents

# Of the teacher's margins this share is below the scale, so that a few odd rows do not stretch it.
_FITTED_SHARE = 0.95


def margin_mse(settings: MarginMSE, columns: Sequence[Tensor], targets: Targets) -> Tensor:
    """Mean loss, a scalar, over this worker's queries; columns (B, D), teacher's scores (B, K).

    Raises:
        InputError: fewer than two documents, no finite teacher score for each, or no scale.
    """
    scale = needed(settings.scale, "a scale, which training takes from the teacher's margins", settings.name)
    cosine_BK, teacher_BK = distilled(columns, targets, settings.name)
    present_BK = present_documents(targets, cosine_BK)[:, 1:]
    error_BK = scale * (cosine_BK[:, :1] - cosine_BK[:, 1:]) - (teacher_BK[:, :1] - teacher_BK[:, 1:])
    # Each row's mean first: a mean over all documents would depend on how the rows lie on the workers.
    sum_B = (error_BK.square() * present_BK).sum(-1)
    return (sum_B / present_BK.sum(-1).clamp(min=1)).mean()


def fitting_scale(margins: Tensor) -> float:
    """The scale that puts the teacher's margins where cosines differ: 95 % of them become differences of at most 1.

    A difference of 1 is that of an equal document from an unrelated one. A teacher on 0..1 that uses its range gets
    about 1, raw logits mostly 5 to 20. Two digits are kept, so that the precision of the teacher changes nothing.

    Args:
        margins: (M,) differences of the teacher's scores, of any sign.

    Raises:
        InputError: the teacher scores (nearly) all documents alike.
    """
    largest = float(margins.abs().double().quantile(_FITTED_SHARE))
    if not largest > 0:
        raise InputError(
            f"the teacher scores a query's first document and its others alike, in nearly all of {len(margins)} "
            "sampled comparisons: margin_mse has nothing to follow; check the scores, or take another teacher"
        )
    return float(f"{largest:.2g}")


def refuse_saturating_scale(scale: float, margins: Tensor) -> None:
    """Raise InputError where most of the teacher's margins (M,) lie beyond what cosines times `scale` can reach."""
    median = float(margins.abs().double().median())
    if median > 2 * scale:
        raise InputError(
            f"objective.scale is {scale:g}, so differences of cosines reach {2 * scale:g}, and most of the teacher's "
            f"margins are larger (median {median:.3g}): the loss would saturate; leave scale out, which takes "
            f"{fitting_scale(margins):g}, or set it so"
        )
