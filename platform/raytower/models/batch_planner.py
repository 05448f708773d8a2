"""Cutting a list of texts into forward batches: sorted by length, bounded by a token budget. Pure, no torch.

`plan_batches` fills each batch up, for texts that are computed one by one. `plan_chunks` weighs padding against the
cost of one more pass, for a batch that is trained on as a whole.
"""

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


# Of more rows cuts lie at multiples of a few, so that planning takes milliseconds whatever the batch.
_EXACT_ROWS = 2048


def plan_chunks(
    lengths: list[int] | NDArray[np.int64],
    tokens_per_chunk: int,
    tokens_per_launch: int,
    rows_per_chunk: int | None = None,
) -> BatchPlan:
    """Group texts of similar length so that padded tokens and launches together cost least.

    A chunk costs its padded tokens (rows x longest) and one launch. Of the lengths 9 9 1 1 1 1 and a launch of 10, one
    chunk costs 54 + 10, and the two chunks 9 9 and 1 1 1 1 cost 18 + 4 + 20. Dynamic programming over the sorted texts,
    from the shortest on: what begins at a text costs its chunk, over all ends of it, and what begins behind that end.

    Args:
        lengths: tokens of each text, in input order.
        tokens_per_chunk: most padded tokens of a chunk; one text longer than that goes alone.
        tokens_per_launch: padded tokens that take as long as one more chunk.
        rows_per_chunk: most texts of a chunk; None leaves the tokens as the only bound.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    num_rows = len(sizes)
    if not num_rows:
        return BatchPlan(batches=[], num_tokens=0, num_padded_tokens=0)
    order = np.argsort(-sizes, kind="stable")
    widths = np.maximum(sizes[order], 1)
    most_rows = np.clip(tokens_per_chunk // widths, 1, rows_per_chunk)
    step = max(min(num_rows // _EXACT_ROWS, int(most_rows[0])), 1)
    # Where a chunk may begin, with the end of all behind; `last` is the farthest of these at which it may end.
    places = np.append(np.arange(0, num_rows, step), num_rows)
    last = np.searchsorted(places, places[:-1] + most_rows[places[:-1]], side="right") - 1
    least = np.zeros(len(places), dtype=np.int64)
    ends = np.zeros(len(places), dtype=np.int64)
    for begin in range(len(places) - 2, -1, -1):
        possible = slice(begin + 1, int(last[begin]) + 1)
        costs = least[possible] + (places[possible] - places[begin]) * widths[places[begin]]
        best = int(costs.argmin())
        least[begin] = costs[best] + tokens_per_launch
        ends[begin] = begin + 1 + best
    batches: list[NDArray[np.int64]] = []
    begin = 0
    while begin < len(places) - 1:
        batches.append(order[places[begin] : places[ends[begin]]])
        begin = int(ends[begin])
    padded = int(least[0]) - len(batches) * tokens_per_launch
    return BatchPlan(batches=batches, num_tokens=int(sizes.sum()), num_padded_tokens=padded)
