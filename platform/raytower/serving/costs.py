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
# Passes grow beyond the time they should take where twice the tokens take less than so many times as long.
_GAIN = 1.8
# Taken together though passes take long; fewer hardly take less.
_LEAST_TOKENS = 64
# Of a measurement, this share is forgotten with each that follows.
_FORGETTING = 0.05
# Beyond so many times its prediction a pass says more of the machine's other work than of the model.
_STALLED = 5.0
# So few requests are no overload, however long a machine takes for them.
_FEW = 16


class ForwardCost:
    """The seconds of a forward pass by its padded tokens, from the passes seen last.

    Sizes within a factor of two are one class, which keeps the means of its own last passes: thousands of short queries
    do not make what long texts take forgotten. Between the means of two classes, time is a line.
    """

    def __init__(self) -> None:
        self._classes: dict[int, _Mean] = {}
        # (tokens, seconds) of the classes, both rising; replaced as a whole, since other threads read it.
        self._points: tuple[tuple[float, float], ...] = ()

    def observe(self, tokens: int, seconds: float) -> None:
        """Take a pass over so many padded tokens into account; one that stalled counts as a few times its usual."""
        if self._points:
            seconds = min(seconds, _STALLED * self.predict(tokens))
        self._classes.setdefault(tokens.bit_length(), _Mean()).add(tokens, seconds)
        points: list[tuple[float, float]] = []
        for _, mean in sorted(self._classes.items()):
            # Noise never makes more tokens cheaper.
            points.append((mean.tokens, max(mean.seconds, points[-1][1] if points else 0.0)))
        self._points = tuple(points)

    def predict(self, tokens: int) -> float:
        """Seconds of one pass over so many padded tokens."""
        (left, low), (right, high) = self._segment(lambda point: point[0] >= tokens)
        return max(low + (high - low) * (tokens - left) / (right - left), 0.0)

    def tokens_in(self, seconds: float, most_s: float) -> int:
        """Padded tokens that one pass gets through in so much time; at least 1.

        More, up to what takes `most_s`, where twice the tokens take much less than twice the time: small passes would
        mostly do what every pass does once, which a slow machine cannot afford. Where even the smallest passes took
        longer than `seconds`, 64: what more tokens take has to be seen.
        """
        tokens = self._first_in(seconds)
        while self.predict(2 * tokens) < min(_GAIN * self.predict(tokens), most_s):
            tokens *= 2
        least = _LEAST_TOKENS if self._points and seconds <= self._points[0][1] else 1
        return max(tokens, least)

    def _first_in(self, seconds: float) -> int:
        (left, low), (right, high) = self._segment(lambda point: point[1] >= seconds)
        return max(int(left + (seconds - low) * (right - left) / max(high - low, 1e-9) + 1e-6), 1)

    def _segment(
        self, is_beyond: Callable[[tuple[float, float]], bool]
    ) -> tuple[tuple[float, float], tuple[float, float]]:
        """The two points between which, or in whose direction, the first place lies that is beyond."""
        points = self._points
        if not points:
            return (0.0, _SECONDS_PER_PASS), (1.0, _SECONDS_PER_PASS + _SECONDS_PER_TOKEN)
        if len(points) == 1:  # nothing says what a pass of no tokens takes
            return (0.0, 0.0), points[0]
        end = next((number for number, point in enumerate(points) if is_beyond(point)), len(points) - 1)
        end = max(end, 1)
        if points[end][1] <= points[end - 1][1] and not is_beyond(points[end]):
            return (0.0, 0.0), points[end]
        return points[end - 1], points[end]


class _Mean:
    """Means of tokens and seconds that forget."""

    def __init__(self) -> None:
        self._count = 0
        self.tokens = self.seconds = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        self._count += 1
        share = max(1 / self._count, _FORGETTING)
        self.tokens += share * (tokens - self.tokens)
        self.seconds += share * (seconds - self.seconds)


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
