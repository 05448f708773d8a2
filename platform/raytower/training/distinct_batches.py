"""An order of rows in which those that share a value come in different batches, as far as there are batches. Pure.

Rows are reordered inside their window alone. So each epoch holds every row once, nothing waits, and a run can continue
at any batch without the rows before it:

    rows of a window     [ head | whole batches … | tail ]

The head completes the batch that the windows before have begun, the tail begins the next one. The tail is chosen by the
window's own rows, whatever came before; then the head by the tail of the windows before; so what a window's order
depends on never reaches further back than the batch that it continues.

Values are compared by 64-bit hashes, which workers send each other in place of texts. In one window of 100,000 rows
among four thousand million two values have one hash by chance; then their rows keep apart for nothing.

Shape legend: N rows of a window, C columns that tell rows apart, m batches of a window.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

Codes = NDArray[np.int64]
Hashes = NDArray[np.uint64]

# Batches that a row is offered to before it is put where it shares something. A row is refused by the batches that have
# its value already; even where half of them do, 64 in a row are one chance in 10^19.
_MOST_SKIPS = 64
_NONE = -1
_NO_VALUE = 0


class DistinctOrders:
    """Of one window after the other, an order in which batches share no value; null equals nothing.

    A row that has no such place comes all the same, because a run must not end for it: objectives mask what is known
    to be relevant.
    """

    def __init__(
        self,
        batch_size: int,
        columns: Sequence[str],
        *,
        seed: int,
        first_row: int = 0,
        tell: Callable[[str], None] = lambda message: None,
    ) -> None:
        """Nothing is computed yet.

        Args:
            batch_size: rows of a batch; batches go on from one window to the next.
            columns: names of what no two rows of a batch should share, for the message.
            seed: decides the order, with the position of the window in the run.
            first_row: rows of the run before the first window. The batch that it may continue counts as empty.
            tell: gets one message, for the first window with rows that share a value all the same.
        """
        self._batch_size = batch_size
        self._columns = columns
        self._seed = seed
        self._row = first_row
        self._tell = tell
        self._told = False
        self._begun: Hashes = np.empty((0, len(columns)), dtype=np.uint64)

    def next_order(self, hashes_NC: Hashes) -> NDArray[np.int64]:
        """(N,) the rows of the next window in their new order; `hashes_NC` as `value_hashes`, in the shuffled one."""
        open_rows = len(self._begun)
        codes = value_codes(np.concatenate([self._begun, hashes_NC]))
        head = -self._row % self._batch_size
        random = np.random.default_rng([self._seed, self._row])
        order_N = distinct_order(codes[open_rows:], codes[:open_rows], head, self._batch_size, random)
        ordered = np.concatenate([codes[:open_rows], codes[open_rows:][order_N]])
        sharing = count_sharing(ordered, open_rows + head, self._batch_size)
        if sharing and not self._told:
            self._told = True
            self._tell(
                f"sampler no_duplicates: {sharing:,} of {len(order_N):,} rows share a {' or '.join(self._columns)} "
                "with another row of their batch, for want of batches; those known to be relevant are masked. A "
                "smaller batch_size or a larger shuffle_rows makes them fewer"
            )
        self._row += len(order_N)
        rows = np.concatenate([self._begun, hashes_NC[order_N]])
        in_batch = min(self._row % self._batch_size, len(rows))
        self._begun = rows[len(rows) - in_batch :]
        return order_N


def value_hashes(table: pa.Table, columns: Sequence[str]) -> Hashes:
    """(N, C) a hash of each value, the same in every process; 0 for null. Of a list of documents the first counts."""
    hashes = np.empty((table.num_rows, len(columns)), dtype=np.uint64)
    for place, name in enumerate(columns):
        column = table[name]
        if pa.types.is_list(column.type):
            column = pc.list_element(column, 0)
        own = pd.util.hash_array(column.to_numpy())
        hashes[:, place] = np.where(column.is_null().to_numpy(), np.uint64(_NO_VALUE), own)
    return hashes


def value_codes(hashes_NC: Hashes) -> Codes:
    """(N, C) a number for each value, by its first row; equal ones in a column have the same, no two columns share one.

    Null is -1. Of the columns `a b a`, `x null x` the codes are 0 2, 1 -1, 0 2.
    """
    codes = np.full(hashes_NC.shape, _NONE, dtype=np.int64)
    first = 0
    for place, column in enumerate(hashes_NC.T):
        is_value = column != _NO_VALUE
        own, values = pd.factorize(column[is_value])
        codes[is_value, place] = own + first
        first += len(values)
    return codes


def distinct_order(
    codes: Codes, begun: Codes, head: int, batch_size: int, random: np.random.Generator
) -> NDArray[np.int64]:
    """(N,) the rows in an order of which the first `head` go with `begun`, and then every `batch_size` together.

    Args:
        codes: (N, C) of the window's rows; see `value_codes`.
        begun: (n, C) of the rows of the batch that the first ones go into.
        head: rows that this batch still takes.
        batch_size: rows of a batch.
        random: decides among orders that are equally good.
    """
    num_rows = len(codes)
    if num_rows <= head:
        return np.arange(num_rows)
    num_batches, tail_size = divmod(num_rows - head, batch_size)
    tail = _distinct_rows(codes, tail_size)
    others = np.setdiff1d(np.arange(num_rows), tail, assume_unique=True)
    room = np.array([head, *[batch_size] * num_batches])
    batch = _place(codes[others], begun, room, random)
    return np.concatenate([others[np.argsort(batch, kind="stable")], tail])


def _distinct_rows(codes: Codes, count: int) -> NDArray[np.int64]:
    """The first `count` rows that share nothing; if there are fewer, others fill up."""
    taken: list[int] = []
    seen: set[int] = set()
    for row, values in enumerate(codes.tolist()):
        if len(taken) == count:
            break
        own = [value for value in values if value != _NONE]
        if seen.isdisjoint(own):
            taken.append(row)
            seen.update(own)
    missing = count - len(taken)
    filler = np.setdiff1d(np.arange(len(codes)), taken, assume_unique=True)[:missing]
    return np.sort(np.concatenate([np.array(taken, dtype=np.int64), filler]))


def _place(
    codes: Codes, begun: Codes, room: NDArray[np.int64], random: np.random.Generator
) -> NDArray[np.int64]:
    """(N,) the batch of each row; batch b takes room[b] rows, and the first one goes on from `begun`.

    Rows whose values come often are placed first, each in the next batch without its values: rows of one value lie side
    by side then, and go round the batches. Rows that share nothing fill the rest in their order.
    """
    batch_of = np.full(len(codes), _NONE)
    counts = np.bincount(np.concatenate([codes, begun]).ravel() + 1, minlength=1)
    counts[0] = 0
    count_NC = counts[codes + 1]
    most = count_NC.argmax(1)
    often = count_NC.max(1)
    value = np.take_along_axis(codes, most[:, None], 1)[:, 0]
    repeated = np.flatnonzero(often > 1)
    repeated = repeated[np.lexsort((value[repeated], -often[repeated]))]

    left: list[int] = room.tolist()
    num_batches = len(left)
    # The batches with room, in an order of chance, so that batches side by side do not hold the same values.
    open_batches: list[int] = [batch for batch in random.permutation(num_batches).tolist() if left[batch]]
    held = {code * num_batches for code in begun[begun != _NONE].tolist()}
    held_by = dict.fromkeys((key // num_batches for key in held), 1)
    position = 0
    for row, values in zip(repeated.tolist(), codes[repeated].tolist(), strict=True):
        own = [code for code in values if code != _NONE and counts[code + 1] > 1]
        position %= len(open_batches)
        chosen = position
        if all(held_by.get(code, 0) < num_batches for code in own):
            for skip in range(min(_MOST_SKIPS, len(open_batches))):
                offered = (position + skip) % len(open_batches)
                if all(code * num_batches + open_batches[offered] not in held for code in own):
                    chosen = offered
                    break
        batch = open_batches[chosen]
        for code in own:
            key = code * num_batches + batch
            if key not in held:
                held.add(key)
                held_by[code] = held_by.get(code, 0) + 1
        batch_of[row] = batch
        left[batch] -= 1
        position = chosen + 1
        if not left[batch]:
            open_batches[chosen] = open_batches[-1]
            open_batches.pop()
            position = chosen
    batch_of[batch_of == _NONE] = np.repeat(np.arange(num_batches), left)
    return batch_of


def count_sharing(codes: Codes, first_batch: int, batch_size: int) -> int:
    """Rows that share a value with an earlier row of their batch; the first `first_batch` rows are one batch."""
    batch = np.maximum(np.arange(len(codes)) - first_batch, -1) // batch_size
    shares = np.zeros(len(codes), dtype=bool)
    for column in codes.T:
        _, earliest = np.unique((batch + 1) * (column.max(initial=0) + 2) + column, return_index=True)
        later = np.ones(len(codes), dtype=bool)
        later[earliest] = False
        shares |= later & (column != _NONE)
    return int(shares.sum())
