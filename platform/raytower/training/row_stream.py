"""The stream of training batches: windows read and shuffled by Ray Data tasks beside training, cut into batches here.

Every worker streams the same rows and takes its slice of each batch. Reading is far cheaper than training, so this
costs less than coordinating a split would. It also makes the batches independent of the number of workers. No process
holds the training set: each worker's memory holds a few windows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray
import ray.data

from raytower.data.pieces import Piece
from raytower.training.batches import Rows, cut_batches, cut_distinct_batches
from raytower.training.windows import Window, plan_windows, read_window

# Windows of one Ray Data execution. Ray Data reads ahead as far as the object store allows, however slow the consumer
# is, so this number bounds a worker's share of memory.
_WINDOWS_PER_EXECUTION = 4
_READERS = 2
# A reader mostly waits for storage. It takes a fraction, so that the readers of many workers fit beside them.
CPUS_PER_READER = 0.25


@dataclass(frozen=True, kw_only=True)
class StreamPlan:
    """Everything that decides the batches of a run."""

    pieces: Sequence[Piece]
    batch_size: int
    num_batches: int
    seed: int
    window_rows: int
    distinct_columns: tuple[str, ...] = ()
    """Columns whose values no two rows of a batch may share; empty for plain shuffling."""


def stream_batches(plan: StreamPlan, skip_batches: int = 0) -> Iterator[Rows]:
    """The global batches of the run from number `skip_batches` on; the same ones however often it is called.

    Raises:
        InputError: a file has changed since the survey, or distinct batches cannot be made of these rows.
    """
    piece_rows = [piece.num_rows for piece in plan.pieces]
    windows = plan_windows(piece_rows, seed=plan.seed, window_rows=plan.window_rows)
    if plan.distinct_columns:
        # Which rows wait depends on all rows before them, so the batches are made from the start and skipped.
        tables = _read_windows(plan, windows)
        most_waiting = max(plan.window_rows, 100 * plan.batch_size)
        batches = cut_distinct_batches(tables, plan.batch_size, plan.distinct_columns, most_waiting)
        return itertools.islice(batches, skip_batches, plan.num_batches)
    first_row, end_row = skip_batches * plan.batch_size, plan.num_batches * plan.batch_size
    windows = itertools.dropwhile(lambda window: window.first_row + window.num_rows <= first_row, windows)
    windows = itertools.takewhile(lambda window: window.first_row < end_row, windows)
    tables = _read_windows(plan, windows, first_row)
    return itertools.islice(cut_batches(tables, plan.batch_size), plan.num_batches - skip_batches)


def _read_windows(plan: StreamPlan, windows: Iterator[Window], first_row: int = 0) -> Iterator[pa.Table]:
    """The windows' tables in order, from row `first_row` of the run on."""
    pieces = ray.put(plan.pieces)
    while some := list(itertools.islice(windows, _WINDOWS_PER_EXECUTION)):
        row = some[0].first_row
        for table in _execute(some, pieces, plan.seed):
            skipped = min(max(first_row - row, 0), table.num_rows)
            row += table.num_rows
            if skipped < table.num_rows:
                yield table.slice(skipped)


def _execute(windows: list[Window], pieces: ray.ObjectRef, seed: int) -> Iterator[pa.Table]:
    def read(batch: Any) -> pa.Table:
        (number,) = batch["window"].tolist()
        return read_window(windows[number], ray.get(pieces), seed)

    numbers = [{"window": number} for number in range(len(windows))]
    dataset = ray.data.from_items(numbers, override_num_blocks=len(numbers)).map_batches(
        read,
        batch_size=1,
        num_cpus=CPUS_PER_READER,
        compute=ray.data.TaskPoolStrategy(size=min(_READERS, len(numbers))),
    )
    # By default blocks come in the order in which tasks end; then two runs would differ.
    dataset.context.execution_options.preserve_order = True
    # The run shows its own progress; bars of each worker's stream would bury it.
    dataset.context.enable_progress_bars = False
    yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1)
