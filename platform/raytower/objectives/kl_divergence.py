"""KL divergence: the student spreads its belief over a query's documents as the teacher does.

For query i with documents d_1 … d_K, cosine similarities s and the teacher's scores t:

    P_i = softmax over k of t[i, k] / τ,    Q_i = softmax over k of a·s[i, d_k]
    loss_i = sum over k of P_i(k) · ( log P_i(k) - log Q_i(k) )

with the teacher's temperature τ and the student's scale a. The sums go over the documents that the row has.

    columns      queries (B, D), then K ≥ 2 document columns (B, D), all of unit length
    targets      teacher's scores (B, K), in the order of the document columns

Use it to distil a teacher over lists of candidates: the teacher's logits, or its cosines with τ = 1/a. A higher τ tells
more of the teacher's order among the lower documents. Siblings: margin_mse compares differences one by one;
in_batch_negatives needs no teacher.
Source: Hinton et al. 2015 (distillation); Ren et al. 2021 (RocketQAv2, listwise distillation into a retriever).

Shape legend: B queries of this worker, K documents of each, D embedding dimension.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from raytower.objectives.config import KLDivergence
from raytower.objectives.targets import Targets, distilled, present_documents


def kl_divergence(settings: KLDivergence, columns: Sequence[Tensor], targets: Targets) -> Tensor:
    """Mean loss, a scalar, over this worker's queries; columns (B, D), teacher's scores (B, K).

    Raises:
        InputError: fewer than two documents, or no finite teacher score for each.
    """
    cosine_BK, teacher_BK = distilled(columns, targets, settings.name)
    missing_BK = ~present_documents(targets, cosine_BK)

    def log_softmax(logits_BK: Tensor) -> Tensor:
        # A missing document has the share 0, whose logarithm would make the sum NaN: it counts as equal on both sides.
        return logits_BK.masked_fill(missing_BK, -torch.inf).log_softmax(-1).masked_fill(missing_BK, 0)

    return nn.functional.kl_div(
        log_softmax(settings.scale * cosine_BK),
        log_softmax(teacher_BK / settings.temperature),
        log_target=True,
        reduction="batchmean",
    )
