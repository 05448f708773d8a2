"""The stream of training rows: every worker reads the same shuffled order and takes its slice of each batch.

The order depends on the seed and the pieces alone, never on the number of workers, so that N workers train on the
very batches that one would, and a run continues at any step by skipping rows. Reading is far cheaper than training,
so reading every row on each worker costs less than coordinating a split. Memory holds one shuffle window.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from raytower.data.pieces import Piece, read_piece
from raytower.errors import InputError

Rows = dict[str, list[Any]]


def count_steps(num_rows: int, batch_size: int, epochs: float) -> int:
    """Steps of a run: whole batches only, epochs flowing into each other.

    Raises:
        InputError: the rows do not fill one batch.
    """
    if num_rows < batch_size:
        raise InputError(
            f"{num_rows} training rows are fewer than one batch of {batch_size}; lower batch_size"
        )
    return max(int(num_rows * epochs) // batch_size, 1)


def stream_batches(
    pieces: Sequence[Piece], *, batch_size: int, seed: int, window_rows: int, skip_batches: int = 0
) -> Iterator[Rows]:
    """Endless batches of `batch_size` rows; each epoch has its own order.

    Pieces are permuted, then rows are permuted inside windows of at least `window_rows` rows.
    """
    pending: list[pa.Table] = []
    num_pending = 0
    to_skip = skip_batches * batch_size
    for window in _windows(pieces, seed, window_rows):
        if to_skip >= window.num_rows:
            to_skip -= window.num_rows
            continue
        window = window.slice(to_skip)
        to_skip = 0
        pending.append(window)
        num_pending += window.num_rows
        if num_pending < batch_size:
            continue
        table = pa.concat_tables(pending)
        start = 0
        while num_pending - start >= batch_size:
            yield table.slice(start, batch_size).to_pydict()
            start += batch_size
        rest = table.slice(start)
        pending, num_pending = ([rest], rest.num_rows) if rest.num_rows else ([], 0)


def worker_slice(rows: Rows, rank: int, world_size: int) -> Rows:
    """The rows of a global batch that belong to one worker: contiguous and equally many for each."""
    size = len(next(iter(rows.values()))) // world_size
    return {name: values[rank * size : (rank + 1) * size] for name, values in rows.items()}


def _windows(pieces: Sequence[Piece], seed: int, window_rows: int) -> Iterator[pa.Table]:
    epoch = 0
    while True:
        random = np.random.default_rng([seed, epoch])
        gathered: list[pa.Table] = []
        for number in random.permutation(len(pieces)):
            gathered.append(read_piece(pieces[number]))
            if sum(table.num_rows for table in gathered) >= window_rows:
                yield _shuffled(gathered, random)
                gathered = []
        if gathered:
            yield _shuffled(gathered, random)
        epoch += 1


def _shuffled(tables: list[pa.Table], random: np.random.Generator) -> pa.Table:
    table = pa.concat_tables(tables)
    return table.take(random.permutation(table.num_rows))
