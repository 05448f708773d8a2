"""Limits on the work of one process: deadlines, admission, and forward passes that concurrent requests share."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

from raytower.serving.errors import OutOfTimeError, OverloadedError

ResultT = TypeVar("ResultT")
ItemT = TypeVar("ItemT")
RowT = TypeVar("RowT")


@dataclass(frozen=True)
class Deadline:
    """A moment on the monotonic clock by which an answer is due."""

    start: float
    timeout_ms: int

    @staticmethod
    def after(timeout_ms: int) -> Deadline:
        return Deadline(time.monotonic(), timeout_ms)

    def remaining_s(self) -> float:
        """Seconds left; 0 once past."""
        return max(self.start + self.timeout_ms / 1000 - time.monotonic(), 0.0)

    def elapsed_ms(self) -> float:
        return (time.monotonic() - self.start) * 1000

    def check(self) -> None:
        """Raises OutOfTimeError once past."""
        if not self.remaining_s():
            raise self.exceeded()

    def exceeded(self) -> OutOfTimeError:
        return OutOfTimeError(f"no answer within {self.timeout_ms} ms; raise timeout_ms, or lower recall_k")


class WorkGate:
    """Runs blocking work on a few threads; beyond `max_ongoing` + `max_queued` it refuses at once.

    A request counts until its work has ended, not until its caller was answered: work that outlives its deadline still
    burdens the machine.
    """

    def __init__(self, max_ongoing: int, max_queued: int) -> None:
        self._places = threading.BoundedSemaphore(max_ongoing + max_queued)
        self._pool = ThreadPoolExecutor(max_ongoing, thread_name_prefix="raytower-request")

    async def run(self, work: Callable[[], ResultT], deadline: Deadline) -> ResultT:
        """Raises OverloadedError when full, OutOfTimeError at the deadline, and what `work` raises."""
        if not self._places.acquire(blocking=False):
            raise OverloadedError("the server is busy; try again in a second", headers={"Retry-After": "1"})
        try:
            future: Future[ResultT] = self._pool.submit(_unless_late, work, deadline)
        except BaseException:
            self._places.release()
            raise
        future.add_done_callback(lambda _: self._places.release())
        try:
            # A timeout cancels work that still waits for a thread; running work checks the deadline itself.
            return await asyncio.wait_for(asyncio.wrap_future(future), deadline.remaining_s())
        except TimeoutError:
            raise deadline.exceeded() from None

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


def _unless_late(work: Callable[[], ResultT], deadline: Deadline) -> ResultT:
    deadline.check()
    return work()


@dataclass(eq=False)
class _Submission(Generic[ItemT, RowT]):
    items: Sequence[ItemT]
    rows: list[RowT] | None = None
    error: BaseException | None = None
    abandoned: bool = False
    done: bool = False


class MicroBatcher(Generic[ItemT, RowT]):
    """Joins what concurrent threads submit into one call of `run`, one call at a time.

    There is no timer: an idle batcher runs a submission at once, a busy one gathers what arrives meanwhile. The thread
    that gets the lock runs everything that waits (up to `max_items`); the other threads then find their rows done.

    Args:
        run: items to as many rows, in order. Never called by two threads at once.
        max_items: most items of one call; longer submissions are cut, so that they let others in between.
    """

    def __init__(self, run: Callable[[list[ItemT]], Iterable[RowT]], max_items: int) -> None:
        self._run = run
        self._max_items = max_items
        self._waiting: deque[_Submission[ItemT, RowT]] = deque()
        self._waiting_lock = threading.Lock()
        self._run_lock = threading.Lock()

    def submit(self, items: Sequence[ItemT], deadline: Deadline) -> list[RowT]:
        """The rows of `items`, in order. Raises OutOfTimeError, or what `run` raised."""
        rows: list[RowT] = []
        for start in range(0, len(items), self._max_items):
            rows.extend(self._submit_some(items[start : start + self._max_items], deadline))
        return rows

    def _submit_some(self, items: Sequence[ItemT], deadline: Deadline) -> list[RowT]:
        mine = _Submission[ItemT, RowT](items)
        with self._waiting_lock:
            self._waiting.append(mine)
        while not mine.done:
            if not deadline.remaining_s() or not self._run_lock.acquire(timeout=deadline.remaining_s()):
                mine.abandoned = True
                raise deadline.exceeded()
            try:
                if not mine.done:
                    self._run_waiting()
            finally:
                self._run_lock.release()
        if mine.error is not None:
            raise mine.error
        assert mine.rows is not None
        return mine.rows

    def _run_waiting(self) -> None:
        batch = self._take()
        if not batch:
            return
        try:
            rows = list(self._run([item for submission in batch for item in submission.items]))
        except BaseException as error:
            for submission in batch:
                submission.error, submission.done = error, True
            return
        start = 0
        for submission in batch:
            submission.rows = rows[start : start + len(submission.items)]
            start += len(submission.items)
            submission.done = True

    def _take(self) -> list[_Submission[ItemT, RowT]]:
        batch: list[_Submission[ItemT, RowT]] = []
        count = 0
        with self._waiting_lock:
            while self._waiting:
                first = self._waiting[0]
                if not first.abandoned and batch and count + len(first.items) > self._max_items:
                    break
                self._waiting.popleft()
                if not first.abandoned:
                    batch.append(first)
                    count += len(first.items)
        return batch
