"""Cutting a stream of shuffled tables into global batches, and each batch into the workers' shares. Pure; no Ray."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
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


def cut_batches(tables: Iterable[pa.Table], batch_size: int) -> Iterator[Rows]:
    """Batches of `batch_size` rows in the tables' order; a batch may span tables, an incomplete one is not given."""
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


def cut_distinct_batches(
    tables: Iterable[pa.Table], batch_size: int, columns: Sequence[str], max_waiting: int
) -> Iterator[Rows]:
    """Batches in which no two rows share a value of any of `columns`; null is shared with nobody.

    Rows are taken in order; a row that collides waits and stands first in line for the next batch. So no row is lost,
    and a row that collides often comes later, perhaps in the next epoch.

    Raises:
        InputError: more than `max_waiting` rows wait: the data repeat themselves too much for distinct batches.
    """
    waiting: list[dict[str, Any]] = []
    batch: list[dict[str, Any]] = []
    seen: set[tuple[str, Any]] = set()
    for table in tables:
        for row in table.to_pylist():
            if not _place(row, columns, batch, seen):
                waiting.append(row)
                if len(waiting) > max_waiting:
                    raise InputError(
                        f"more than {max_waiting} rows cannot be placed in batches of {batch_size} without sharing a "
                        f"{' or '.join(columns)}; use sampler: shuffle (false negatives are masked anyway) or a "
                        "smaller batch_size"
                    )
            while len(batch) == batch_size:
                yield {name: [item[name] for item in batch] for name in table.column_names}
                batch, seen = [], set()
                waiting = [item for item in waiting if not _place(item, columns, batch, seen, batch_size)]


def _place(
    row: dict[str, Any],
    columns: Sequence[str],
    batch: list[dict[str, Any]],
    seen: set[tuple[str, Any]],
    batch_size: int | None = None,
) -> bool:
    """Put a row into the batch unless it collides there, or the batch is full."""
    keys = {(name, row[name]) for name in columns if row[name] is not None}
    if keys & seen or (batch_size is not None and len(batch) >= batch_size):
        return False
    batch.append(row)
    seen |= keys
    return True


def worker_slice(rows: Rows, rank: int, world_size: int) -> Rows:
    """The rows of a global batch that belong to one worker: contiguous and equally many for each."""
    size = len(next(iter(rows.values()))) // world_size
    return {name: values[rank * size : (rank + 1) * size] for name, values in rows.items()}
