"""Hits of queries, and the merge of many answers.

Shape legend: Q queries, K hits a query.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raytower.errors import InputError
from raytower.index.kinds import Vectors

# So few scores, those of one query, are sorted by two keys at once in less time than NumPy takes to be called often.
_FEW = 1_024


@dataclass(frozen=True)
class Hits:
    """Hits of Q queries, best first: scores and the numbers of the rows in the table, each (Q, K).

    A query with fewer hits than another ends in padding: score -inf, row -1.
    """

    scores: Vectors
    rows: NDArray[np.int64]


def merge_hits(parts: Sequence[Hits], k: int) -> Hits:
    """The best k of several answers, each (Q, any depth), to the same queries; equal scores go by row.

    Raises:
        InputError: there is no answer.
    """
    if not parts:
        raise InputError("there are no answers to merge; at least one shard must have answered")
    scores = np.concatenate([part.scores for part in parts], axis=1)
    rows = np.concatenate([part.rows for part in parts], axis=1)
    if scores.size <= _FEW:
        order = np.lexsort((rows, -scores), axis=1)[:, :k]
    else:
        order = _order_by_score(scores)
        ranked = np.take_along_axis(scores, order, 1)
        # Only queries with equal scores, wherever those fall, need the slower sort by two keys.
        tied = np.flatnonzero((ranked[:, 1:] == ranked[:, :-1]).any(axis=1))
        if len(tied):
            order[tied] = np.lexsort((rows[tied], -scores[tied]), axis=1)
        order = order[:, :k]
    queries = np.arange(len(scores))[:, None]
    return Hits(scores[queries, order], rows[queries, order])


def empty_hits(num_queries: int, depth: int) -> Hits:
    """Nothing but padding, (num_queries, depth)."""
    shape = (num_queries, depth)
    return Hits(np.full(shape, -np.inf, np.float32), np.full(shape, -1, np.int64))


def spread_hits(hits: Hits, queries: NDArray[np.int64], num_queries: int) -> Hits:
    """Hits (num_queries, depth): those of the queries with these numbers, (Q,), and padding for the others."""
    spread = empty_hits(num_queries, hits.scores.shape[1])
    spread.scores[queries], spread.rows[queries] = hits.scores, hits.rows
    return spread


def _order_by_score(scores: Vectors) -> NDArray[np.int64]:
    """Column numbers (Q, K) by falling score.

    One sort of integers does it: the upper half holds the score's bits, turned so that they rise as it falls, the
    lower half the column. That is several times faster than sorting indices by floats.
    """
    bits = (scores + np.float32(0)).view(np.uint32)  # adding zero makes -0.0 equal to 0.0
    rising = np.where(bits >> 31, bits, ~(bits | np.uint32(1 << 31)))
    keys = (rising.astype(np.uint64) << np.uint64(32)) | np.arange(scores.shape[1], dtype=np.uint64)
    keys.sort(axis=1)
    return (keys & np.uint64(0xFFFFFFFF)).astype(np.int64)
