"""The cosine of each of many pairs of vectors."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def cosines(left: NDArray[np.float32], right: NDArray[np.float32]) -> NDArray[np.float64]:
    """Cosine of each pair of rows, float64 [N]; 0 where a vector is all zeros."""
    a, b = left.astype(np.float64), right.astype(np.float64)
    norms = np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
    return np.divide((a * b).sum(axis=1), norms, out=np.zeros(len(a)), where=norms > 0)
