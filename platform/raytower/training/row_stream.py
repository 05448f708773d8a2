"""The stream of training batches: windows read and shuffled by Ray Data tasks beside training, cut into batches here.

Every worker streams the same rows and takes its slice of each batch. Reading is far cheaper than training, so this
costs less than coordinating a split would. It also makes the batches independent of the number of workers. No process
holds the training set: each worker's memory holds a few windows.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data

from raytower.data.pieces import Piece
from raytower.progress import log
from raytower.training.batches import Rows, cut_batches, join_windows, num_rows, skip_rows
from raytower.training.distinct_batches import spread_duplicates
from raytower.training.mixing import SET, order_of_sets
from raytower.training.windows import Window, plan_windows, read_window, windows_from

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
    """Columns whose values no two rows of a batch should share; empty for plain shuffling."""
    num_documents: int | None = None
    """Most documents of a candidate list; longer ones are drawn from, anew in each epoch."""


@dataclass(frozen=True, kw_only=True)
class MixedPlan(StreamPlan):
    """Several sets of rows; `pieces` are those of all, and `num_batches` their sum."""

    sets: Mapping[str, StreamPlan]
    """The plan of each set by name."""


def stream_batches(
    plan: StreamPlan, skip_batches: int = 0, tell: Callable[[str], None] = log
) -> Iterator[Rows]:
    """The global batches of the run from number `skip_batches` on; the same ones however often it is called.

    `tell` hears of rows that no batch without their values was left for, once.

    Raises:
        InputError: a file has changed since the survey.
    """
    if isinstance(plan, MixedPlan):
        return _stream_sets(plan, skip_batches, tell)
    first_row, end_row = skip_batches * plan.batch_size, plan.num_batches * plan.batch_size
    piece_rows = [piece.num_rows for piece in plan.pieces]
    windows = plan_windows(piece_rows, seed=plan.seed, window_rows=plan.window_rows)
    # What the order of distinct batches depends on reaches back to the windows that the first batch comes from.
    windows = windows_from(windows, first_row, plan.batch_size if plan.distinct_columns else 1)
    begin = next(windows)
    windows = itertools.takewhile(
        lambda window: window.first_row < end_row, itertools.chain([begin], windows)
    )
    sizes, windows = itertools.tee(windows)
    tables = _read_windows(plan, windows)
    if plan.distinct_columns:
        tables = spread_duplicates(
            join_windows(tables, (window.num_rows for window in sizes)),
            plan.batch_size,
            plan.distinct_columns,
            seed=plan.seed,
            first_row=begin.first_row,
            tell=tell,
        )
    tables = skip_rows(tables, first_row - begin.first_row)
    return itertools.islice(cut_batches(tables, plan.batch_size), plan.num_batches - skip_batches)


def _stream_sets(plan: MixedPlan, skip_batches: int, tell: Callable[[str], None]) -> Iterator[Rows]:
    """The batches of each set in their order, with the name of the set in the column SET."""
    names = list(plan.sets)
    order_N = order_of_sets([own.num_batches for own in plan.sets.values()], plan.seed)
    done = np.bincount(order_N[:skip_batches], minlength=len(names)).tolist()
    # A set begins to be read with its first batch.
    streams = [
        stream_batches(own, skipped, lambda message, name=name: tell(f"train.sets.{name}: {message}"))  # type: ignore[misc]
        for (name, own), skipped in zip(plan.sets.items(), done, strict=True)
    ]
    for number in order_N[skip_batches:].tolist():
        rows = next(streams[number])
        yield {**rows, SET: [names[number]] * num_rows(rows)}


def _read_windows(plan: StreamPlan, windows: Iterator[Window]) -> Iterator[pa.Table]:
    """The windows' rows in order; a window may come in several tables."""
    pieces = ray.put(plan.pieces)
    while some := list(itertools.islice(windows, _WINDOWS_PER_EXECUTION)):
        yield from _execute(some, pieces, plan)


def _execute(windows: list[Window], pieces: ray.ObjectRef, plan: StreamPlan) -> Iterator[pa.Table]:
    seed, num_documents = plan.seed, plan.num_documents

    def read(batch: Any) -> pa.Table:
        (number,) = batch["window"].tolist()
        return read_window(windows[number], ray.get(pieces), seed, num_documents)

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
