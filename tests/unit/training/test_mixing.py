"""How several sets of rows are mixed: shares by hand, and the order of the sets over a run."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytower.errors import InputError
from raytower.training.config import Mixing
from raytower.training.mixing import count_batches, order_of_sets, set_shares

COUNTS = st.lists(st.integers(1, 40), min_size=1, max_size=6)


@pytest.mark.parametrize(
    ("mixing", "weights", "shares"),
    [
        ("proportional", (1, 1), (0.9, 0.1)),
        ("proportional", (1, 3), (0.75, 0.25)),  # 900 to 300
        ("even", (1, 1), (0.5, 0.5)),
        ("even", (3, 1), (0.75, 0.25)),
        (1, (1, 1), (0.9, 0.1)),
        (2, (1, 1), (0.75, 0.25)),  # 30 to 10
        (2.0, (1, 3), (0.5, 0.5)),
    ],
)
def test_shares_of_900_and_100_rows(
    mixing: Mixing, weights: tuple[float, float], shares: tuple[float, float]
) -> None:
    found = set_shares({"a": 900, "b": 100}, dict(zip("ab", weights, strict=True)), mixing)
    assert found == pytest.approx(dict(zip("ab", shares, strict=True)))


@given(st.lists(st.integers(1, 10_000), min_size=1, max_size=6), st.integers(6, 300))
def test_batches_are_the_whole_ones_nearest_to_the_shares(rows: list[int], num_batches: int) -> None:
    shares = {str(number): count / sum(rows) for number, count in enumerate(rows)}
    counts = count_batches(shares, num_batches)
    assert list(counts) == list(shares)
    assert sum(counts.values()) == num_batches
    assert min(counts.values()) >= 1
    if min(shares.values()) * num_batches >= 1:
        assert all(abs(counts[name] - share * num_batches) < 1 for name, share in shares.items())


def test_a_set_of_less_than_a_batch_has_one() -> None:
    """Of 10 batches 9.8, 0.1 and 0.1 are due."""
    assert count_batches({"a": 0.98, "b": 0.01, "c": 0.01}, 10) == {"a": 8, "b": 1, "c": 1}


def test_more_sets_than_batches_are_refused() -> None:
    with pytest.raises(InputError, match="the run has 1 batches for 2 sets of training rows; raise epochs"):
        count_batches({"a": 0.5, "b": 0.5}, 1)


@given(COUNTS, st.integers(0, 2**32 - 1))
def test_each_set_has_had_its_share_at_any_point_of_a_run(counts: list[int], seed: int) -> None:
    order = order_of_sets(counts, seed)
    whole = sum(counts)
    assert np.bincount(order, minlength=len(counts)).tolist() == counts
    for number, count in enumerate(counts):
        had = np.cumsum(order == number)
        due = np.arange(1, whole + 1) * count / whole
        assert np.abs(had - due).max() <= 1 + len(counts) * count / whole


def test_the_order_is_drawn_by_the_seed() -> None:
    first, again, other = (order_of_sets([30, 20, 10], seed).tolist() for seed in (1, 1, 2))
    assert first == again != other
    assert first != sorted(first)
