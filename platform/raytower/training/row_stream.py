"""The stream of training batches: each worker reads a share of every window, and workers send each other the rows.

Which row stands where depends on the seed and the pieces alone, so that N workers train on the very batches that one
would. It follows from numbers of rows which rows of a window are whose. So a worker reads the pieces that are its turn,
sends each worker those rows of them that this one trains on, and gets its own in return: together the workers read
every row once. A thread does so for the next window while the last one is trained on.

    pieces of a window   [ 0 | 1 | 2 | 3 ]      read by workers 0 1 0 1
    rows in their order  [ batch | batch | … ]   each batch cut into contiguous shares of the workers

A worker's memory holds the pieces that it reads, and its share of two windows, whatever the number of rows, files and
workers. Of several sets of rows each is read so, by a thread and through an exchange of its own: the threads of one
worker may come to their windows in another order than those of the next.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from raytower.data.pieces import Piece, read_piece
from raytower.models.ahead import Ahead
from raytower.progress import log
from raytower.training.batches import Rows, num_rows
from raytower.training.distinct_batches import DistinctOrders, value_hashes
from raytower.training.exchange import Alone, Exchange
from raytower.training.mixing import SET, order_of_sets
from raytower.training.windows import (
    Window,
    draw_documents,
    plan_windows,
    readers_of,
    windows_from,
    workers_of,
)

_ALONE = Alone()


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
    plan: StreamPlan,
    skip_batches: int = 0,
    tell: Callable[[str], None] = log,
    exchange: Exchange = _ALONE,
) -> Generator[Rows, None, None]:
    """This worker's rows of the batches of the run from number `skip_batches` on; the same however often it is called.

    Each worker has equally many rows of a batch, side by side. All workers take equally many batches, and then close
    the stream, which ends its thread. The number of the batch alone decides when a window is asked for, never what a
    worker's own share needs: workers that stop after the same batch have taken part in the same exchanges, and none
    waits for another.

    `tell` hears of rows that no batch without their values was left for, once. The rows of a MixedPlan have the name of
    their set in the column SET; which set a batch is of depends on the seed and the batch's number alone.

    Raises:
        InputError: a file has changed since the survey.
    """
    if isinstance(plan, MixedPlan):
        # Here and not with a set's first batch: all workers make them together, in one order.
        exchanges = [exchange.branch() for _ in plan.sets]
        return _stream_sets(plan, skip_batches, tell, exchanges)
    return _stream_set(plan, skip_batches, tell, exchange)


def _stream_sets(
    plan: MixedPlan, skip_batches: int, tell: Callable[[str], None], exchanges: Sequence[Exchange]
) -> Generator[Rows, None, None]:
    """The batches of each set in their order. `exchanges` are those of the sets."""
    names = list(plan.sets)
    order_N = order_of_sets([own.num_batches for own in plan.sets.values()], plan.seed)
    done = np.bincount(order_N[:skip_batches], minlength=len(names)).tolist()
    with ExitStack() as stack:
        # A set begins to be read with its first batch.
        streams = [
            stack.enter_context(
                closing(_stream_set(plan.sets[name], skipped, _telling(name, tell), exchange))
            )
            for name, skipped, exchange in zip(names, done, exchanges, strict=True)
        ]
        for number in order_N[skip_batches:].tolist():
            rows = next(streams[number])
            yield {**rows, SET: [names[number]] * num_rows(rows)}


def _telling(name: str, tell: Callable[[str], None]) -> Callable[[str], None]:
    return lambda message: tell(f"train.sets.{name}: {message}")


def _stream_set(
    plan: StreamPlan, skip_batches: int, tell: Callable[[str], None], exchange: Exchange
) -> Generator[Rows, None, None]:
    """`stream_batches` of rows that are one set."""
    first_row, end_row = skip_batches * plan.batch_size, plan.num_batches * plan.batch_size
    piece_rows = [piece.num_rows for piece in plan.pieces]
    windows = plan_windows(piece_rows, seed=plan.seed, window_rows=plan.window_rows)
    # What the order of distinct batches depends on reaches back to the windows that the first batch comes from.
    windows = windows_from(windows, first_row, plan.batch_size if plan.distinct_columns else 1)
    begin = next(windows)
    windows = itertools.takewhile(
        lambda window: window.first_row < end_row, itertools.chain([begin], windows)
    )
    read, taken = itertools.tee(windows)
    reader = _WindowReader(plan, exchange, begin, first_row, tell)
    own_rows = plan.batch_size // exchange.num_workers
    with Ahead(reader.read, read) as tables:
        arriving = zip(taken, tables, strict=True)
        rows, start, arrived_row = reader.no_rows, 0, begin.first_row
        for number in range(skip_batches, plan.num_batches):
            while arrived_row < (number + 1) * plan.batch_size:
                window, table = next(arriving)
                rows, start, arrived_row = pa.concat_tables([rows.slice(start), table]), 0, window.end_row
            yield rows.slice(start, own_rows).to_pydict()
            start += own_rows


class _WindowReader:
    """Reads one window after the other, together with the other workers."""

    def __init__(
        self,
        plan: StreamPlan,
        exchange: Exchange,
        begin: Window,
        first_row: int,
        tell: Callable[[str], None],
    ) -> None:
        """`begin` is the first window that is read, and `first_row` the row of the run before which none is wanted."""
        self.no_rows = plan.pieces[0].schema.empty_table()
        self._plan = plan
        self._exchange = exchange
        self._first_row = first_row
        self._orders: DistinctOrders | None = None
        if plan.distinct_columns:
            self._orders = DistinctOrders(
                plan.batch_size,
                plan.distinct_columns,
                seed=plan.seed,
                first_row=begin.first_row,
                tell=tell,
            )

    def read(self, window: Window) -> pa.Table:
        """This worker's rows of a window, in their order."""
        plan, exchange = self._plan, self._exchange
        pieces = [plan.pieces[index] for index in window.pieces]
        readers_P = readers_of(window, exchange.num_workers)
        tables = [
            read_piece(piece)
            for piece, reader in zip(pieces, readers_P.tolist(), strict=True)
            if reader == exchange.rank
        ]
        bits = np.random.PCG64([plan.seed, window.epoch, window.number])
        order_N = np.random.Generator(bits).permutation(window.num_rows)
        if plan.num_documents is not None and "documents" in self.no_rows.column_names:
            tables = self._draw(tables, readers_P, bits, plan.num_documents)
        table = pa.concat_tables([self.no_rows, *tables])
        reader_N = np.repeat(readers_P, [piece.num_rows for piece in pieces])
        if self._orders is not None:
            hashes_NC = in_reading_order(
                exchange.to_all(value_hashes(table, plan.distinct_columns)), reader_N
            )
            order_N = order_N[self._orders.next_order(hashes_NC[order_N])]
        skipped = max(self._first_row - window.first_row, 0)
        worker_N = workers_of(window, plan.batch_size, exchange.num_workers)
        return _trade(table, order_N[skipped:], worker_N[skipped:], reader_N, exchange)

    def _draw(
        self, tables: Sequence[pa.Table], readers_P: NDArray[np.int64], bits: np.random.PCG64, count: int
    ) -> list[pa.Table]:
        """`draw_documents` of the whole window, of which `tables` are what this worker has read.

        A lot is drawn for each document of a window, one after the other: a worker goes on to those of its pieces.
        """
        lengths = [pc.sum(pc.list_value_length(table["documents"])).as_py() for table in tables]
        parts = self._exchange.to_all(np.array(lengths, dtype=np.int64))
        lengths_P = in_reading_order(parts, readers_P)
        before_P = np.cumsum(lengths_P) - lengths_P
        begun = bits.state
        drawn = []
        for table, before in zip(tables, before_P[readers_P == self._exchange.rank].tolist(), strict=True):
            bits.state = begun
            bits.advance(before)
            drawn.append(draw_documents(table, count, np.random.Generator(bits)))
        return drawn


def in_reading_order(parts: Sequence[NDArray[np.generic]], reader_N: NDArray[np.int64]) -> NDArray:
    """(N, …) what each reader has of its own items, as the items stand: readers 0 1 0 with a b and x give a x b."""
    joined = np.concatenate(parts)
    placed = np.empty_like(joined)
    placed[np.argsort(reader_N, kind="stable")] = joined
    return placed


def _trade(
    table: pa.Table,
    order_n: NDArray[np.int64],
    worker_n: NDArray[np.int64],
    reader_N: NDArray[np.int64],
    exchange: Exchange,
) -> pa.Table:
    """The rows that this worker trains on, in their order, for those of its own that others do.

    Args:
        table: the rows of the window that this worker has read, as they stand in it.
        order_n: (n,) rows of the window in the order of training.
        worker_n: (n,) the worker that trains on each of these.
        reader_N: (N,) the worker that has read each row, as they stand in the window.
        exchange: with the others.
    """
    if exchange.num_workers == 1:
        return table.take(pa.array(order_n))
    own_rows = np.flatnonzero(reader_N == exchange.rank)
    by_worker = np.argsort(worker_n, kind="stable")
    by_worker = by_worker[reader_N[order_n[by_worker]] == exchange.rank]
    sent = table.take(pa.array(np.searchsorted(own_rows, order_n[by_worker])))
    counts = np.bincount(worker_n[by_worker], minlength=exchange.num_workers)
    ends = np.cumsum(counts)
    arrived = pa.concat_tables(
        exchange.to_each(
            [
                sent.slice(end - count, count)
                for end, count in zip(ends.tolist(), counts.tolist(), strict=True)
            ]
        )
    )
    source_n = reader_N[order_n[worker_n == exchange.rank]]
    places = in_reading_order([np.arange(arrived.num_rows)], source_n)
    return arrived.take(pa.array(places))
