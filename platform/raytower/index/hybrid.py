"""Hybrid search: the best documents by vectors and the best by words as one list.

Of each side so many documents are candidates. Where a document is a candidate of one side alone, its score on the other
is computed: the inner product with its vector in the table, or BM25 over its tokens. So every candidate has both, and
no default stands for a score that is not known. Two ways make one score of them:

    standardised       (1 - w) · z(dense) + w · z(lexical); z by mean and deviation over the candidates of this query
    reciprocal_ranks   (1 - w) / (60 + dense rank) + w / (60 + lexical rank)   (Cormack et al., SIGIR 2009)

Means and deviations are the query's own, so that nothing has to be tuned before. Constants from other queries, which
`models.fusion.Fusion` has for rerankers, measured the same (docs/results/hybrid.md), and would need dev queries.

Shape legend: Q queries, D embedding dimension, K hits a query, n candidates of one query.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raytower.errors import InputError
from raytower.index.hits import Hits, empty_hits
from raytower.index.kinds import Vectors
from raytower.index.manifest import IndexManifest
from raytower.index.reader import Filter, Index, prepare_queries
from raytower.index.rowmap import Rows
from raytower.index.search_config import HybridConfig, HybridWay
from raytower.models.search_mode import SearchMode

DEFAULT_WAY: HybridWay = "standardised"
# On 600 judged queries of zh_questions weights from .1 to .4 hardly differ (docs/results/hybrid.md).
DEFAULT_WEIGHT = 0.3
# Candidates of each side, at least: a list of few hits then begins as one of many. 100 find the same, and cost more.
LEAST_CANDIDATES = 50
_RANK_CONSTANT = 60
# Vectors that are read at once.
_ROWS_AT_ONCE = 16_384
Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class HybridFusion:
    """How the dense and the lexical score of a candidate become one; `weight` is the share of the lexical one.

    Raises:
        InputError: the weight is outside [0, 1].
    """

    way: HybridWay = DEFAULT_WAY
    weight: float = DEFAULT_WEIGHT

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1:
            raise InputError(
                f"the weight of lexical scores is {self.weight}; it must lie between 0 (dense alone) and 1 (lexical "
                "alone)"
            )

    @classmethod
    def of(cls, manifest: IndexManifest, config: HybridConfig) -> HybridFusion:
        """What a config asks for; what it leaves open as it was tuned for this index, or else as it is by default."""
        tuned = manifest.lexical.hybrid if manifest.lexical else None
        way = config.fusion or (tuned.fusion if tuned else DEFAULT_WAY)
        if config.weight is not None:
            return cls(way=way, weight=config.weight)
        return cls(way=way, weight=tuned.weight if tuned and tuned.fusion == way else DEFAULT_WEIGHT)

    def sides(self, dense: Floats, lexical: Floats) -> tuple[Floats, Floats]:
        """What each side gives a candidate (n,), before they are weighed."""
        if self.way == "standardised":
            return _standardised(dense), _standardised(lexical)
        found = lexical > 0  # a document without a word of the query has no rank among those that have one
        return 1 / (_RANK_CONSTANT + _ranks(dense)), found / (_RANK_CONSTANT + _ranks(lexical))

    def fuse(self, dense: Floats, lexical: Floats) -> Floats:
        """The scores (n,) of the candidates of one query by their dense and lexical ones, both (n,)."""
        by_vector, by_words = self.sides(dense, lexical)
        return (1 - self.weight) * by_vector + self.weight * by_words


@dataclass(frozen=True)
class Candidates:
    """The candidates of one query: rising rows of the table, and both scores of each, all (n,)."""

    rows: Rows
    dense: Floats
    lexical: Floats


@dataclass(frozen=True)
class HybridHits(Hits):
    """Hits whose `scores` are fused; `dense` and `lexical` are what they were fused from, both (Q, K), padded by 0."""

    dense: Vectors
    lexical: Vectors


def check_mode(manifest: IndexManifest, mode: SearchMode) -> None:
    """Raises InputError where a version cannot be searched so."""
    if mode != "dense" and manifest.lexical is None:
        raise InputError(
            f"mode is {mode}, and index version {manifest.version} has no lexical side; make one, which encodes "
            "nothing: `raytower index compact --lexical true`, or set mode to dense"
        )


def modes_of(manifest: IndexManifest, first: SearchMode = "dense") -> tuple[SearchMode, ...]:
    """How a version can be searched, the given mode first."""
    modes: tuple[SearchMode, ...] = ("dense",) if manifest.lexical is None else ("dense", "lexical", "hybrid")
    return (first, *(mode for mode in modes if mode != first))


def search_hybrid(
    index: Index,
    queries: Sequence[str],
    vectors: Vectors,
    k: int,
    fusion: HybridFusion,
    *,
    filter: Filter | None = None,
) -> HybridHits:
    """The best hits (Q, K), K at most k, of queries by their texts and vectors (Q, D).

    A query that shares no token with a document has the hits of its vector, in their order.

    Raises:
        InputError: as `Index.search` and `Index.search_lexical`.
    """
    depth = candidates_of_a_side(k)
    dense = index.search(vectors, depth, filter=filter)
    lexical = index.search_lexical(queries, depth, filter=filter)
    return best_of(unite(index, queries, vectors, dense, lexical), fusion, k)


def candidates_of_a_side(k: int) -> int:
    """How many hits are asked of each side for k hits of both."""
    return max(k, LEAST_CANDIDATES)


def unite(
    index: Index, queries: Sequence[str], vectors: Vectors, dense: Hits, lexical: Hits
) -> list[Candidates]:
    """The union of the hits of both sides for each query, with the scores that one side lacks computed.

    `index` needs the table and the lexical side; it may lack the shards, which other processes searched.
    """
    if not len(queries):
        return []
    by_vector = [_found(dense, number) for number in range(len(queries))]
    by_words = [_found(lexical, number) for number in range(len(queries))]
    rows = [np.union1d(one[0], other[0]) for one, other in zip(by_vector, by_words, strict=True)]
    # Scores of codes are about the vectors' own, and would not go with those of candidates by words.
    lacking = [
        all_rows if index.manifest.scores_codes else np.setdiff1d(all_rows, one[0])
        for all_rows, one in zip(rows, by_vector, strict=True)
    ]
    wordless = [np.setdiff1d(all_rows, one[0]) for all_rows, one in zip(rows, by_words, strict=True)]
    dense_scores = _dense_scores(index, prepare_queries(vectors, index.manifest), lacking)
    lexical_scores = index.lexical_scores(queries, wordless)
    return [
        Candidates(
            rows[number],
            _together(rows[number], by_vector[number], (lacking[number], dense_scores[number])),
            _together(rows[number], by_words[number], (wordless[number], lexical_scores[number])),
        )
        for number in range(len(queries))
    ]


def best_of(candidates: Sequence[Candidates], fusion: HybridFusion, k: int) -> HybridHits:
    """The best k candidates of each query; equal scores go by the vectors' score, then by row."""
    depth = min(k, max((len(each.rows) for each in candidates), default=0))
    empty = empty_hits(len(candidates), depth)
    shape = empty.rows.shape
    hits = HybridHits(empty.scores, empty.rows, np.zeros(shape, np.float32), np.zeros(shape, np.float32))
    for number, each in enumerate(candidates):
        fused = fusion.fuse(each.dense, each.lexical)
        order = np.lexsort((each.rows, -each.dense, -fused))[:k]
        place = (number, slice(len(order)))
        hits.scores[place], hits.rows[place] = fused[order], each.rows[order]
        hits.dense[place], hits.lexical[place] = each.dense[order], each.lexical[order]
    return hits


def _dense_scores(index: Index, prepared: Vectors, rows: Sequence[Rows]) -> list[Vectors]:
    """Inner products (n,) of each prepared query (Q, D) with the vectors of its rows (n,)."""
    unit = index.manifest.metric == "cosine"
    ends = np.cumsum([len(each) for each in rows])
    scores: list[Vectors] = []
    for part in np.split(np.arange(len(rows)), np.flatnonzero(np.diff(ends // _ROWS_AT_ONCE)) + 1):
        wanted = [rows[number] for number in part]
        distinct, places = np.unique(np.concatenate(wanted), return_inverse=True)
        found = (
            index.table.vectors(distinct, unit=unit)
            if len(distinct)
            else np.empty((0, index.dim), np.float32)
        )
        of_query = np.split(places, np.cumsum([len(each) for each in wanted])[:-1])
        scores += [found[at] @ prepared[number] for number, at in zip(part, of_query, strict=True)]
    return scores


def _found(hits: Hits, query: int) -> tuple[Rows, Vectors]:
    real = hits.rows[query] >= 0
    return hits.rows[query][real], hits.scores[query][real]


def _together(rows: Rows, *parts: tuple[Rows, Vectors]) -> Floats:
    """Scores (n,) of rising rows, each of which stands in one of the parts."""
    scores = np.zeros(len(rows), np.float64)
    for part_rows, part_scores in parts:
        scores[np.searchsorted(rows, part_rows)] = part_scores
    return scores


def _standardised(scores: Floats) -> Floats:
    """Less their mean, by their deviation; equal scores are 0, for their deviation is rounding noise."""
    if not len(scores):
        return scores
    deviation = float(scores.std())
    if deviation <= 1e-9 * max(1.0, float(np.abs(scores).max())):
        return np.zeros_like(scores)
    return (scores - scores.mean()) / deviation


def _ranks(scores: Floats) -> Floats:
    """From 1, best first; equal scores share the best of their ranks."""
    falling = np.sort(-scores)
    return np.searchsorted(falling, -scores, side="left").astype(np.float64) + 1
