"""Which steps wait for which, and how they run: in order, side by side, and past one that fails."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytower.pipeline.graph import Access, run_graph, waits

NAMES = "abcd"
_names = st.lists(st.sampled_from(NAMES), max_size=3, unique=True).map(tuple)
_steps = st.lists(st.builds(Access, _names, _names), max_size=8)


def same(name: str, place: str) -> bool:
    return name == place


def left_by(steps: Sequence[Access], order: Sequence[int]) -> dict[str, object]:
    """What lies at each name once the steps ran in an order: each writes down who it is and what it has read."""
    lies: dict[str, object] = dict.fromkeys(NAMES)
    for number in order:
        read = [lies[name] for name in (*steps[number].reads, *steps[number].writes)]
        lies |= dict.fromkeys(steps[number].writes, (number, read))
    return lies


def test_two_branches_and_where_they_meet() -> None:
    steps = [
        Access(("train",), ("encoder",)),
        Access(("encoder", "corpus"), ("embeddings",)),
        Access(("pairs",), ("reranker",)),
        Access(("embeddings",), ("index",)),
        Access(("encoder", "index", "reranker"), ("report",)),
        Access(("index",), ("index",)),  # it changes what step 4 reads
    ]
    assert waits(steps, same) == [
        frozenset(),
        frozenset({0}),
        frozenset(),
        frozenset({1}),
        frozenset({0, 2, 3}),
        frozenset({3, 4}),
    ]


@given(_steps, st.randoms(use_true_random=False))
def test_every_order_that_waits_leaves_what_the_given_order_leaves(
    steps: list[Access], chance: Random
) -> None:
    needed = waits(steps, same)
    assert all(earlier < number for number, others in enumerate(needed) for earlier in others)
    order: list[int] = []
    while len(order) < len(steps):
        free = [n for n in range(len(steps)) if n not in order and needed[n] <= set(order)]
        order.append(chance.choice(free))
    assert left_by(steps, order) == left_by(steps, range(len(steps)))


@given(_steps)
def test_none_waits_without_a_reason(steps: list[Access]) -> None:
    """A pair of steps of which neither writes where the other is waits for nothing."""
    for number, others in enumerate(waits(steps, same)):
        for earlier in others:
            one, two = steps[earlier], steps[number]
            assert set(one.writes) & {*two.reads, *two.writes} or set(two.writes) & set(one.reads)


@given(_steps, st.integers(1, 3), st.sets(st.integers(0, 7)), st.sets(st.integers(0, 7)))
def test_each_step_runs_once_after_those_it_waits_for_and_never_more_at_once(
    steps: list[Access], parallel: int, failing: set[int], done_before: set[int]
) -> None:
    needed, lock = waits(steps, same), threading.Lock()
    ended: list[int] = []
    at_once, most = 0, 0

    def begin(number: int):  # type: ignore[no-untyped-def]
        assert needed[number] <= set(ended)
        if number in done_before:
            ended.append(number)
            return None
        return lambda: work(number)

    def work(number: int) -> int:
        nonlocal at_once, most
        with lock:
            at_once += 1
            most = max(most, at_once)
        with lock:
            at_once -= 1
        if number in failing:
            raise ValueError(str(number))
        return number

    def end(number: int, result: int) -> None:
        assert number == result
        ended.append(number)

    failed = run_graph(needed, parallel, begin, end)
    assert most <= parallel
    assert len(ended) == len(set(ended))
    assert all(str(error) == str(number) for number, error in failed.items())
    kept_back: set[int] = set()
    for number, others in enumerate(needed):
        if others & (kept_back | failed.keys()):
            kept_back.add(number)
    left = set(range(len(steps))) - set(ended) - failed.keys()
    if parallel == 1:
        assert left == ({*range(min(failed) + 1, len(steps))} if failed else set())
    else:
        assert left == kept_back


def test_two_independent_steps_are_at_work_at_once() -> None:
    meeting = threading.Barrier(2, timeout=30)
    failed = run_graph(
        [frozenset()] * 2, 2, lambda number: lambda: meeting.wait() and None, lambda number, result: None
    )
    assert failed == {}


def test_what_ends_the_main_thread_stops_those_at_work() -> None:
    stopped = threading.Event()

    def end(number: int, result: object) -> None:
        raise KeyboardInterrupt

    def begin(number: int):  # type: ignore[no-untyped-def]
        return (lambda: None) if number == 0 else (lambda: stopped.wait(30))

    with pytest.raises(KeyboardInterrupt):
        run_graph([frozenset()] * 2, 2, begin, end, stop=stopped.set)
    assert stopped.is_set()
