"""The cosine of each of many pairs of vectors."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from raytower.errors import InputError


def cosines(left: NDArray[np.float32], right: NDArray[np.float32]) -> NDArray[np.float64]:
    """Cosine of each pair of rows, float64 [N]; 0 where a vector is all zeros.

    Raises:
        InputError: a vector holds NaN or infinity, which is no reason for a cosine of 0.
    """
    a, b = left.astype(np.float64), right.astype(np.float64)
    norms = np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
    broken = np.flatnonzero(~np.isfinite(norms))
    if len(broken):
        raise InputError(
            f"a vector of pair number {int(broken[0])} holds NaN or infinity, which has no cosine; check the encoder "
            "that made it"
        )
    return np.divide((a * b).sum(axis=1), norms, out=np.zeros(len(a)), where=norms > 0)


def pair_cosines(left: NDArray[np.float32], right: NDArray[np.float32]) -> NDArray[np.float64]:
    """Cosine of each pair of rows (N, D), float64 [N], for answers, where every pair must have one.

    Raises:
        InputError: the two differ in shape, or a vector is zero, or not finite; its pair and side are named.
    """
    if left.shape != right.shape or left.ndim != 2:
        raise InputError(
            f"vectors of shape {left.shape} and {right.shape}; pairs need two of one shape (N, D)"
        )
    for side, vectors in (("first", left), ("second", right)):
        # NaN where a vector holds it, infinity where it holds that.
        lengths = np.linalg.norm(vectors.astype(np.float64), axis=1)
        unusable = np.flatnonzero(~(np.isfinite(lengths) & (lengths > 0)))
        if len(unusable):
            bad = int(unusable[0])
            what = "is zero" if lengths[bad] == 0 else "holds NaN or infinity"
            raise InputError(
                f"pairs[{bad}]: the vector of its {side} text {what}, which has no cosine; check the text, and the "
                "encoder that made it"
            )
    return cosines(left, right)
