"""The metrics of all processes of a server in one text.

A proxy sends a scrape to one replica, whichever it likes. So each process hands its text to the conductor every few
seconds, and the replica that is asked joins the last texts of the others to its own. Imports no Ray.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial

from raytower.serving.access_log import RequestFacts
from raytower.serving.forwards import Forwards, Lane, PassFacts
from raytower.serving.metrics import Metrics, age_text, merge

_LOGGER = logging.getLogger("raytower.serving")
REPORT_S = 5.0
"""A process hands its figures over so often."""
MAX_AGE_S = 15.0
"""Figures that are older are those of a process that has ended."""


@dataclass(frozen=True)
class Figures:
    """The text of a process's metrics, and how many seconds ago it was true."""

    text: bytes
    age_s: float


class FiguresBoard:
    """The last text of each process, at the conductor."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._texts: dict[str, tuple[float, bytes]] = {}

    def put(self, process: str, text: bytes) -> None:
        self._texts[process] = (self._clock(), text)

    def others(self, process: str) -> dict[str, Figures]:
        """What all but one process have handed over, by their names."""
        now = self._clock()
        self._texts = {name: item for name, item in self._texts.items() if now - item[0] <= MAX_AGE_S}
        return {name: Figures(text, now - at) for name, (at, text) in self._texts.items() if name != process}


class AllMetrics:
    """The metrics of a replica, which renders those of the other processes too. It implements `exchange.Metrics`.

    Args:
        own: this replica's.
        others: the others' last figures. It is called in a thread and may block.
    """

    def __init__(self, own: Metrics, others: Callable[[], Mapping[str, Figures]]) -> None:
        self._own = own
        self._others = others

    def record(self, facts: RequestFacts) -> None:
        """Counts a request that has ended."""
        self._own.record(facts)

    def render(self) -> tuple[bytes, str]:
        """The text of all processes, and its content type."""
        others = self._others()
        text, content_type = self._own.render()
        ages = {self._own.replica: 0.0, **{name: item.age_s for name, item in others.items()}}
        return merge([text, *(item.text for item in others.values()), age_text(ages)]), content_type


async def keep_reporting(
    metrics: Metrics, put: Callable[[str, bytes], Awaitable[None]], every_s: float = REPORT_S
) -> None:
    """Hand a process's figures over, until it is cancelled. What `put` raises is logged once in a row of failures."""
    has_failed = False
    while True:
        try:
            text, _ = await asyncio.to_thread(metrics.render)
            await put(metrics.replica, text)
            has_failed = False
        except Exception as error:
            if not has_failed:
                _LOGGER.warning("metrics were not handed over: %s: %s", type(error).__name__, error)
            has_failed = True
        await asyncio.sleep(every_s)


def counted_forwards(metrics: Metrics) -> Forwards:
    """The forward passes of a process, told to its metrics."""

    def passed(facts: PassFacts) -> None:
        metrics.forward(
            facts.model,
            rows=facts.rows,
            tokens=facts.tokens,
            padding=facts.padded_tokens - facts.tokens,
            seconds=facts.seconds,
        )
        for seconds in facts.waits:
            metrics.queue_waited("forwards", facts.lane.name.lower(), seconds)

    forwards = Forwards(passed)
    for lane in Lane:
        metrics.watch_queue("forwards", lane.name.lower(), partial(_waiting, forwards, lane))
    return forwards


def _waiting(forwards: Forwards, lane: Lane) -> float:
    return float(forwards.waiting_rows(lane))
