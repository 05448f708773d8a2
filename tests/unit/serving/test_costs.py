"""What forward passes cost, and which requests are let in. Clocks are turned by hand."""

from __future__ import annotations

import pytest

from raytower.serving.costs import Admission, ForwardCost
from raytower.serving.errors import OutOfTimeError, OverloadedError
from raytower.serving.work import Deadline


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_cost_is_the_line_through_the_passes_seen() -> None:
    cost = ForwardCost()
    for tokens in (10, 100, 1000, 50, 500):
        cost.observe(tokens, 0.004 + tokens * 1e-4)
    assert cost.predict(2000) == pytest.approx(0.204)
    assert cost.tokens_in(0.054, 0.054) == 500


def test_passes_grow_on_a_slow_machine_while_that_makes_them_efficient_and_no_further_than_told() -> None:
    cost = ForwardCost()
    for tokens in (10, 100, 1000, 50, 500) * 40:
        cost.observe(tokens, 0.1 + tokens * 1e-4)
    # Twice 4,000 tokens take 0.9 s, 1.8 times as long as they do.
    assert cost.tokens_in(0.04, 10.0) == 4096
    assert cost.tokens_in(0.04, 0.2) == 512
    linear = ForwardCost()
    for tokens in (10, 100, 1000) * 10:
        linear.observe(tokens, tokens * 1e-3)
    assert linear.tokens_in(0.04, 10.0) == 40


def test_passes_of_one_size_still_give_a_cost_for_each_token() -> None:
    cost = ForwardCost()
    for _ in range(5):
        cost.observe(200, 0.1)
    assert cost.predict(400) == pytest.approx(0.2)


def test_a_pass_that_stalled_does_not_make_every_pass_look_slow() -> None:
    cost = ForwardCost()
    for tokens in (10, 100, 1000, 50, 500) * 4:
        cost.observe(tokens, 0.004 + tokens * 1e-4)
    cost.observe(10, 60.0)
    assert cost.predict(1000) < 0.2


def test_noise_never_makes_more_tokens_cheaper() -> None:
    cost = ForwardCost()
    cost.observe(10, 0.5)
    cost.observe(1000, 0.1)
    assert cost.predict(1000) >= cost.predict(10) > 0
    assert cost.tokens_in(0.0, 0.0) >= 1


def test_a_cost_forgets_a_slow_time() -> None:
    cost = ForwardCost()
    for _ in range(50):
        cost.observe(100, 1.0)
        cost.observe(10, 0.1)
    for _ in range(200):
        cost.observe(100, 0.1)
        cost.observe(10, 0.01)
    assert cost.predict(100) == pytest.approx(0.1, rel=0.05)


def test_thousands_of_short_passes_do_not_make_what_long_ones_take_forgotten() -> None:
    cost = ForwardCost()
    cost.observe(130, 0.080)
    for _ in range(5000):
        cost.observe(12, 0.050)
    # 50 ms of overhead and 0.25 ms a token; by the short ones alone, a token would take 4 ms.
    assert cost.predict(130) == pytest.approx(0.080)
    assert cost.predict(1000) == pytest.approx(0.050 + 988 * 0.030 / 118)
    # A pass of one query alone takes the 50 ms; larger ones may take twice as long.
    assert cost.tokens_in(0.05, 0.1) > 100


def test_where_the_smallest_passes_take_too_long_larger_ones_are_tried() -> None:
    cost = ForwardCost()
    for _ in range(100):
        cost.observe(12, 0.052)
    assert cost.tokens_in(0.05, 0.05) == 64
    cost.observe(60, 0.056)
    assert cost.tokens_in(0.05, 0.2) > 400


def test_passes_of_one_slow_size_do_not_hide_that_longer_ones_take_longer() -> None:
    cost = ForwardCost()
    cost.observe(10, 0.01)
    cost.observe(1000, 0.2)
    for _ in range(200):
        cost.observe(10, 0.5)
    assert cost.predict(1000) >= cost.predict(10) == pytest.approx(0.5, rel=0.05)
    assert cost.predict(2000) > cost.predict(1000)


def test_a_request_that_would_not_end_in_time_is_refused_and_told_when() -> None:
    admission = Admission(10, 60.0, Clock())
    with admission.admit(2.5, Deadline.after(5000), urgent=True):
        with pytest.raises(OverloadedError) as caught:
            admission.admit(1.0, Deadline.after(3000), urgent=True)
        assert caught.value.headers == {"Retry-After": "3"}
        admission.admit(1.0, Deadline.after(4000), urgent=True)
    assert admission.requests == 1


def test_urgent_requests_do_not_wait_for_bulk_but_bulk_for_them() -> None:
    admission = Admission(10, 60.0, Clock())
    with (
        admission.admit(30.0, Deadline.after(60_000), urgent=False),
        admission.admit(1.0, Deadline.after(2000), urgent=True),
        pytest.raises(OverloadedError),
    ):
        admission.admit(1.0, Deadline.after(31_000), urgent=False)


def test_an_urgent_request_is_refused_where_it_would_wait_long_though_it_has_time() -> None:
    admission = Admission(100, 0.25, Clock())
    for _ in range(16):
        admission.admit(0.1, Deadline.after(60_000), urgent=True)
    with pytest.raises(OverloadedError):
        admission.admit(0.1, Deadline.after(60_000), urgent=True)
    admission.admit(1.0, Deadline.after(60_000), urgent=True)  # which takes long itself


def test_few_requests_are_no_overload_on_a_slow_machine() -> None:
    admission = Admission(100, 0.25, Clock())
    for _ in range(16):
        admission.admit(1.0, Deadline.after(60_000), urgent=True)


def test_what_requests_take_besides_their_passes_is_learned_but_not_beyond_it() -> None:
    """A request alone that takes twice its passes once raised the factor without end, until all were refused."""
    clock = Clock()
    admission = Admission(1000, 60.0, clock)
    for _ in range(1000):
        with admission.admit(1.0, Deadline.after(60_000), urgent=True):
            clock.now += 2.0
    with admission.admit(1.0, Deadline.after(60_000), urgent=True):
        admission.admit(0.5, Deadline.after(3500), urgent=True)


def test_a_lone_request_is_always_let_in_unless_its_time_is_over() -> None:
    admission = Admission(10, 0.1, Clock())
    admission.admit(50.0, Deadline.after(1000), urgent=True).__exit__(None, None, None)
    with pytest.raises(OutOfTimeError):
        admission.admit(0.1, Deadline(0.0, 1), urgent=True)


def test_there_are_never_more_requests_than_allowed() -> None:
    admission = Admission(2, 60.0, Clock())
    tickets = [admission.admit(0.0, Deadline.after(1000), urgent=False) for _ in range(2)]
    with pytest.raises(OverloadedError):
        admission.admit(0.0, Deadline.after(1000), urgent=False)
    tickets[0].__exit__(None, None, None)
    admission.admit(0.0, Deadline.after(1000), urgent=False)


def test_what_requests_take_in_truth_changes_what_is_let_in() -> None:
    clock = Clock()
    admission = Admission(1000, 60.0, clock)
    for _ in range(100):  # each takes four times what it was predicted to
        with admission.admit(1.0, Deadline.after(60_000), urgent=True):
            clock.now += 4.0
    with admission.admit(1.0, Deadline.after(60_000), urgent=True), pytest.raises(OverloadedError):
        admission.admit(0.5, Deadline.after(2000), urgent=True)


def test_a_request_that_failed_teaches_nothing() -> None:
    clock = Clock()
    admission = Admission(1000, 60.0, clock)
    for _ in range(100):
        ticket = admission.admit(1.0, Deadline.after(60_000), urgent=True)
        clock.now += 50.0
        ticket.__exit__(ValueError, ValueError("broken"), None)
    with admission.admit(1.0, Deadline.after(60_000), urgent=True):
        admission.admit(0.5, Deadline.after(2000), urgent=True)
