"""Cutting a stream of shuffled tables into global batches, and each batch into the workers' shares. Pure; no Ray."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa

from raytower.errors import InputError

Rows = dict[str, list[Any]]


def count_steps(num_rows: int, batch_rows: int, epochs: float) -> int:
    """Optimizer steps of a run: whole ones only, epochs flowing into each other.

    Args:
        num_rows: training rows.
        batch_rows: rows of one optimizer step over all workers.
        epochs: times that the rows are gone through.

    Raises:
        InputError: the rows do not fill one step.
    """
    if num_rows < batch_rows:
        raise InputError(
            f"{num_rows} training rows are fewer than one batch of {batch_rows}; lower batch_size"
        )
    return max(int(num_rows * epochs) // batch_rows, 1)


def count_unused(num_rows: int, batch_rows: int, epochs: float) -> int:
    """Rows of a run that fill no step: what is left of its last pass. Of 127 rows and steps of 64, 63.

    Arguments as of `count_steps`.
    """
    return max(int(num_rows * epochs) - count_steps(num_rows, batch_rows, epochs) * batch_rows, 0)


def cut_batches(tables: Iterable[pa.Table], batch_size: int) -> Iterator[Rows]:
    """Batches of `batch_size` rows in the tables' order. A batch may span tables; an incomplete one is left out."""
    pending: list[pa.Table] = []
    num_pending = 0
    for arrived in tables:
        pending.append(arrived)
        num_pending += arrived.num_rows
        if num_pending < batch_size:
            continue
        table = pa.concat_tables(pending)
        start = 0
        while num_pending - start >= batch_size:
            yield table.slice(start, batch_size).to_pydict()
            start += batch_size
        pending, num_pending = [table.slice(start)], num_pending - start


def join_windows(tables: Iterable[pa.Table], window_rows: Iterable[int]) -> Iterator[pa.Table]:
    """One table for each window of `window_rows` rows from tables that may hold a part of one each."""
    arriving = iter(tables)
    for num_rows in window_rows:
        parts: list[pa.Table] = []
        while sum(part.num_rows for part in parts) < num_rows:
            parts.append(next(arriving))
        yield pa.concat_tables(parts)


def skip_rows(tables: Iterable[pa.Table], count: int) -> Iterator[pa.Table]:
    """The tables without their first `count` rows."""
    for table in tables:
        skipped = min(count, table.num_rows)
        count -= skipped
        if skipped < table.num_rows:
            yield table.slice(skipped)


def num_rows(rows: Rows) -> int:
    """How many rows there are."""
    return len(next(iter(rows.values())))


def worker_slice(rows: Rows, rank: int, world_size: int) -> Rows:
    """The rows of a global batch that belong to one worker: contiguous and equally many for each."""
    size = num_rows(rows) // world_size
    return {name: values[rank * size : (rank + 1) * size] for name, values in rows.items()}
