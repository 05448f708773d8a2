"""Tuning the share of lexical beside dense scores on queries with known answers.

Shape legend: Q queries, n candidates of one query.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from raytower.errors import InputError
from raytower.index.hybrid import Candidates, Floats, HybridFusion, unite
from raytower.index.reader import Index
from raytower.index.search_config import HybridWay
from raytower.index.table import ID
from raytower.metrics import MRR_DEPTH, reciprocal_rank
from raytower.progress import Progress
from raytower.retrieval.retriever import Retriever, num_spare
from raytower.retrieval.tune_fusion import WEIGHTS


@dataclass(frozen=True, kw_only=True)
class TunedHybrid:
    """A tuned way and weight, and MRR@10 on the queries: by vectors alone, by words alone, by both.

    `curve` has the MRR@10 at each of `WEIGHTS`. `num_wordless` counts queries that share no token with a document.
    """

    fusion: HybridFusion
    dense_mrr: float
    lexical_mrr: float
    fused_mrr: float
    curve: tuple[float, ...]
    num_wordless: int


def tune_hybrid(
    candidates: Sequence[Candidates],
    relevance: Sequence[NDArray[np.bool_]],
    way: HybridWay,
    kept: Sequence[NDArray[np.bool_]] | None = None,
) -> TunedHybrid:
    """The weight among 0, 0.05 … 1 with the highest MRR@10. Of equal ones the smallest, which trusts vectors more.

    Args:
        candidates: of each query.
        relevance: for each query whether its candidates are relevant, (n,).
        way: how both scores become one.
        kept: for each query which of its candidates may be answers, (n,); None for all. The others count for the
            scales of scores, as in a search whose hits are left out after it.

    Raises:
        InputError: there are no candidates.
    """
    if not any(len(each.rows) for each in candidates):
        raise InputError("no query has a candidate; a weight cannot be tuned on nothing")
    base = HybridFusion(way=way)
    sides = [base.sides(each.dense, each.lexical) for each in candidates]
    if kept is not None:
        sides = [(dense[mask], lexical[mask]) for (dense, lexical), mask in zip(sides, kept, strict=True)]
        relevance = [judged[mask] for judged, mask in zip(relevance, kept, strict=True)]
    curve = tuple(_mrr(weight, sides, relevance) for weight in WEIGHTS)
    # index() finds the first of equal values. Without rounding, a sum's order would break ties.
    values = [round(value, 12) for value in curve]
    best = values.index(max(values))
    return TunedHybrid(
        fusion=replace(base, weight=WEIGHTS[best]),
        dense_mrr=curve[0],
        lexical_mrr=curve[-1],
        fused_mrr=curve[best],
        curve=curve,
        num_wordless=sum(not each.lexical.any() for each in candidates),
    )


def tune_hybrid_on_queries(
    retriever: Retriever,
    queries: Sequence[str],
    relevant: Sequence[Mapping[str, float]],
    way: HybridWay,
    recall_k: int = 100,
    queries_at_once: int = 256,
    own: Sequence[Collection[str]] = (),
) -> TunedHybrid:
    """Search `queries` by vectors and by words, and tune on the union of both.

    Args:
        retriever: has an encoder and an index with a lexical side.
        queries: dev queries, never the ones that are evaluated later.
        relevant: judgement by document id, for each query; above 0 is relevant.
        way: how both scores become one.
        recall_k: candidates of each side.
        queries_at_once: queries that are encoded and searched together.
        own: ids of documents that are no answer, for each query; see `Judgements.own`.
    """
    index = retriever.index
    assert index is not None
    candidates: list[Candidates] = []
    relevance: list[NDArray[np.bool_]] = []
    kept: list[NDArray[np.bool_]] = []
    depth = recall_k + num_spare(own)
    progress = Progress("searched", "queries", len(queries))
    for start in range(0, len(queries), queries_at_once):
        batch = list(queries[start : start + queries_at_once])
        vectors = retriever.encode(batch).vectors
        assert vectors is not None
        dense, lexical = index.search(vectors, depth), index.search_lexical(batch, depth)
        found = unite(index, batch, vectors, dense, lexical)
        candidates += found
        ids = _ids_of(index, found)
        for place, each in enumerate(ids, start):
            out = own[place] if own else ()
            relevance.append(np.array([relevant[place].get(doc_id, 0.0) > 0 for doc_id in each], np.bool_))
            kept.append(np.array([doc_id not in out for doc_id in each], np.bool_))
        progress.advance(len(batch))
    return tune_hybrid(candidates, relevance, way, kept)


def _ids_of(index: Index, candidates: Sequence[Candidates]) -> list[list[str]]:
    """The ids of the documents of each query's candidates."""
    rows = np.unique(np.concatenate([each.rows for each in candidates]))
    ids = index.table.take(rows, [ID])[ID].to_pylist()
    return [[ids[place] for place in np.searchsorted(rows, each.rows)] for each in candidates]


def _mrr(
    weight: float, sides: Sequence[tuple[Floats, Floats]], relevance: Sequence[NDArray[np.bool_]]
) -> float:
    """MRR@10 of the candidates ordered as a search orders them: equal ones by the vectors' score, then by row."""
    ranked = np.zeros((len(sides), MRR_DEPTH), np.bool_)
    for number, ((by_vector, by_words), judged) in enumerate(zip(sides, relevance, strict=True)):
        fused = (1 - weight) * by_vector + weight * by_words
        order = np.lexsort((-by_vector, -fused))[:MRR_DEPTH]
        ranked[number, : len(order)] = judged[order]
    return float(reciprocal_rank(ranked).mean())
