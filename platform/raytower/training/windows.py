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

from raytower.data.pieces import Piece, read_piece


@dataclass(frozen=True)
class Window:
    """Rows that are shuffled together. `pieces` are positions in the list of all pieces, in the order of reading."""

    epoch: int
    number: int
    pieces: tuple[int, ...]
    first_row: int
    """Rows of the whole run before this window, earlier epochs counted."""
    num_rows: int


def plan_windows(piece_rows: Sequence[int], *, seed: int, window_rows: int) -> Iterator[Window]:
    """Endless windows, epoch after epoch; each epoch's hold every piece once.

    Args:
        piece_rows: rows of each piece.
        seed: decides the order.
        window_rows: fewest rows of a window, except for the last of an epoch.
    """
    epoch, first_row = 0, 0
    while True:
        number = 0
        gathered: list[int] = []
        order = np.random.default_rng([seed, epoch]).permutation(len(piece_rows)).tolist()
        for place, piece in enumerate(order):
            gathered.append(piece)
            num_rows = sum(piece_rows[index] for index in gathered)
            if num_rows >= window_rows or place == len(order) - 1:
                yield Window(epoch, number, tuple(gathered), first_row, num_rows)
                first_row += num_rows
                number += 1
                gathered = []
        epoch += 1


def read_window(window: Window, pieces: Sequence[Piece], seed: int) -> pa.Table:
    """The rows of a window in their order of training; the same every time."""
    table = pa.concat_tables([read_piece(pieces[index]) for index in window.pieces])
    random = np.random.default_rng([seed, window.epoch, window.number])
    return table.take(random.permutation(table.num_rows))
