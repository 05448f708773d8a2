"""The merge of many answers to one, against a sort of Python's."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytower.errors import InputError
from raytower.index.hits import Hits, _order_by_score, merge_hits, spread_hits

# Scores that tie often, zeros of both signs among them, and padding.
_SCORED_ROW = st.one_of(
    st.tuples(st.sampled_from([0.0, -0.0, 0.5, 1.0, -1.0, -0.25]), st.integers(0, 99)), st.just((-np.inf, -1))
)


def test_padding_never_becomes_a_hit_and_ties_go_by_row() -> None:
    left = Hits(np.array([[0.9, 0.5, -np.inf]], np.float32), np.array([[7, 9, -1]]))
    right = Hits(np.array([[0.9, 0.5]], np.float32), np.array([[3, 11]]))
    merged = merge_hits([left, right], 5)
    assert merged.rows.tolist() == [[3, 7, 9, 11, -1]]


@pytest.mark.parametrize("few", [0, 1_024])
@given(
    # Two queries; each part has as many hits for one as for the other.
    parts=st.lists(st.lists(st.tuples(_SCORED_ROW, _SCORED_ROW), max_size=3), min_size=1, max_size=4),
    k=st.integers(1, 12),
)
def test_it_is_one_sort_by_score_and_row(
    few: int, parts: list[list[tuple[tuple[float, int], tuple[float, int]]]], k: int
) -> None:
    """By the sort for few scores, and by the one for many."""
    hits = []
    for part in parts:
        pairs = np.array(part, np.float64).reshape(-1, 2, 2)
        hits.append(Hits(pairs[..., 0].T.astype(np.float32), pairs[..., 1].T.astype(np.int64)))
    with mock.patch("raytower.index.hits._FEW", few):
        merged = merge_hits(hits, k)
    for query in range(2):
        wanted = sorted(
            (pair[query] for part in parts for pair in part), key=lambda item: (-item[0], item[1])
        )
        found = zip(merged.scores[query].tolist(), merged.rows[query].tolist(), strict=True)
        assert list(found) == wanted[:k]


def test_scores_that_are_all_equal_go_by_row() -> None:
    hits = Hits(np.ones((1, 3), np.float32), np.array([[9, 3, 7]]))
    with mock.patch("raytower.index.hits._FEW", 0):
        assert merge_hits([hits], 3).rows.tolist() == [[3, 7, 9]]


def test_integers_sort_as_the_scores_they_stand_for() -> None:
    """Far above 1 and below 0, zeros of both signs, and two scores that only their last bit tells apart."""
    next_to_half = np.nextafter(np.float32(0.5), np.float32(1))
    scores = np.array([[0.5, 100.0, -0.0, 0.0, -2.0, -np.inf, next_to_half, -0.25]], np.float32)
    assert _order_by_score(scores).tolist() == [[1, 6, 0, 2, 3, 7, 4, 5]]


def test_without_an_answer_there_is_nothing_to_merge() -> None:
    with pytest.raises(InputError, match="no answers to merge"):
        merge_hits([], 3)


def test_hits_of_some_queries_lie_among_padding() -> None:
    found = Hits(np.array([[0.9], [0.7]], np.float32), np.array([[7], [3]]))
    spread = spread_hits(found, np.array([2, 0]), 3)
    assert spread.rows.tolist() == [[3], [-1], [7]]
    assert np.array_equal(spread.scores, np.float32([[0.7], [-np.inf], [0.9]]))
    assert (spread.scores.dtype, spread.rows.dtype) == (np.float32, np.int64)
