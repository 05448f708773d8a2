"""How long a forward pass takes, and whether a request would end in time. No torch, no Ray; clocks are given."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from raytower.serving.errors import OverloadedError
from raytower.serving.work import Deadline

Clock = Callable[[], float]
# What is taken before anything was measured: a small model on one core.
_SECONDS_PER_TOKEN = 2e-4
_SECONDS_PER_PASS = 2e-3
# Of a measurement, this share is forgotten with each that follows.
_FORGETTING = 0.05
# Beyond so many times its prediction a pass says more of the machine's other work than of the model.
_STALLED = 5.0
# So few requests are no overload, however long a machine takes for them.
_FEW = 16


class ForwardCost:
    """The seconds of a forward pass as a line over its padded tokens, fitted to the passes seen last."""

    def __init__(self) -> None:
        self._per_pass = _SECONDS_PER_PASS
        self._per_token = _SECONDS_PER_TOKEN
        self._count = self._tokens = self._seconds = self._squares = self._products = 0.0

    def observe(self, tokens: int, seconds: float) -> None:
        """Take a pass over so many padded tokens into account; one that stalled counts as a few times its usual."""
        keep = 1 - _FORGETTING
        seconds = min(seconds, _STALLED * self.predict(tokens))
        self._count = self._count * keep + 1
        self._tokens = self._tokens * keep + tokens
        self._seconds = self._seconds * keep + seconds
        self._squares = self._squares * keep + tokens * tokens
        self._products = self._products * keep + tokens * seconds
        variance = self._squares - self._tokens**2 / self._count
        slope = 0.0
        if variance > 1e-9 * self._squares:
            slope = (self._products - self._tokens * self._seconds / self._count) / variance
        # Passes of one size say nothing of the slope, and noise may turn it: then all of the time is the tokens'.
        if slope <= 0 or slope * self._tokens > self._seconds:
            slope = self._seconds / self._tokens
        self._per_token = slope
        self._per_pass = max((self._seconds - slope * self._tokens) / self._count, 0.0)

    def predict(self, tokens: int) -> float:
        """Seconds of one pass over so many padded tokens."""
        return self._per_pass + self._per_token * tokens

    def tokens_in(self, seconds: float) -> int:
        """Padded tokens that one pass gets through in so much time; at least 1.

        At least as many too as take the time that every pass takes: smaller passes would do little else, which a slow
        machine cannot afford.
        """
        left_s = max(seconds - self._per_pass, self._per_pass)
        return max(int(left_s / self._per_token), 1)


@dataclass(eq=False)
class Ticket:
    """An admitted request's place: what it was predicted to cost, in seconds of forward passes."""

    admission: Admission
    cost_s: float
    expected_s: float
    started: float
    urgent: bool

    def __enter__(self) -> Ticket:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        self.admission.end(self, answered=kind is None)


class Admission:
    """Lets a request in if it would end in time, judged by the work that was let in before it.

    The work of all requests that are let in and have not ended is added up. A factor, learned from how long requests
    really took, turns that sum into time: forward passes are shared, and other stages take time too.
    """

    def __init__(self, max_requests: int, max_wait_s: float, clock: Clock = time.monotonic) -> None:
        """`max_wait_s` bounds how long an urgent request may be expected to wait for those before it."""
        self._max_requests = max_requests
        self._max_wait_s = max_wait_s
        self._clock = clock
        self._lock = threading.Lock()
        self._urgent_s = self._other_s = 0.0
        self._requests = 0
        self._factor = 1.0
        self.answered = 0
        """How many have been answered."""

    @property
    def requests(self) -> int:
        """How many are in."""
        return self._requests

    def admit(self, cost_s: float, deadline: Deadline, *, urgent: bool) -> Ticket:
        """A place for a request of so many seconds of forward passes. Urgent ones do not wait for the others.

        Raises:
            OverloadedError: it would not end by its deadline, or wait too long, or there are too many; Retry-After
                says when to try again.
        """
        deadline.check()
        with self._lock:
            before = self._urgent_s if urgent else self._urgent_s + self._other_s
            wait_s = before * self._factor
            expected_s = wait_s + cost_s * self._factor
            # Alone, a request is let in whatever was learned: something must be measured again.
            alone = not self._requests
            if self._requests >= self._max_requests:
                raise _overloaded(wait_s)
            # Dear requests may wait longer: nobody is surprised by twice what a request takes anyway.
            patience_s = max(self._max_wait_s, 2 * cost_s * self._factor)
            waits_long = urgent and wait_s > patience_s and self._requests >= _FEW
            if not alone and (expected_s > deadline.remaining_s() or waits_long):
                raise _overloaded(wait_s)
            self._requests += 1
            if urgent:
                self._urgent_s += cost_s
            else:
                self._other_s += cost_s
        return Ticket(self, cost_s, expected_s, self._clock(), urgent)

    def end(self, ticket: Ticket, *, answered: bool) -> None:
        """Give the place back; what was answered teaches how long requests take."""
        took_s = self._clock() - ticket.started
        with self._lock:
            self._requests -= 1
            self.answered += answered
            if ticket.urgent:
                self._urgent_s = max(self._urgent_s - ticket.cost_s, 0.0)
            else:
                self._other_s = max(self._other_s - ticket.cost_s, 0.0)
            if not self._requests:
                self._urgent_s = self._other_s = 0.0  # no sum of rounding errors
            if answered and ticket.urgent and ticket.expected_s > 0:
                seen = min(max(took_s / ticket.expected_s, 0.1), 10.0)
                self._factor = min(max(self._factor * seen**_FORGETTING, 0.1), 20.0)


def _overloaded(wait_s: float) -> OverloadedError:
    seconds = max(math.ceil(wait_s), 1)
    return OverloadedError(
        f"the server has too much to do to answer in time; try again in {seconds} s",
        headers={"Retry-After": str(seconds)},
    )
