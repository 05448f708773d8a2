"""Forward passes that requests share: what is computed together, in which order, and what is not computed."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future

import numpy as np
import pytest

from raytower.models.token_block import TokenBlock
from raytower.serving.costs import ForwardCost
from raytower.serving.errors import OutOfTimeError
from raytower.serving.forwards import Forwards, Lane, ModelForwards, PassFacts, Rows
from raytower.serving.work import Deadline

LATER = 60_000


class Doubler:
    """Gives of each row its first token, doubled; waits at a gate, and notes the rows of each pass."""

    width = 1

    def __init__(self, tokens_per_batch: int = 10_000) -> None:
        self.tokens_per_batch = tokens_per_batch
        self.passes: list[list[int]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.began = threading.Event()

    def call_between_layers(self, call: Callable[[], None]) -> int:
        return 1

    def forward_block(self, block: TokenBlock) -> Rows:
        firsts = block.ids[block.starts]
        self.passes.append(firsts.tolist())
        self.began.set()
        assert self.gate.wait(20)
        if (firsts == 666).any():
            raise ValueError("a row that no model takes")
        return (2.0 * firsts[:, None]).astype(np.float32)


def rows(*tokens: int, length: int = 4) -> TokenBlock:
    return TokenBlock.of([[token] * length for token in tokens])


class Steady(ForwardCost):
    """Learns nothing, so that passes are as large as the model allows."""

    def observe(self, tokens: int, seconds: float) -> None:
        pass


def shared(doubler: Doubler, forwards: Forwards) -> ModelForwards:
    model = ModelForwards("doubler", doubler, forwards)
    model.cost = Steady()
    return model


@pytest.fixture
def forwards() -> Iterator[Forwards]:
    made = Forwards()
    yield made
    made.close()


def holding(model: ModelForwards, doubler: Doubler) -> asyncio.Task[Rows]:
    """A pass that has begun and waits at the gate."""
    doubler.gate.clear()
    return asyncio.ensure_future(model.compute(rows(0), Lane.QUERY, Deadline.after(LATER)))


async def begun(doubler: Doubler) -> None:
    await asyncio.to_thread(doubler.began.wait, 20)
    await asyncio.sleep(0.01)


def test_requests_that_wait_together_are_computed_in_one_pass(forwards: Forwards) -> None:
    doubler = Doubler()
    model = shared(doubler, forwards)

    async def ask() -> list[Rows]:
        first = holding(model, doubler)
        await begun(doubler)
        others = [
            asyncio.ensure_future(model.compute(rows(n, n + 100), Lane.QUERY, Deadline.after(LATER)))
            for n in (1, 2, 3)
        ]
        await asyncio.sleep(0.01)
        doubler.gate.set()
        return list(await asyncio.gather(first, *others))

    found = asyncio.run(ask())
    assert [values[:, 0].tolist() for values in found] == [[0.0], [2.0, 202.0], [4.0, 204.0], [6.0, 206.0]]
    assert [sorted(passed) for passed in doubler.passes] == [[0], [1, 2, 3, 101, 102, 103]]


def test_what_is_urgent_goes_before_bulk_that_came_earlier(forwards: Forwards) -> None:
    doubler = Doubler()
    model = shared(doubler, forwards)

    async def ask() -> None:
        first = holding(model, doubler)
        await begun(doubler)
        tasks = [first]
        for lane, token in ((Lane.BULK, 7), (Lane.RERANK, 8), (Lane.QUERY, 9)):
            tasks.append(asyncio.ensure_future(model.compute(rows(token), lane, Deadline.after(LATER))))
            await asyncio.sleep(0.01)
        doubler.gate.set()
        await asyncio.gather(*tasks)

    asyncio.run(ask())
    assert doubler.passes == [[0], [9], [8], [7]]


class Layered(Doubler):
    """Passes of three layers, which let others in twice; `before` each of these it does what a test wants."""

    def __init__(self) -> None:
        super().__init__()
        self.before: list[Callable[[], None]] = []
        self.ended: list[list[int]] = []

    def call_between_layers(self, call: Callable[[], None]) -> int:
        self._call = call
        return 3

    def forward_block(self, block: TokenBlock) -> Rows:
        values = super().forward_block(block)
        for _ in range(2):
            if self.before:
                self.before.pop(0)()
            self._call()
        self.ended.append(block.ids[block.starts].tolist())
        return values


def test_what_is_urgent_is_let_in_between_the_layers_of_a_pass_that_is_not(forwards: Forwards) -> None:
    layered = Layered()
    facts: list[PassFacts] = []
    forwards._observe = facts.append
    model = shared(layered, forwards)

    def submit(token: int, lane: Lane, seconds: float = 0.0) -> Callable[[], None]:
        def act() -> None:
            futures[token] = forwards.submit(model, rows(token), lane, Deadline.after(LATER))
            time.sleep(seconds)

        return act

    futures: dict[int, Future[Rows]] = {}
    # While bulk 7 is computed a rerank arrives, in its midst a search, another rerank and more bulk.
    layered.before = [
        submit(8, Lane.RERANK, 0.03),
        lambda: [submit(9, Lane.QUERY)(), submit(81, Lane.RERANK)(), submit(71, Lane.BULK)()],  # type: ignore[list-item]
        lambda: time.sleep(0.05),
    ]
    submit(7, Lane.BULK)()
    futures[7].result(20)
    futures[71].result(20)
    assert layered.passes == [[7], [8], [9], [81], [71]]
    assert layered.ended == [[9], [8], [81], [7], [71]]
    assert {token: float(future.result(20)[0, 0]) for token, future in futures.items()} == {
        7: 14.0,
        8: 16.0,
        9: 18.0,
        81: 162.0,
        71: 142.0,
    }
    # Seconds of a pass are its own, without those of passes that were let in.
    seconds = {(fact.lane, number): fact.seconds for number, fact in enumerate(facts)}
    assert seconds[(Lane.QUERY, 0)] >= 0.05
    assert 0 < seconds[(Lane.RERANK, 1)] < 0.05
    assert 0.03 <= seconds[(Lane.BULK, 3)] < 0.08


def test_a_search_that_fails_in_the_midst_of_bulk_leaves_bulk_as_it_was(forwards: Forwards) -> None:
    layered = Layered()
    model = shared(layered, forwards)
    futures: list[Future[Rows]] = []
    layered.before = [
        lambda: futures.append(forwards.submit(model, rows(666), Lane.QUERY, Deadline.after(LATER)))
    ]
    bulk = forwards.submit(model, rows(7), Lane.BULK, Deadline.after(LATER))
    assert float(bulk.result(20)[0, 0]) == 14.0
    with pytest.raises(ValueError, match="no model takes"):
        futures[0].result(20)


def test_passes_of_layers_may_be_longer_where_others_are_let_in(forwards: Forwards) -> None:
    layered, plain = shared(Layered(), forwards), shared(Doubler(), forwards)
    # 2 ms a pass and 0.2 ms a token: 25 ms of bulk hold 115 tokens, three parts of it 365.
    assert plain.tokens_per_pass(Lane.BULK) == pytest.approx(115, abs=1)
    assert layered.tokens_per_pass(Lane.BULK) == pytest.approx(365, abs=1)
    assert plain.tokens_per_pass(Lane.QUERY) == layered.tokens_per_pass(Lane.QUERY)


def test_bulk_has_its_turn_though_searches_never_end(forwards: Forwards) -> None:
    doubler = Doubler()
    model = shared(doubler, forwards)

    async def ask() -> int:
        bulk = asyncio.ensure_future(model.compute(rows(7), Lane.BULK, Deadline.after(LATER)))
        searches = 0

        async def search() -> None:
            nonlocal searches
            while not bulk.done() and searches < 500:
                searches += 1
                await model.compute(rows(1), Lane.QUERY, Deadline.after(LATER))

        await asyncio.gather(*[search() for _ in range(4)])
        await bulk
        return searches

    assert asyncio.run(ask()) < 200


def test_long_work_is_cut_into_passes_that_let_others_in_between(forwards: Forwards) -> None:
    doubler = Doubler(tokens_per_batch=40)  # ten rows of four tokens
    model = shared(doubler, forwards)

    async def ask() -> None:
        first = holding(model, doubler)
        await begun(doubler)
        bulk = asyncio.ensure_future(model.compute(rows(*range(1, 36)), Lane.BULK, Deadline.after(LATER)))
        await asyncio.sleep(0.01)
        urgent = asyncio.ensure_future(model.compute(rows(99), Lane.QUERY, Deadline.after(LATER)))
        await asyncio.sleep(0.01)
        doubler.gate.set()
        assert (await bulk)[:, 0].tolist() == [2.0 * n for n in range(1, 36)]
        await asyncio.gather(first, urgent)

    asyncio.run(ask())
    assert doubler.passes[1] == [99]
    assert [len(passed) for passed in doubler.passes[2:]] == [10, 10, 10, 5]


def test_rows_of_one_pass_are_of_similar_length(forwards: Forwards) -> None:
    doubler = Doubler()
    model = shared(doubler, forwards)

    async def ask() -> None:
        first = holding(model, doubler)
        await begun(doubler)
        tasks = [
            asyncio.ensure_future(model.compute(rows(n, length=length), Lane.QUERY, Deadline.after(LATER)))
            for n, length in ((1, 10), (2, 400), (3, 12))
        ]
        await asyncio.sleep(0.01)
        doubler.gate.set()
        await asyncio.gather(first, *tasks)

    asyncio.run(ask())
    assert [sorted(passed) for passed in doubler.passes[1:]] == [[1, 3], [2]]


def test_a_pass_takes_about_the_time_that_others_may_wait(forwards: Forwards) -> None:
    class Slow(Doubler):
        def forward_block(self, block: TokenBlock) -> Rows:
            time.sleep(0.004 * len(block.ids))  # so long that a busy machine's pauses are little beside it
            return super().forward_block(block)

    slow = Slow()
    model = ModelForwards("slow", slow, forwards)

    async def ask() -> None:
        for _ in range(3):
            await model.compute(rows(1, 2), Lane.QUERY, Deadline.after(LATER))
            await model.compute(rows(1), Lane.QUERY, Deadline.after(LATER))
        slow.passes.clear()
        await model.compute(rows(*range(100)), Lane.BULK, Deadline.after(LATER))

    asyncio.run(ask())
    assert max(len(passed) for passed in slow.passes) <= 10


def test_what_was_cancelled_or_is_late_is_not_computed(forwards: Forwards) -> None:
    doubler = Doubler()
    model = shared(doubler, forwards)

    async def ask() -> None:
        first = holding(model, doubler)
        await begun(doubler)
        left = asyncio.ensure_future(model.compute(rows(5), Lane.QUERY, Deadline.after(LATER)))
        late = asyncio.ensure_future(model.compute(rows(6), Lane.QUERY, Deadline.after(20)))
        await asyncio.sleep(0.01)
        left.cancel()
        with pytest.raises(OutOfTimeError):
            await late
        doubler.gate.set()
        await first
        await model.compute(rows(1), Lane.QUERY, Deadline.after(LATER))

    asyncio.run(ask())
    assert doubler.passes == [[0], [1]]


def test_a_row_that_fails_fails_its_own_request_alone(forwards: Forwards) -> None:
    doubler = Doubler()
    model = shared(doubler, forwards)

    async def ask() -> None:
        first = holding(model, doubler)
        await begun(doubler)
        bad = asyncio.ensure_future(model.compute(rows(1, 666), Lane.QUERY, Deadline.after(LATER)))
        good = asyncio.ensure_future(model.compute(rows(4), Lane.QUERY, Deadline.after(LATER)))
        await asyncio.sleep(0.01)
        doubler.gate.set()
        with pytest.raises(ValueError, match="no model takes"):
            await bad
        assert (await good).tolist() == [[8.0]]
        await first

    asyncio.run(ask())


def test_no_rows_need_no_pass(forwards: Forwards) -> None:
    doubler = Doubler()
    model = shared(doubler, forwards)
    found = asyncio.run(model.compute(TokenBlock.of([]), Lane.QUERY, Deadline.after(LATER)))
    assert (found.shape, doubler.passes) == ((0, 1), [])


def test_passes_are_told_with_their_padding() -> None:
    facts: list[PassFacts] = []
    forwards = Forwards(facts.append)
    model = ModelForwards("doubler", Doubler(), forwards)
    block = TokenBlock.of([[1], [2, 2, 2]])
    asyncio.run(model.compute(block, Lane.BULK, Deadline.after(LATER)))
    forwards.close()
    (told,) = facts
    assert (told.model, told.lane, told.rows, told.tokens, told.padded_tokens) == (
        "doubler",
        Lane.BULK,
        2,
        4,
        6,
    )


def test_a_request_does_not_wait_for_the_passes_of_another_that_goes_on(forwards: Forwards) -> None:
    """Rows that are done were once handed out only when another request's forward had ended."""

    class Slow(Doubler):
        def forward_block(self, block: TokenBlock) -> Rows:
            time.sleep(0.02)
            return super().forward_block(block)

    slow = Slow(tokens_per_batch=4)
    model = ModelForwards("slow", slow, forwards)

    async def ask() -> float:
        bulk = asyncio.ensure_future(model.compute(rows(*range(50)), Lane.BULK, Deadline.after(LATER)))
        await asyncio.sleep(0.03)
        started = time.perf_counter()
        await model.compute(rows(1), Lane.QUERY, Deadline.after(LATER))
        took = time.perf_counter() - started
        assert not bulk.done()
        bulk.cancel()
        return took

    assert asyncio.run(ask()) < 0.5  # two passes of 0.02 s; all of the bulk takes a second


def test_rows_take_no_more_passes_than_they_are(forwards: Forwards) -> None:
    """One pass that took longer than it should made each token a pass of its own: 100 rows were to take minutes."""
    model = ModelForwards("doubler", Doubler(tokens_per_batch=1), forwards)
    for tokens in (10, 100, 1000, 50, 500):
        model.cost.observe(tokens, 0.004 + tokens * 1e-4)
    lengths = np.full(10, 60)
    assert model.predict(lengths, Lane.RERANK) == pytest.approx(10 * (0.004 + 60 * 1e-4))
