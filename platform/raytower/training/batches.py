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


def cut_distinct_batches(
    tables: Iterable[pa.Table], batch_size: int, columns: Sequence[str], max_waiting: int
) -> Iterator[Rows]:
    """Batches in which no two rows share a value of any of `columns`; null equals nothing.

    Rows are taken in order. A row that collides waits and comes first for the next batch. So no row is lost, and a row
    that collides often comes later, perhaps in the next epoch.

    Raises:
        InputError: more than `max_waiting` rows wait: the data repeat themselves too much for distinct batches.
    """
    waiting: list[_KeyedRow] = []
    batch = _DistinctBatch(batch_size)
    for table in tables:
        for row in table.to_pylist():
            keyed = (_keys(row, columns), row)
            if not batch.take(keyed):
                waiting.append(keyed)
                if len(waiting) > max_waiting:
                    raise InputError(
                        f"more than {max_waiting} rows cannot be placed in batches of {batch_size} without sharing a "
                        f"{' or '.join(columns)}; use sampler: shuffle (false negatives are masked anyway) or a "
                        "smaller batch_size"
                    )
            while len(batch.rows) == batch_size:
                yield {name: [item[name] for item in batch.rows] for name in table.column_names}
                batch = _DistinctBatch(batch_size)
                waiting = [item for item in waiting if not batch.take(item)]


_KeyedRow = tuple[frozenset[tuple[str, Any]], dict[str, Any]]


class _DistinctBatch:
    """Rows that share no key."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.rows: list[dict[str, Any]] = []
        self._seen: set[tuple[str, Any]] = set()

    def take(self, keyed: _KeyedRow) -> bool:
        """Take a row in, unless the batch is full or has one of its keys."""
        keys, row = keyed
        if len(self.rows) == self.size or not self._seen.isdisjoint(keys):
            return False
        self.rows.append(row)
        self._seen |= keys
        return True


def _keys(row: dict[str, Any], columns: Sequence[str]) -> frozenset[tuple[str, Any]]:
    values = ((name, row[name][0] if isinstance(row[name], list) else row[name]) for name in columns)
    return frozenset((name, value) for name, value in values if value is not None)


def num_rows(rows: Rows) -> int:
    """How many rows there are."""
    return len(next(iter(rows.values())))


def worker_slice(rows: Rows, rank: int, world_size: int) -> Rows:
    """The rows of a global batch that belong to one worker: contiguous and equally many for each."""
    size = num_rows(rows) // world_size
    return {name: values[rank * size : (rank + 1) * size] for name, values in rows.items()}
