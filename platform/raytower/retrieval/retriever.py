"""Recall, then rerank: texts in, ranked documents out. Jobs and the server share it; it imports no Ray.

A search changes no state of a `Retriever`, so threads may share one if they may share its parts.
Shape legend: Q queries, D embedding dimension, K candidates a query.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from raytower.errors import InputError
from raytower.index.hits import Hits
from raytower.index.hybrid import HybridFusion, HybridHits, search_hybrid
from raytower.index.reader import Filter, Index
from raytower.models.fusion import Fusion
from raytower.models.search_mode import SearchMode
from raytower.retrieval.ranking import rank

Vectors = NDArray[np.float32]
# Of a query with more documents to leave out, fewer than asked for may remain.
_MOST_SPARE = 1_000


class TextEncoder(Protocol):
    """The encoder of a retriever, such as a `ForwardEngine`."""

    def encode(self, texts: Sequence[str], prefix: str = "") -> Vectors:
        """Vectors of the texts, float32 [Q, D], with `prefix` put before each text."""


class PairScorer(Protocol):
    """The reranker of a retriever, such as a `CrossScorer`."""

    def score(self, queries: Sequence[str], documents: Sequence[str]) -> NDArray[np.float32]:
        """One raw logit for each pair of a query and a document, float32 [pairs]."""


@dataclass(frozen=True, slots=True)
class EncodedQueries:
    """Queries, and their vectors float32 [Q, D]; None where they are searched for by their words alone."""

    texts: Sequence[str]
    vectors: Vectors | None


@dataclass(frozen=True, slots=True)
class Candidate:
    """A recalled document, its recall score (higher is better) and its row in the index.

    The recall score is, by mode: dense, the inner product or cosine; lexical, BM25; hybrid, what was fused of both (see
    `raytower.index.hybrid`), which says something among the documents of one query only. `dense_score` and
    `lexical_score` are None where the mode has none.
    """

    id: str
    text: str
    metadata: dict[str, Any]
    score: float
    row: int = -1
    dense_score: float | None = None
    lexical_score: float | None = None


@dataclass(frozen=True, slots=True)
class Hit:
    """One result. Hits are ordered by `score`; `rank` counts from 1."""

    id: str
    text: str
    metadata: dict[str, Any]
    recall_score: float
    rerank_score: float | None
    score: float
    rank: int


@dataclass(frozen=True, slots=True)
class SearchResult:
    """Hits of each query, best first, and milliseconds by stage (`encode`, `recall`, `rerank`, `total`).

    `num_wordless` counts the queries that share no token with a document they could find: in mode hybrid they have the
    hits of mode dense, in mode lexical none, and in mode dense nobody looks.
    """

    hits: list[list[Hit]]
    reranked: bool
    timings_ms: dict[str, float]
    num_wordless: int = 0


# (queries, depth K) → at most K candidates a query, best first.
Recall = Callable[[EncodedQueries, int], list[list[Candidate]]]


def index_recall(
    index: Index, filter: Filter | None = None
) -> Callable[[Vectors, int], list[list[Candidate]]]:
    """Recall by vectors float32 [Q, D] from an opened index, among the documents that `filter` lets through."""
    return lambda vectors, k: _candidates(index, index.search(vectors, k, filter=filter))


def recall_by(
    index: Index,
    mode: SearchMode = "dense",
    fusion: HybridFusion | None = None,
    filter: Filter | None = None,
) -> Recall:
    """Recall from an opened index by vectors, by words or by both, among the documents that `filter` lets through.

    `fusion` is for mode hybrid; None is the default one.
    """

    def recall(queries: EncodedQueries, k: int) -> list[list[Candidate]]:
        if mode == "lexical":
            return _candidates(index, index.search_lexical(queries.texts, k, filter=filter), is_lexical=True)
        assert queries.vectors is not None, "only mode lexical does without vectors"
        if mode == "dense":
            return _candidates(index, index.search(queries.vectors, k, filter=filter))
        mixed = search_hybrid(
            index, queries.texts, queries.vectors, k, fusion or HybridFusion(), filter=filter
        )
        return _candidates(index, mixed)

    return recall


def _candidates(index: Index, found: Hits, *, is_lexical: bool = False) -> list[list[Candidate]]:
    real = found.rows >= 0  # [Q, K]; short answers end in padding
    # All documents in one call: fetching them query by query costs more than the search.
    rows, scores = found.rows[real], found.scores[real].tolist()
    none: list[float | None] = [None] * len(rows)
    dense, lexical = none, none
    if isinstance(found, HybridHits):
        dense, lexical = found.dense[real].tolist(), found.lexical[real].tolist()
    elif is_lexical:
        lexical = scores
    else:
        dense = scores
    flat = [
        Candidate(document.id, document.text, document.metadata, *values)
        for document, *values in zip(
            index.documents(rows), scores, rows.tolist(), dense, lexical, strict=True
        )
    ]
    ends = np.cumsum(real.sum(axis=1)).tolist()
    return [flat[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def num_spare(left_out: Sequence[Collection[str]]) -> int:
    """How much deeper to look, so that as many candidates remain where `without_own` leaves out those of a query."""
    return min(max(map(len, left_out), default=0), _MOST_SPARE)


def without_own(
    candidates: Sequence[Sequence[Candidate]], left_out: Sequence[Collection[str]], k: int
) -> list[list[Candidate]]:
    """At most `k` candidates of each query, without those whose id is left out of its list; none is, where none is
    given."""
    if not left_out:
        return [list(items[:k]) for items in candidates]
    return [
        [item for item in items if item.id not in out][:k]
        for out, items in zip(left_out, candidates, strict=True)
    ]


def count_wordless(candidates: Sequence[Sequence[Candidate]], mode: SearchMode) -> int:
    """How many queries found no document by a word; see `SearchResult`."""
    return (
        0 if mode == "dense" else sum(not any(item.lexical_score for item in items) for items in candidates)
    )


class Retriever:
    """Encodes queries, recalls candidates and, given a scorer, reranks them.

    Args:
        encoder: the query tower; None where queries are searched for by their words alone.
        index: an opened Index; None where every search brings its own recall.
        scorer: the reranker, or None for recall alone.
        fusion: how recall scores and rerank logits are mixed; None orders by the logit alone.
        query_prefix: put before each query when it is encoded; words are looked up, and reranked, without it.
        recall: replaces recall from `index`, for shards that other processes hold.
        mode: how `index` is searched.
        hybrid: how mode hybrid makes one score of two; None is the default.
    """

    def __init__(
        self,
        encoder: TextEncoder | None,
        index: Index | None = None,
        scorer: PairScorer | None = None,
        fusion: Fusion | None = None,
        *,
        query_prefix: str = "",
        recall: Recall | None = None,
        mode: SearchMode = "dense",
        hybrid: HybridFusion | None = None,
    ) -> None:
        self.encoder = encoder
        self.index = index
        self.scorer = scorer
        self.fusion = fusion
        self.query_prefix = query_prefix
        self.mode = mode
        self.hybrid = hybrid
        self._recall = recall or (recall_by(index, mode, hybrid) if index is not None else None)

    def search(
        self,
        queries: Sequence[str],
        *,
        k: int = 10,
        recall_k: int = 100,
        rerank: bool = True,
        recall: Recall | None = None,
    ) -> SearchResult:
        """The best `k` documents of each query.

        Args:
            queries: texts; none gives no lists.
            k: hits a query; fewer come back where the index holds fewer.
            recall_k: documents that the first stage recalls for each query; all of them are reranked. Where it is
                below `k`, the rest of the `k` follow in recall order. Without reranking only `k` are recalled.
            rerank: False leaves the reranker out; so does a retriever without one.
            recall: replaces the recall of this search alone, for instance by one with a filter.

        Raises:
            InputError: `k` or `recall_k` is below 1, or there is neither an index nor a recall.
        """
        if k < 1 or recall_k < 1:
            raise InputError(f"k is {k} and recall_k is {recall_k}; both must be 1 or more")
        reranks = rerank and self.scorer is not None
        times = [time.perf_counter()]
        encoded = self.encode(queries)
        times.append(time.perf_counter())
        candidates = self.recall(encoded, max(k, recall_k) if reranks else k, recall)
        times.append(time.perf_counter())
        if reranks:
            ranked = self.rerank(queries, candidates, recall_k)
        else:
            ranked = [recall_order(items) for items in candidates]
        times.append(time.perf_counter())
        stages = zip(("encode", "recall", "rerank"), itertools.pairwise(times), strict=True)
        timings = {name: (end - start) * 1000 for name, (start, end) in stages}
        if not reranks:
            timings["rerank"] = 0.0
        timings["total"] = (times[-1] - times[0]) * 1000
        wordless = count_wordless(candidates, self.mode)
        return SearchResult([hits[:k] for hits in ranked], reranks, timings, wordless)

    def encode(self, queries: Sequence[str]) -> EncodedQueries:
        """Queries with their vectors, for which the query prefix is put before each text; no encoder, no vectors."""
        texts = list(queries)
        return EncodedQueries(
            texts, None if self.encoder is None else self.encoder.encode(texts, self.query_prefix)
        )

    def recall(self, queries: EncodedQueries, k: int, recall: Recall | None = None) -> list[list[Candidate]]:
        """At most `k` candidates for each query, best first. Raises InputError without index and recall."""
        way = recall or self._recall
        if way is None:
            raise InputError("this retriever has neither an index nor a recall function; give one of them")
        return way(queries, k) if queries.texts else []

    def rerank(
        self, queries: Sequence[str], candidates: Sequence[Sequence[Candidate]], recall_k: int
    ) -> list[list[Hit]]:
        """All candidates of each query, the first `recall_k` of them ordered by their new score.

        The candidates past `recall_k` follow in recall order. Their scores continue from the lowest reranked score:
        each lies as far below it as its recall score lies below that of candidate `recall_k`. So scores fall along
        the list.
        """
        heads = [items[:recall_k] for items in candidates]
        logits = self.score(queries, heads)
        return [
            self._order(head, items[recall_k:], scores)
            for items, head, scores in zip(candidates, heads, logits, strict=True)
        ]

    def score(
        self, queries: Sequence[str], candidates: Sequence[Sequence[Candidate]]
    ) -> list[NDArray[np.float32]]:
        """The reranker's raw logits [K] of each query's candidates, in their order; one call scores all pairs.

        Raises:
            InputError: this retriever has no reranker.
        """
        if self.scorer is None:
            raise InputError("this retriever has no reranker; give it a scorer, or search with rerank false")
        pair_queries = [query for query, items in zip(queries, candidates, strict=True) for _ in items]
        logits = self.scorer.score(pair_queries, [item.text for items in candidates for item in items])
        return np.split(logits, np.cumsum([len(items) for items in candidates])[:-1]) if candidates else []

    def _order(
        self, head: Sequence[Candidate], tail: Sequence[Candidate], logits: NDArray[np.float32]
    ) -> list[Hit]:
        items = [*head, *tail]
        ranking = rank(np.array([item.score for item in items]), logits, self.fusion)
        return [
            _hit(items[place], number, score, float(logits[place]) if place < len(head) else None)
            for number, (place, score) in enumerate(
                zip(ranking.places.tolist(), ranking.scores.tolist(), strict=True), start=1
            )
        ]


def recall_order(candidates: Sequence[Candidate]) -> list[Hit]:
    """Candidates as hits in the order they were recalled; the score is the recall score."""
    return [_hit(item, rank, item.score) for rank, item in enumerate(candidates, start=1)]


def _hit(item: Candidate, rank: int, score: float, rerank_score: float | None = None) -> Hit:
    return Hit(item.id, item.text, item.metadata, item.score, rerank_score, score, rank)
