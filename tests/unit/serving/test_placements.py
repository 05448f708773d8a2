"""A reranker in another process: its answers, its death, its lateness. The calls go to one in this process."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from raytower.serving.calls import ServedModel, TokenCounts
from raytower.serving.errors import NotReadyError, OutOfTimeError
from raytower.serving.forwards import Lane
from raytower.serving.generation import Generation, ModelEntry
from raytower.serving.parts import Pairs, Scored
from raytower.serving.placements import RemoteScorer, Reranker
from raytower.serving.work import Deadline

LATER = 60_000
SERVED = ServedModel(name="fake", max_length=8)


class Lengths:
    """Scores a pair by the length of its document."""

    served = SERVED

    async def score(self, pairs: Pairs, deadline: Deadline) -> Scored:
        deadline.check()
        depth = max(map(len, pairs.candidates)) - pairs.may_shorten
        logits = [np.array([len(text) for text in texts[:depth]], np.float32) for texts in pairs.candidates]
        return Scored(logits, depth, TokenCounts(tokens=1))


class Models:
    """A pool whose only reranker is `Lengths`."""

    def scorer(self, generation: Generation) -> Any:
        return Lengths() if generation.reranker else None


def generation(reranker: str | None = "fake") -> Generation:
    entry = ModelEntry(uri="", fingerprint="")
    return Generation(
        collection="default",
        index="",
        index_version="1",
        manifest_sha256="",
        encoder=entry,
        reranker=entry if reranker else None,
    )


def scorer_over(reranker: Reranker, failures: int = 0, wait_s: float = 0.0) -> RemoteScorer:
    left = [failures]

    async def call(*arguments: Any) -> Scored:
        await asyncio.sleep(wait_s)
        if left[0]:
            left[0] -= 1
            raise RuntimeError("the actor died")
        return await reranker.score(*arguments)

    return RemoteScorer(generation().id, SERVED, call)


def score(scorer: RemoteScorer, timeout_ms: int = LATER, **settings: Any) -> Scored:
    async def work() -> Scored:
        pairs = Pairs(["q", "r"], [["a", "bb"], ["ccc"]], Lane.RERANK, **settings)
        return await scorer.score(pairs, Deadline.after(timeout_ms))

    return asyncio.run(work())


@pytest.fixture
def reranker() -> Reranker:
    held = Reranker(Models())  # type: ignore[arg-type]
    asyncio.run(held.prepare(generation()))
    return held


def test_logits_come_back_as_they_are(reranker: Reranker) -> None:
    found = score(scorer_over(reranker))
    assert [logits.tolist() for logits in found.logits] == [[1.0, 2.0], [3.0]]
    assert (found.depth, found.counts.tokens) == (2, 1)
    shortened = score(scorer_over(reranker), may_shorten=True)
    assert [logits.tolist() for logits in shortened.logits] == [[1.0], [3.0]]


def test_what_pairs_took_is_learned(reranker: Reranker) -> None:
    scorer = scorer_over(reranker, wait_s=0.3)
    before = scorer.predict(100, Lane.RERANK)
    score(scorer)
    assert scorer.predict(100, Lane.RERANK) > before


def test_a_copy_that_has_died_is_asked_again_and_a_search_goes_without(reranker: Reranker) -> None:
    assert score(scorer_over(reranker, failures=1)).depth == 2
    with pytest.raises(NotReadyError, match="does not answer"):
        score(scorer_over(reranker, failures=2))
    with pytest.raises(OutOfTimeError):
        score(scorer_over(reranker, failures=2), may_shorten=True)


def test_a_late_reranker_is_not_waited_for(reranker: Reranker) -> None:
    with pytest.raises(OutOfTimeError, match="50 ms"):
        score(scorer_over(reranker, wait_s=60), timeout_ms=50)


def test_a_reranker_holds_what_it_has_prepared(reranker: Reranker) -> None:
    first, without = generation(), generation(reranker=None)
    asyncio.run(reranker.prepare(without))
    assert reranker.held() == {first.id, without.id}
    assert reranker.describe(first.id) == SERVED
    assert reranker.describe(without.id) is None
    with pytest.raises(NotReadyError, match="has no reranker"):
        asyncio.run(reranker.score(without.id, Pairs(["q"], [["a"]], Lane.RERANK), LATER))
    reranker.drop(first.id)
    with pytest.raises(NotReadyError, match="not prepared here"):
        reranker.describe(first.id)
