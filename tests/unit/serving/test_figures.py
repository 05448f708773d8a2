"""/metrics of a server of several processes: whichever is asked, it answers for all."""

from __future__ import annotations

import asyncio
import time

import pytest

from raytower.serving.figures import AllMetrics, FiguresBoard, counted_forwards, keep_reporting
from raytower.serving.forwards import Lane, PassFacts
from raytower.serving.metrics import Metrics
from tests.support.metric_names import series


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def ready(name: str, admitted: int) -> Metrics:
    metrics = Metrics(name)
    for _ in range(admitted):
        metrics.admitted("search")
    return metrics


def told(board: FiguresBoard, metrics: Metrics) -> dict[tuple[str, str], float]:
    """Requests let in, and ages, by replica, as a scrape of one replica finds them."""
    text, _ = AllMetrics(metrics, lambda: board.others(metrics.replica)).render()
    wanted = ("raytower_admitted_total", "raytower_figures_age_seconds")
    return {
        (name, dict(labels)["replica"]): value
        for (name, labels), value in series(text).items()
        if name in wanted
    }


def test_any_replica_answers_for_all_and_says_how_old_the_others_figures_are() -> None:
    clock = Clock()
    board = FiguresBoard(clock)
    one, two = ready("one", 3), ready("two", 5)
    for metrics in (one, two):
        board.put(metrics.replica, metrics.render()[0])
    one.admitted("search")
    two.admitted("search")
    clock.now = 104.5
    assert told(board, one) == {
        ("raytower_admitted_total", "one"): 4,
        ("raytower_admitted_total", "two"): 5,
        ("raytower_figures_age_seconds", "one"): 0,
        ("raytower_figures_age_seconds", "two"): 4.5,
    }
    assert told(board, two)["raytower_admitted_total", "one"] == 3
    assert told(board, two)["raytower_admitted_total", "two"] == 6


def test_a_process_that_says_nothing_for_15_seconds_has_ended() -> None:
    clock = Clock()
    board = FiguresBoard(clock)
    board.put("two", ready("two", 1).render()[0])
    clock.now = 115.0
    assert board.others("one").keys() == {"two"}
    clock.now = 115.1
    assert board.others("one") == {}
    clock.now = 100.0
    assert board.others("one") == {}, "it was not kept either"


def test_a_process_hands_its_figures_over_again_and_again_also_after_a_failure() -> None:
    taken: list[tuple[str, bytes]] = []
    calls = 0

    async def put(process: str, text: bytes) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise OSError("the conductor is being replaced")
        taken.append((process, text))

    async def run() -> None:
        reporting = asyncio.create_task(keep_reporting(ready("one", 2), put, every_s=0))
        until = time.monotonic() + 10
        while len(taken) < 2 and time.monotonic() < until:
            await asyncio.sleep(0.001)
        reporting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reporting

    asyncio.run(run())
    assert [name for name, _ in taken[:2]] == ["one", "one"]
    assert series(taken[0][1])["raytower_admitted_total", (("lane", "search"), ("replica", "one"))] == 2


def test_without_the_others_a_replica_tells_its_own() -> None:
    own = ready("one", 1)
    found = series(AllMetrics(own, dict).render()[0])
    assert found["raytower_admitted_total", (("lane", "search"), ("replica", "one"))] == 1


def test_forward_passes_of_a_process_without_an_engine_are_counted() -> None:
    metrics = Metrics("reranker-1")
    forwards = counted_forwards(metrics)
    assert forwards._observe is not None
    forwards._observe(
        PassFacts("m", Lane.RERANK, rows=4, tokens=90, padded_tokens=100, seconds=0.02, waits=(0.003,))
    )
    found = series(metrics.render()[0])
    labels = (("model", "m"), ("replica", "reranker-1"))
    assert found["raytower_forward_rows_sum", labels] == 4
    assert found["raytower_forward_padding_tokens_total", labels] == 10
    waits = (("lane", "rerank"), ("queue", "forwards"), ("replica", "reranker-1"))
    assert found["raytower_queue_wait_seconds_sum", waits] == 0.003
    assert found["raytower_queue_items", waits] == 0
