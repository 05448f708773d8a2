"""The order of one query's recalled documents once a reranker has scored the first of them. No Ray, no torch.

Shape legend: K recalled candidates of a query, best first; n of them reranked.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raytower.models.fusion import Fusion

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Ranking:
    """`places` (k,) are positions among the candidates, best first; `scores` (k,) what they are ordered by."""

    places: NDArray[np.int64]
    scores: Floats


def rank(
    recall_scores: NDArray[np.floating],
    logits: NDArray[np.floating],
    fusion: Fusion | None,
    k: int | None = None,
) -> Ranking:
    """The first k of K candidates, the first n of them ordered by their logits (n,), fused if `fusion` says so.

    The candidates past n follow in recall order. Their scores continue from the lowest reranked score: each lies as far
    below it as its recall score lies below that of candidate n. So scores fall along the list. Without logits (n = 0)
    the order and the scores are those of recall.
    """
    recalled = np.asarray(recall_scores, dtype=np.float64)
    num_reranked = len(logits)
    if not num_reranked:
        return Ranking(np.arange(len(recalled))[:k], recalled[:k])
    head, tail = recalled[:num_reranked], recalled[num_reranked:]
    fused = np.asarray(logits, dtype=np.float64) if fusion is None else fusion.fuse(head, logits)
    order = np.argsort(-fused, kind="stable")  # stable: a tie keeps the recall order
    places = np.concatenate([order, np.arange(num_reranked, len(recalled))])
    scores = np.concatenate([fused[order], fused.min() - (head[-1] - tail)])
    return Ranking(places[:k], scores[:k])
