"""Working ahead: the next of several inputs is computed in a thread while the last result is used. No torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Generic, TypeVar

_Input = TypeVar("_Input")
_Output = TypeVar("_Output")


class Ahead(Generic[_Input, _Output]):
    """Goes through `inputs` and gives `function` of each; the next is computed in a thread while the last is used.

    Iterate over it inside `with`; `seconds` is the time spent in `function` so far. What has been begun is finished at
    the end: other processes may have begun the same, and wait for this one's part in it.
    """

    def __init__(self, function: Callable[[_Input], _Output], inputs: Iterable[_Input]) -> None:
        self.seconds = 0.0
        self._function = function
        self._inputs = iter(inputs)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ahead")
        self._next = self._begin()

    def __enter__(self) -> Ahead[_Input, _Output]:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()

    def rest(self) -> None:
        """Return once nothing is computed: what the thread uses may be used here until the next output is taken."""
        wait([] if self._next is None else [self._next])

    def __iter__(self) -> Iterator[_Output]:
        while self._next is not None:
            output = self._next.result()
            self._next = self._begin()
            yield output

    def _begin(self) -> Future[_Output] | None:
        for value in self._inputs:
            return self._thread.submit(self._timed, value)
        return None

    def _timed(self, value: _Input) -> _Output:
        started = time.perf_counter()
        output = self._function(value)
        self.seconds += time.perf_counter() - started
        return output
