"""Recall, then rerank: order, scores, depth, and that one retriever serves several threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from types import SimpleNamespace

import numpy as np
import pytest

from raytower.errors import InputError
from raytower.models.fusion import Fusion
from raytower.retrieval.retriever import Candidate, EncodedQueries, Retriever, recall_by
from tests.support.evaluation_fakes import ListIndex, TableScorer, WordEncoder, candidates

TEXTS = {"1": "red", "2": "red red blue", "3": "blue", "4": "green"}
LOGITS = {"red": -1.0, "red red blue": 2.0, "blue": 5.0, "green": 0.0}


@pytest.fixture
def encoder() -> WordEncoder:
    return WordEncoder(["red", "blue", "green", "ask"])


def test_recall_alone_keeps_the_index_order(encoder: WordEncoder) -> None:
    retriever = Retriever(encoder, ListIndex(encoder, TEXTS))
    found = retriever.search(["red", "green"], k=2)
    assert [[hit.id for hit in hits] for hits in found.hits] == [["1", "2"], ["4", "1"]]
    first = found.hits[0]
    assert [hit.rank for hit in first] == [1, 2]
    assert first[1].score == first[1].recall_score == pytest.approx(2 / 5**0.5)
    assert first[0].rerank_score is None
    assert first[0].metadata == {"row": 0}
    assert not found.reranked
    assert set(found.timings_ms) == {"encode", "recall", "rerank", "total"}


def test_the_prefix_reaches_the_encoder_and_not_the_reranker(encoder: WordEncoder) -> None:
    scorer = TableScorer(LOGITS)
    Retriever(encoder, ListIndex(encoder, TEXTS), scorer, query_prefix="ask ").search(
        ["red"], k=1, recall_k=1
    )
    assert encoder.seen == ["ask red"]
    assert scorer.calls == [[("red", "red")]]


def test_reranking_orders_by_logit_and_scores_all_queries_in_one_call(encoder: WordEncoder) -> None:
    scorer = TableScorer(LOGITS)
    found = Retriever(encoder, ListIndex(encoder, TEXTS), scorer).search(["red", "blue"], k=2, recall_k=3)
    # "red" recalls red, red red blue, blue; "blue" recalls blue, red red blue, red.
    assert [[hit.id for hit in hits] for hits in found.hits] == [["3", "2"], ["3", "2"]]
    assert [hit.rerank_score for hit in found.hits[0]] == [5.0, 2.0]
    assert found.reranked
    assert len(scorer.calls) == 1
    assert len(scorer.calls[0]) == 6


def test_fused_scores_by_hand(encoder: WordEncoder) -> None:
    fusion = Fusion(weight=0.25, recall_mean=0.5, recall_std=0.5, rerank_mean=1.0, rerank_std=2.0)
    retriever = Retriever(encoder, ListIndex(encoder, TEXTS), TableScorer(LOGITS), fusion)
    hits = retriever.search(["red"], k=3, recall_k=3).hits[0]
    by_id = {hit.id: hit.score for hit in hits}
    assert by_id["1"] == pytest.approx(0.75 * (1 - 0.5) / 0.5 + 0.25 * (-1 - 1) / 2)
    assert by_id["3"] == pytest.approx(0.75 * (0 - 0.5) / 0.5 + 0.25 * (5 - 1) / 2)
    assert [hit.score for hit in hits] == sorted(by_id.values(), reverse=True)


def test_what_is_not_reranked_follows_in_recall_order_with_falling_scores() -> None:
    items = candidates({"a": 0.9, "b": 0.8, "c": 0.7, "d": 0.4})
    retriever = Retriever(WordEncoder(["x"]), scorer=TableScorer({"a": -3.0, "b": 4.0}))
    hits = retriever.rerank(["q"], [items], recall_k=2)[0]
    assert [hit.id for hit in hits] == ["b", "a", "c", "d"]
    assert [hit.score for hit in hits] == pytest.approx([4.0, -3.0, -3.1, -3.4])
    assert [hit.rerank_score for hit in hits] == [4.0, -3.0, None, None]
    assert [hit.rank for hit in hits] == [1, 2, 3, 4]


def test_equal_scores_keep_the_recall_order() -> None:
    items = candidates({"b": 0.9, "a": 0.8, "c": 0.7})
    retriever = Retriever(WordEncoder(["x"]), scorer=TableScorer({"a": 1.0, "b": 1.0, "c": 2.0}))
    assert [hit.id for hit in retriever.rerank(["q"], [items], 3)[0]] == ["c", "b", "a"]


def test_recall_may_come_from_elsewhere(encoder: WordEncoder) -> None:
    asked: list[tuple[tuple[int, ...], int]] = []

    def shards_apart(queries: EncodedQueries, k: int) -> list[list[Candidate]]:
        assert queries.vectors is not None
        asked.append((queries.vectors.shape, k))
        return [candidates({"blue": 0.2, "red": 0.1})[:k] for _ in queries.texts]

    retriever = Retriever(encoder, scorer=TableScorer(LOGITS), recall=shards_apart)
    found = retriever.search(["red", "blue"], k=1, recall_k=7)
    assert asked == [((2, 4), 7)]
    assert [hits[0].id for hits in found.hits] == ["blue", "blue"]
    only_red = retriever.search(
        ["red"], k=1, rerank=False, recall=lambda queries, k: [candidates({"red": 1.0})]
    )
    assert only_red.hits[0][0].id == "red"
    assert len(asked) == 1


def test_queries_without_candidates_and_no_queries(encoder: WordEncoder) -> None:
    retriever = Retriever(
        encoder, scorer=TableScorer(LOGITS), recall=lambda queries, k: [[] for _ in queries.texts]
    )
    assert retriever.search(["red", "blue"]).hits == [[], []]
    assert retriever.search([]).hits == []


def test_k_beyond_the_index_gives_what_there_is(encoder: WordEncoder) -> None:
    retriever = Retriever(encoder, ListIndex(encoder, TEXTS), TableScorer(LOGITS))
    for rerank in (True, False):
        assert len(retriever.search(["red"], k=50, recall_k=50, rerank=rerank).hits[0]) == 4


def test_refusals(encoder: WordEncoder) -> None:
    retriever = Retriever(encoder)
    with pytest.raises(InputError, match="neither an index nor a recall"):
        retriever.search(["red"])
    with pytest.raises(InputError, match="k is 0"):
        retriever.search(["red"], k=0)
    with pytest.raises(InputError, match="no reranker"):
        retriever.rerank(["red"], [[]], 1)


def test_threads_share_one_retriever(encoder: WordEncoder) -> None:
    """Two searches are at the same stage at once, so that whatever one left on the retriever the other would take."""
    index, meeting = ListIndex(encoder, TEXTS), Barrier(2, timeout=60)

    def recall(queries: EncodedQueries, k: int) -> list[list[Candidate]]:
        meeting.wait()
        return recall_by(index)(queries, k)

    def score(queries: list[str], documents: list[str]) -> np.ndarray:
        meeting.wait()
        return -np.equal(queries, documents).astype(np.float32)

    retriever = Retriever(encoder, scorer=SimpleNamespace(score=score), recall=recall)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda query: retriever.search([query], k=2, recall_k=2), ["red", "green"]))
    # "red" recalls 1 (red) and 2 (red red blue), "green" 4 (green) and 1 (red); what equals its query is put last.
    assert [[hit.id for hit in result.hits[0]] for result in found] == [["2", "1"], ["1", "4"]]
