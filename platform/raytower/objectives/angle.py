"""AnglE: CoSENT over a similarity whose gradient does not vanish where cosines come near 1 and -1.

A vector of D dimensions is taken for D/2 complex numbers: dimension k is the real part, dimension k + D/2 the imaginary
one. For the unit-length vectors x + iy and u + iv of a pair:

    s = | sum of (x·u + y·v) + sum of (y·u - x·v) |,    loss as in objectives/cosent.py

The first sum is the cosine. The second one, the imaginary part of their quotient, changes fastest where the cosine
changes least. If D is odd, the last real part has no imaginary one.

    columns      left texts (B, D), right texts (B, D), of unit length
    targets      labels (B,), the scores, of which the order counts

Use it as cosent, where most pairs are already near 1 or near 0. A finished encoder is searched by cosines, which this
similarity follows but is not: compare both on dev pairs. Siblings: cosent, cosine_regression.
Source: Li and Li 2024 (AnglE), with the signs and the absolute value of the authors' code. The paper adds this loss to
CoSENT and in-batch negatives; here it stands alone.

Shape legend: B pairs of this worker, D embedding dimension.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from raytower.objectives.config import AnglE
from raytower.objectives.cosent import order_loss
from raytower.objectives.targets import Targets


def angle(settings: AnglE, columns: Sequence[Tensor], targets: Targets) -> Tensor:
    """Loss of the whole batch, a scalar and the same on every worker: two columns (B, D) and labels (B,).

    Raises:
        InputError: a score is not finite.
    """
    left_BD, right_BD = columns
    num_real = (left_BD.shape[-1] + 1) // 2
    left_imaginary, right_imaginary = left_BD[:, num_real:], right_BD[:, num_real:]
    num_paired = left_imaginary.shape[-1]
    left_real, right_real = left_BD[:, :num_paired], right_BD[:, :num_paired]
    turn_B = (left_imaginary * right_real - left_real * right_imaginary).sum(-1)
    return order_loss(settings, ((left_BD * right_BD).sum(-1) + turn_B).abs(), targets)
