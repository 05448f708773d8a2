"""Progress of an encoding job, block by block, though a file may take its worker minutes."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raytower.progress import log

_LOG_EVERY_SECONDS = 5.0
_ANSWER_WITHIN_SECONDS = 5.0


class ProgressBoard:
    """An actor beside the driver. Workers write how far each of their pieces is; a piece begun again starts over."""

    def __init__(self) -> None:
        self._pieces: dict[int, tuple[int, int]] = {}
        self._started = 0.0

    def report(self, piece: int, rows: int, tokens: int) -> None:
        """`rows` and `tokens` of this piece are encoded by now; none when it is begun."""
        if not self._pieces:
            self._started = time.perf_counter()
        self._pieces[piece] = (rows, tokens)

    def totals(self) -> tuple[int, int, float]:
        """Rows and tokens of all pieces, and the seconds since the first of them was begun."""
        counts = list(self._pieces.values())
        seconds = time.perf_counter() - self._started if counts else 0.0
        return sum(rows for rows, _ in counts), sum(tokens for _, tokens in counts), seconds


@contextmanager
def progress(total_rows: int) -> Iterator[Any]:
    """Log texts and tokens a second and the time left, every few seconds while the block runs, and once at its end.

    The block gets the board that its workers write to. Rates count from the first text: starting workers is not
    encoding.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    board: Any = ray.remote(ProgressBoard).options(num_cpus=0, scheduling_strategy=here).remote()
    stop = threading.Event()

    def log_totals() -> None:
        try:
            rows, tokens, seconds = ray.get(board.totals.remote(), timeout=_ANSWER_WITHIN_SECONDS)
        except RayError:  # a line less, no reason to stop encoding
            return
        if rows:
            log(progress_line(rows, total_rows, tokens, seconds))

    def watch() -> None:
        while not stop.wait(_LOG_EVERY_SECONDS):
            log_totals()

    thread = threading.Thread(target=watch, name="progress", daemon=True)
    thread.start()
    try:
        try:
            yield board
        finally:
            stop.set()
            thread.join()
        log_totals()
    finally:
        ray.kill(board)


def progress_line(rows: int, total_rows: int, tokens: int, seconds: float) -> str:
    """What is done, how fast, and how long the rest will take at that rate."""
    seconds = max(seconds, 1e-9)
    return (
        f"encoded {rows:,}/{total_rows:,} texts  {rows / seconds:,.0f} texts/s  {tokens / seconds:,.0f} tokens/s  "
        f"{seconds * (total_rows - rows) / rows:,.0f} s left"
    )
