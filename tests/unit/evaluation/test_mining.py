"""Which recalled documents become negatives of a pair: what is excluded, how they are drawn and screened."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from raytower.annotation.config import MineConfig, ScreenConfig
from raytower.annotation.negatives import KnownPositives, draw_order, score_limits
from raytower.config import make_config
from raytower.errors import InputError
from raytower.retrieval.retriever import Candidate


def candidates(*texts: str) -> list[Candidate]:
    return [Candidate(f"id of {text}", text, {}, 0.5) for text in texts]


def known(*pairs: tuple[str, str], query_id: str | None = None) -> KnownPositives:
    table = pa.table(
        {
            "query": [query for query, _ in pairs],
            "document": [document for _, document in pairs],
            "query_id": pa.array([query_id] * len(pairs), pa.string()),
            "document_id": pa.array([None] * len(pairs), pa.string()),
        }
    )
    return KnownPositives(KnownPositives.keys_of(table))


def test_a_pair_holds_in_both_directions() -> None:
    """Of paraphrases a~b, the row (b, c) drew `a` as a negative of `b`."""
    positives = known(("a", "b"), ("b", "c"))
    assert positives.include("b", candidates("a", "c", "d", "b")).tolist() == [True, True, False, True]
    assert positives.include("c", candidates("a", "b")).tolist() == [False, True]
    by_id = known(("a", "b"), query_id="id of x")
    assert by_id.include("b", candidates("x", "y")).tolist() == [True, False]


def test_entries_are_found_by_hash_wherever_they_lie() -> None:
    """The least and the greatest hash, one that is not there, and no entry at all."""
    greatest = np.uint64(2**64 - 1)
    keys = np.array([greatest, 7, 0, 7], dtype=np.uint64)
    asked = np.array([[0, 1], [7, 8], [greatest, greatest - np.uint64(1)]], dtype=np.uint64)
    assert KnownPositives(keys)._hold(asked).tolist() == [[True, False]] * 3
    assert not KnownPositives(keys[:0])._hold(asked).any()


def test_limits_take_off_whatever_the_sign() -> None:
    """A ratio loosened the limit of scores below 0, as inner products are."""
    scores = [2.0, 0.0, -2.0]
    np.testing.assert_allclose(score_limits(scores, 0.95, None), [1.9, 0.0, -2.1])
    np.testing.assert_allclose(score_limits(scores, None, 0.5), [1.5, -0.5, -2.5])
    np.testing.assert_allclose(score_limits(scores, 0.5, 0.5), [1.0, -0.5, -3.0])
    assert np.isinf(score_limits(scores, None, None)).all()


def test_orders_of_drawing() -> None:
    scores = [0.9, 0.8, 0.1]
    generator = np.random.default_rng(0)
    assert draw_order(scores, "top", 0.05, generator).tolist() == [0, 1, 2]
    firsts = {way: np.zeros(3) for way in ("random", "score")}
    for way, counts in firsts.items():
        for _ in range(6000):
            order = draw_order(scores, way, 0.5, generator)  # type: ignore[arg-type]
            assert sorted(order.tolist()) == [0, 1, 2]
            counts[order[0]] += 1
    np.testing.assert_allclose(firsts["random"] / 6000, 1 / 3, atol=0.03)
    chances = np.exp(np.array(scores) / 0.5)
    np.testing.assert_allclose(firsts["score"] / 6000, chances / chances.sum(), atol=0.03)


def test_the_limit_of_a_screen() -> None:
    assert ScreenConfig(reranker="r").limit(3.0) == 3.0
    assert ScreenConfig(reranker="r", margin=1.0).limit(3.0) == 2.0
    # The logistic function gives .1 at -2.197.
    assert ScreenConfig(reranker="r", max_probability=0.1).limit(3.0) == pytest.approx(-2.19722, abs=1e-5)
    assert ScreenConfig(reranker="r", max_probability=0.1).limit(-5.0) == -5.0


def test_a_temperature_that_is_not_read_is_refused() -> None:
    values = {"encoder": "e", "index": "i", "input": "p", "output": "o"}
    make_config(
        MineConfig, {**values, "sampling": "score", "sampling_temperature": 0.1, "screen": "reranker"}
    )
    with pytest.raises(InputError, match="sampling random does not read"):
        make_config(MineConfig, {**values, "sampling_temperature": 0.1})
