"""The order of training rows: which pieces are shuffled together, and in which order. Pure; no Ray.

Each epoch permutes the pieces, gathers them into windows of at least `window_rows` rows and permutes the rows inside
each window. The order depends on the seed and the pieces alone, never on the number of workers. So N workers train on
the very batches that one would, and a run can continue at any row without reading earlier windows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray


@dataclass(frozen=True)
class Window:
    """Rows that are shuffled together. `pieces` are positions in the list of all pieces, in the order of reading."""

    epoch: int
    number: int
    pieces: tuple[int, ...]
    first_row: int
    """Rows of the whole run before this window, earlier epochs counted."""
    num_rows: int

    @property
    def end_row(self) -> int:
        """Rows of the whole run up to the end of this window."""
        return self.first_row + self.num_rows


def plan_windows(piece_rows: Sequence[int], *, seed: int, window_rows: int) -> Iterator[Window]:
    """Endless windows, epoch after epoch; each epoch's hold every piece once.

    Args:
        piece_rows: rows of each piece.
        seed: decides the order.
        window_rows: fewest rows of a window, except for the last of an epoch.
    """
    epoch, first_row = 0, 0
    while True:
        number = num_rows = 0
        gathered: list[int] = []
        order = np.random.default_rng([seed, epoch]).permutation(len(piece_rows)).tolist()
        for place, piece in enumerate(order):
            gathered.append(piece)
            num_rows += piece_rows[piece]
            if num_rows >= window_rows or place == len(order) - 1:
                yield Window(epoch, number, tuple(gathered), first_row, num_rows)
                first_row += num_rows
                number += 1
                gathered, num_rows = [], 0
        epoch += 1


def windows_from(windows: Iterator[Window], first_row: int, batch_size: int = 1) -> Iterator[Window]:
    """The windows from the one of row `first_row` on, and before it those that share a batch with its beginning."""
    held: list[Window] = []
    for window in windows:
        batch_begin = window.first_row // batch_size * batch_size
        held = [*(earlier for earlier in held if earlier.end_row > batch_begin), window]
        if window.end_row > first_row:
            yield from held
            yield from windows
            return


def readers_of(window: Window, num_workers: int) -> NDArray[np.int64]:
    """(P,) the worker that reads each piece of a window: they take turns, on from one window to the next."""
    first = window.number * len(window.pieces)
    return (first + np.arange(len(window.pieces))) % num_workers


def workers_of(window: Window, batch_size: int, num_workers: int) -> NDArray[np.int64]:
    """(N,) the worker that trains on the row at each position of a window.

    A worker takes contiguous rows of a batch: of batches of 4, two workers have 0 0 1 1 0 0 1 1 in the first window.
    """
    places_N = np.arange(window.first_row, window.end_row) % batch_size
    return places_N // (batch_size // num_workers)


def draw_documents(table: pa.Table, count: int, random: np.random.Generator) -> pa.Table:
    """`table` with at most `count` documents and scores in a row: the first, and others that `random` draws.

    They keep their order. Rows that have no more than `count` stay as they are.
    """
    lengths = pc.list_value_length(table["documents"]).to_numpy().astype(np.int64)
    if lengths.max(initial=0) <= count:
        return table
    firsts = np.cumsum(lengths) - lengths
    row = np.repeat(np.arange(len(lengths)), lengths)
    lots = random.random(len(row))
    lots[firsts] = -1
    # Elements of a row by their lots: rows of 3 and 2 elements with lots -1 .9 .2, -1 .5 give 0 2 1, 3 4.
    by_lot = np.lexsort((lots, row))
    kept = np.zeros(len(row), dtype=bool)
    kept[by_lot[np.arange(len(row)) - firsts[row] < count]] = True
    for name in ("documents", "scores"):
        table = table.set_column(
            table.column_names.index(name), table.schema.field(name), _kept_elements(table[name], kept)
        )
    return table


def _kept_elements(column: pa.ChunkedArray, kept: NDArray[np.bool_]) -> pa.ChunkedArray:
    """The lists of `column` with those of their elements, counted over all lists, that are kept."""
    chunks, start = [], 0
    for chunk in column.chunks:
        elements = chunk.flatten()
        own = kept[start : start + len(elements)]
        before = np.concatenate([[0], np.cumsum(own)])
        ends = np.concatenate([[0], np.cumsum(chunk.value_lengths().to_numpy())])
        offsets = pa.array(before[ends], pa.int32())
        chunks.append(pa.ListArray.from_arrays(offsets, elements.filter(pa.array(own))).cast(chunk.type))
        start += len(elements)
    return pa.chunked_array(chunks, column.type)
