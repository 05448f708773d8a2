"""A classifier's logits as probabilities, and its labels in their order. No torch.

Shape legend: N texts, C labels, K of them listed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
from numpy.typing import NDArray


def softmax(logits_NC: NDArray[np.float32]) -> NDArray[np.float32]:
    """Probabilities (N, C) of logits (N, C); each row sums to 1."""
    powers_NC = np.exp(logits_NC - logits_NC.max(axis=1, keepdims=True))
    return cast("NDArray[np.float32]", powers_NC / powers_NC.sum(axis=1, keepdims=True))


def rank_classes(
    labels: Sequence[str], logits_NC: NDArray[np.float32], top_k: int | None = None
) -> tuple[list[list[str]], NDArray[np.float32]]:
    """The C labels by falling probability for each row of logits (N, C), and those probabilities, float32 (N, K).

    Labels of equal probability keep the order of `labels`. K is `top_k`, or C where that is less or None.
    """
    probabilities_NC = softmax(logits_NC)
    order_NK = np.argsort(-probabilities_NC, axis=1, kind="stable")[:, :top_k]
    ranked = [[labels[place] for place in row] for row in order_NK.tolist()]
    return ranked, np.take_along_axis(probabilities_NC, order_NK, axis=1)
