"""Forward passes that concurrent requests share: one thread runs those of all models of a process, a batch at a time.

A batch is cut by padded tokens, so that it takes a bounded time, from rows of similar length of all requests that wait.
What is urgent goes first, also between the layers of a pass that is not. A request that left or is late is not
computed. Imports neither Ray nor torch.

Shape legend: N rows of a submission, W values that the model gives for a row.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from raytower.models.token_block import Ids, TokenBlock
from raytower.serving.costs import ForwardCost
from raytower.serving.work import Deadline

Rows = NDArray[np.float32]
# Most seconds, by lane, until what is urgent is let in: of a pass, or of the part between two layers.
_PART_S = (0.05, 0.04, 0.025)
# Most seconds of a pass whose layers let others in: what is as urgent as the pass waits for its end.
_PASS_S = (0.05, 0.12, 0.15)
# A pass may take so many times as long on a machine so slow that it would be inefficient otherwise. Queries wait for
# nobody but other queries, which all end sooner in one large pass than in many small ones.
_SLOW = (4.0, 2.0, 2.0)
# Rows up to so many tokens go together whatever their lengths.
_SHORT = 32
# After so many passes before it, one of a lane that waits has its turn.
_PATIENCE = 6


class Lane(IntEnum):
    """What goes first: queries of searches, then their pairs to rerank, then everything in bulk."""

    QUERY = 0
    RERANK = 1
    BULK = 2


class Forward(Protocol):
    """A model that computes rows, such as a `BlockEngine`."""

    @property
    def width(self) -> int: ...

    tokens_per_batch: int

    def call_between_layers(self, call: Callable[[], None]) -> int:
        """Have `call` called while a block is computed, about so many times less one as is returned."""

    def forward_block(self, block: TokenBlock) -> Rows:
        """(N, W) of a block's rows."""


@dataclass(frozen=True)
class PassFacts:
    """What one forward pass was: for metrics."""

    model: str
    lane: Lane
    rows: int
    tokens: int
    padded_tokens: int
    seconds: float
    waits: tuple[float, ...] = ()
    """Seconds that each submission waited of which these are the first rows."""


Observe = Callable[[PassFacts], None]


class Forwards:
    """The thread, and what waits for it. Safe for threads; closes with the process or by `close`."""

    def __init__(self, observe: Observe | None = None) -> None:
        self._observe = observe
        self._changed = threading.Condition()
        self._waiting: dict[Lane, deque[_Submission]] = {lane: deque() for lane in Lane}
        self._passed_over: dict[Lane, int] = dict.fromkeys(Lane, 0)
        self._closed = False
        self._thread: threading.Thread | None = None
        # Of the thread alone: the lanes of passes that have begun, the innermost last, and seconds spent in inner ones.
        self._running: list[Lane] = []
        self._inner_s = 0.0

    def submit(self, model: ModelForwards, block: TokenBlock, lane: Lane, deadline: Deadline) -> Future[Rows]:
        """The model's values (N, W) of a block. A future that is cancelled is not computed any further.

        Raises:
            RuntimeError: these forward passes have been closed.
        """
        submission = _Submission(model, block, lane, deadline)
        if not len(block):
            submission.future.set_result(submission.output)
            return submission.future
        with self._changed:
            if self._closed:
                raise RuntimeError("the forward passes of this process have been closed")
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="raytower-forwards", daemon=True)
                self._thread.start()
            self._waiting[lane].append(submission)
            self._changed.notify()
        return submission.future

    def backlog_s(self, lane: Lane) -> float:
        """Predicted seconds of what waits and goes before new work of a lane."""
        with self._changed:
            ahead = [item for first in Lane if first <= lane for item in self._waiting[first]]
            lengths = [(item.model, item.block.lengths[item.left], item.lane) for item in ahead]
        return sum(model.predict(left, first) for model, left, first in lengths)

    def waiting_rows(self, lane: Lane) -> int:
        """Rows of a lane whose pass has not begun."""
        with self._changed:
            return sum(len(item.left) for item in self._waiting[lane])

    def close(self) -> None:
        """End the thread after the pass that runs; what waits is cancelled."""
        with self._changed:
            self._closed = True
            for waiting in self._waiting.values():
                for submission in waiting:
                    submission.future.cancel()
                waiting.clear()
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def let_in(self) -> None:
        """Compute one pass that is more urgent than the one that runs; a model calls this between its layers."""
        if threading.current_thread() is not self._thread or not self._running or not self._running[-1]:
            return
        with self._changed:
            batch = self._take(more_urgent_than=self._running[-1])
        if batch is None:
            return
        before_s, started = self._inner_s, time.perf_counter()
        self._compute(batch)
        self._inner_s = before_s + time.perf_counter() - started

    def _work(self) -> None:
        while (batch := self._next()) is not None:
            self._compute(batch)
            # A frame that waits would keep the models of the last batch alive.
            del batch

    def _compute(self, batch: _Batch) -> None:
        self._running.append(batch.lane)
        try:
            batch.compute(self._observe, lambda: self._inner_s)
        finally:
            self._running.pop()

    def _next(self) -> _Batch | None:
        with self._changed:
            while not self._closed:
                batch = self._take()
                if batch is not None:
                    return batch
                self._changed.wait()
        return None

    def _take(self, more_urgent_than: Lane | None = None) -> _Batch | None:
        for waiting in self._waiting.values():
            _drop_ended(waiting)
        lanes = [lane for lane in Lane if self._waiting[lane]]
        if more_urgent_than is not None:
            lanes = [lane for lane in lanes if lane < more_urgent_than]
        if not lanes:
            return None
        chosen = next((lane for lane in lanes if self._passed_over[lane] >= _PATIENCE), lanes[0])
        for lane in lanes:
            self._passed_over[lane] = 0 if lane == chosen else self._passed_over[lane] + 1
        return _Batch.of(self._waiting[chosen], chosen)


class ModelForwards:
    """One model's place at the thread: what its passes cost, and how requests hand rows in."""

    def __init__(self, name: str, forward: Forward, forwards: Forwards) -> None:
        self.name = name
        self.forward = forward
        self.cost = ForwardCost()
        self._forwards = forwards
        self._parts = forward.call_between_layers(forwards.let_in)

    async def compute(self, block: TokenBlock, lane: Lane, deadline: Deadline) -> Rows:
        """Values float32 (N, W) of a block's rows, in order.

        Raises:
            OutOfTimeError: the deadline came first. Also what the model raises.
        """
        future = self._forwards.submit(self, block, lane, deadline)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), deadline.remaining_s())
        except TimeoutError:
            raise deadline.exceeded() from None

    def calibrate(self, block: TokenBlock) -> None:
        """Learn what a pass over `block` takes before requests come: what short ones take tells little of long ones."""
        padded = int(block.lengths.max()) * len(block)
        self.forward.forward_block(block)  # the first is slower than any other
        started = time.perf_counter()
        self.forward.forward_block(block)
        self.cost.observe(padded, time.perf_counter() - started)

    def predict(self, lengths: Ids, lane: Lane) -> float:
        """Seconds of the passes over rows of these lengths, with nothing else to do."""
        return self.predict_tokens(int(lengths.sum()), len(lengths), lane)

    def predict_tokens(self, tokens: int, num_rows: int, lane: Lane) -> float:
        """Seconds of the passes over rows of so many tokens together, with nothing else to do."""
        if not tokens:
            return 0.0
        # A pass holds a row at least, however few tokens it ought to hold.
        passes = min(max(round(tokens / self.tokens_per_pass(lane)), 1), num_rows)
        return self.cost.predict(tokens // passes) * passes

    def backlog_s(self, lane: Lane) -> float:
        """Predicted seconds of what waits before new work of a lane, whatever its model."""
        return self._forwards.backlog_s(lane)

    def tokens_per_pass(self, lane: Lane) -> int:
        """Padded tokens of a pass of this lane at most."""
        seconds = min(_PART_S[lane] * self._parts, _PASS_S[lane])
        return min(self.cost.tokens_in(seconds, _SLOW[lane] * seconds), self.forward.tokens_per_batch)


@dataclass(eq=False)
class _Submission:
    model: ModelForwards
    block: TokenBlock
    lane: Lane
    deadline: Deadline
    future: Future[Rows] = field(default_factory=Future)
    output: Rows = field(init=False)
    left: Ids = field(init=False)
    """Rows that no pass has taken yet, the longest first."""
    unfinished: int = field(init=False)
    submitted: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self.output = np.empty((len(self.block), self.model.forward.width), np.float32)
        self.left = np.argsort(-self.block.lengths, kind="stable")
        self.unfinished = len(self.block)

    def ended(self) -> bool:
        """Whether nobody waits any more; one that is late is told so."""
        if self.future.done():
            return True
        if self.deadline.remaining_s():
            return False
        self.fail(self.deadline.exceeded())
        return True

    def finish(self, rows: Ids, values: Rows) -> None:
        self.output[rows] = values
        self.unfinished -= len(rows)
        if not self.unfinished:
            try:
                self.future.set_result(self.output)
            except InvalidStateError:  # it was cancelled meanwhile
                return

    def fail(self, error: BaseException) -> None:
        try:
            self.future.set_exception(error)
        except InvalidStateError:  # it was cancelled meanwhile
            return


@dataclass(frozen=True)
class _Batch:
    model: ModelForwards
    lane: Lane
    parts: list[tuple[_Submission, Ids]]

    @classmethod
    def of(cls, waiting: deque[_Submission], lane: Lane) -> _Batch:
        """Rows of the first submission's model, up to what one pass may hold; taken from `waiting`."""
        model = waiting[0].model
        budget = model.tokens_per_pass(lane)
        longest = int(waiting[0].block.lengths[waiting[0].left[0]])
        # Rows much longer than the first would widen the pass for all; they begin one of their own.
        limit = max(longest * 5 // 4, _SHORT)
        parts: list[tuple[_Submission, Ids]] = []
        count = 0
        for submission in [item for item in waiting if item.model is model]:
            lengths = submission.block.lengths[submission.left]
            start = int(np.searchsorted(-lengths, -limit))
            if start == len(lengths):
                continue
            longest = max(longest, int(lengths[start]))
            room = max(budget // max(longest, 1), 1) - count
            if room <= 0:
                break
            parts.append((submission, submission.left[start : start + room]))
            count += len(parts[-1][1])
            submission.left = np.delete(submission.left, slice(start, start + room))
            if not len(submission.left):
                waiting.remove(submission)
        return cls(model, lane, parts)

    def compute(self, observe: Observe | None, inner_s: Callable[[], float]) -> None:
        """`inner_s` tells the seconds that other passes have taken in the midst of this one, and of those before it."""
        block = TokenBlock.join([submission.block.take(rows) for submission, rows in self.parts])
        started, inner_before_s = time.perf_counter(), inner_s()
        try:
            values = self.model.forward.forward_block(block)
        except BaseException as error:
            if len(self.parts) == 1:
                self.parts[0][0].fail(error)
            for part in self.parts if len(self.parts) > 1 else ():
                # One request's rows must not fail those of the others.
                _Batch(self.model, self.lane, [part]).compute(observe, inner_s)
            return
        seconds = time.perf_counter() - started - (inner_s() - inner_before_s)
        padded = int(block.lengths.max()) * len(block)
        self.model.cost.observe(padded, seconds)
        waits = tuple(
            started - submission.submitted
            for submission, _ in self.parts
            if submission.unfinished == len(submission.block)
        )
        start = 0
        for submission, rows in self.parts:
            submission.finish(rows, values[start : start + len(rows)])
            start += len(rows)
        if observe is not None:
            observe(PassFacts(self.model.name, self.lane, len(block), len(block.ids), padded, seconds, waits))


def _drop_ended(waiting: deque[_Submission]) -> None:
    if any(submission.ended() for submission in waiting):
        kept = [submission for submission in waiting if not submission.ended()]
        waiting.clear()
        waiting.extend(kept)
