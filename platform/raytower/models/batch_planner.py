"""Cutting a list of texts into forward batches: sorted by length, bounded by a token budget. Pure, no torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class BatchPlan:
    """`batches` are index arrays that together hold every text once, longest first."""

    batches: list[NDArray[np.int64]]
    num_tokens: int
    num_padded_tokens: int


def plan_batches(
    lengths: list[int] | NDArray[np.int64],
    tokens_per_batch: int,
    multiple: int = 1,
    rows_per_batch: int | None = None,
) -> BatchPlan:
    """Group texts of similar length so that each batch, padded to its longest text, keeps to the budget.

    Args:
        lengths: tokens of each text, in input order.
        tokens_per_batch: most padded tokens (rows x longest) of a batch; one text longer than that goes alone.
        multiple: widths are rounded up to a multiple of this (accelerators like 8).
        rows_per_batch: most texts of a batch; None leaves the budget as the only bound.

    The longest batch comes first, so that a budget that does not fit fails at once rather than at the end.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    order = np.argsort(-sizes, kind="stable")
    batches: list[NDArray[np.int64]] = []
    padded = 0
    start = 0
    while start < len(order):
        width = -(-max(int(sizes[order[start]]), 1) // multiple) * multiple
        count = min(max(tokens_per_batch // width, 1), rows_per_batch or len(order))
        batch = order[start : start + count]
        batches.append(batch)
        padded += width * len(batch)
        start += count
    return BatchPlan(batches=batches, num_tokens=int(sizes.sum()), num_padded_tokens=padded)
