"""CoSENT: a pair with a higher score is more similar than a pair with a lower one.

For pairs of texts with scores y and cosine similarities s, over all pairs i, j of the batch, on whatever worker:

    loss = log( 1 + sum over i, j with y_i > y_j of exp(a·(s_j - s_i)) )

with scale a. Only the order of the scores counts: they may lie on any scale, 0 to 5 as well as 0 and 1.

    columns      left texts (B, D), right texts (B, D), of unit length
    targets      labels (B,), the scores

Use it with graded similarity (STS), where Spearman's correlation is what is measured: cosines need not become the
scores, they need their order. It compares the pairs of a batch, so larger batches teach more. Siblings:
cosine_regression looks at each pair by itself; angle compares angles in place of cosines.
Source: Su 2022; Huang et al. 2024 (CoSENT).

With the pairs sorted by falling score, the inner sum of pair j is exp(a·s_j) times a running sum of exp(-a·s_i) over
the pairs before it whose score is higher: time N·log N, memory N, and workers exchange one number a pair.

Shape legend: B pairs of this worker, N pairs of all workers, D embedding dimension.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from raytower.collectives import gather_constants, gather_rows
from raytower.errors import InputError
from raytower.objectives.config import AnglE, CoSENT
from raytower.objectives.targets import Targets, found_wrong, needed


def cosent(settings: CoSENT, columns: Sequence[Tensor], targets: Targets) -> Tensor:
    """Loss of the whole batch, a scalar and the same on every worker: two columns (B, D) and labels (B,).

    Raises:
        InputError: a score is not finite.
    """
    left_BD, right_BD = columns
    return order_loss(settings, (left_BD * right_BD).sum(-1), targets)


def order_loss(settings: CoSENT | AnglE, similarity_B: Tensor, targets: Targets) -> Tensor:
    """The formula above, a scalar, of any similarities (B,) and the labels of `targets`. Raises as `cosent`."""
    label_B = needed(targets.labels_B, "scores", settings.name).to(similarity_B.device)
    wrong_B = ~label_B.isfinite()
    if found_wrong(wrong_B):
        raise InputError(f"score {float(label_B[wrong_B][0])} is not finite; score the pair again")
    label_N, order_N = gather_constants(label_B).sort(descending=True)
    scaled_N = settings.scale * gather_rows(similarity_B)[order_N]
    # Scores 5 3 3 1 have 0 1 1 3 pairs above them: equal scores say nothing of each other.
    num_above_N = torch.searchsorted(-label_N, -label_N)
    running = nn.functional.pad(torch.logcumsumexp(-scaled_N, 0), (1, 0), value=-torch.inf)
    terms_N = scaled_N + running[num_above_N]
    return nn.functional.pad(terms_N, (1, 0)).logsumexp(0)  # exp(0) is the 1 of the formula
