"""Which rows a table version holds, and where: runs of neighbouring rows at neighbouring addresses.

Rows are numbered as they are added and stored in that order, so a table of N rows written in F pieces with D rows
deleted has at most F + D runs: opening an index keeps those, not a number for each row.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class RowMap:
    """Runs of rows `starts[i]` to `ends[i]` (exclusive), rising, whose first lies at `addresses[i]` in the table."""

    starts: Rows
    ends: Rows
    addresses: Rows

    @classmethod
    def of_batches(cls, batches: Iterable[tuple[Rows, Rows]]) -> RowMap:
        """From the rows (n,) and addresses (n,) of a table, batch by batch, in any order.

        Raises:
            ValueError: a row stands twice.
        """
        parts = [_runs(rows, addresses) for rows, addresses in batches if len(rows)]
        if not parts:
            return cls(*(np.empty(0, np.int64) for _ in range(3)))
        starts, ends, addresses = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        order = np.argsort(starts, kind="stable")
        starts, ends, addresses = starts[order], ends[order], addresses[order]
        if (starts[1:] < ends[:-1]).any():
            twice = int(starts[1:][starts[1:] < ends[:-1]][0])
            raise ValueError(f"row {twice} stands twice in the table")
        follows = (starts[1:] == ends[:-1]) & (addresses[1:] == addresses[:-1] + (ends - starts)[:-1])
        first = np.flatnonzero(np.concatenate([[True], ~follows]))
        last = np.concatenate([first[1:] - 1, [len(starts) - 1]])
        return cls(starts[first], ends[last], addresses[first])

    def addresses_of(self, rows: Rows) -> Rows:
        """The address of each of `rows` (n,), int64 (n,); -1 for a row that the table does not hold."""
        if not len(self.starts):
            return np.full(len(rows), -1, np.int64)
        run = np.maximum(np.searchsorted(self.starts, rows, side="right") - 1, 0)
        offset = rows - self.starts[run]
        inside = (offset >= 0) & (rows < self.ends[run])
        return np.where(inside, self.addresses[run] + offset, -1)

    def rows_at(self, addresses: Rows) -> Rows:
        """The rows (n,) that lie at `addresses` (n,), all of which the table holds."""
        order, firsts = self._by_address
        run = order[np.searchsorted(firsts, addresses, side="right") - 1]
        return self.starts[run] + (addresses - self.addresses[run])

    def live_mask(self, rows: Rows) -> Mask | None:
        """Which of some rising rows (n,) the table holds, bool (n,); None where it holds all of them."""
        # Runs and rows both rise: between the ends of the runs, stretches of dead and of live rows take turns.
        ends = np.stack([np.searchsorted(rows, self.starts), np.searchsorted(rows, self.ends)], axis=1)
        lengths = np.diff(ends.ravel(), prepend=0, append=len(rows))
        return np.repeat(np.arange(len(lengths)) % 2 == 1, lengths) if lengths[::2].any() else None

    def rows(self, first: int = 0, last: int | None = None) -> Rows:
        """The rows (last - first,) at positions first to last (exclusive) of all that the table holds, rising."""
        lengths = self.ends - self.starts
        bounds = np.concatenate([[0], np.cumsum(lengths)])
        last = int(bounds[-1]) if last is None else last
        places = np.arange(first, last)
        run = np.searchsorted(bounds, places, side="right") - 1
        return self.starts[run] + (places - bounds[run])

    def outside(self, shards: Sequence[Rows]) -> Rows:
        """The rows (n,) that the table holds and none of some arrays of rising rows, rising."""
        return self._outside([_runs(np.asarray(rows), np.asarray(rows))[:2] for rows in shards if len(rows)])

    def beyond(self, other: RowMap) -> Rows:
        """The rows (n,) that this version of the table holds and another does not, rising."""
        return self._outside([(other.starts, other.ends)])

    def _outside(self, covered: Sequence[tuple[Rows, Rows]]) -> Rows:
        starts = np.concatenate([self.starts, *(run[0] for run in covered)])
        ends = np.concatenate([self.ends, *(run[1] for run in covered)])
        # A live row counts 1, one that a shard holds counts a billion more.
        weights = np.concatenate(
            [np.ones(len(self.starts), np.int64), *(np.full(len(run[0]), 1 << 30) for run in covered)]
        )
        places = np.concatenate([starts, ends])
        changes = np.concatenate([weights, -weights])
        order = np.argsort(places, kind="stable")
        places, depth = places[order], np.cumsum(changes[order])
        free = np.flatnonzero((depth[:-1] == 1) & (places[1:] > places[:-1]))
        parts = [np.arange(places[at], places[at + 1]) for at in free]
        return np.concatenate([np.empty(0, np.int64), *parts])

    @cached_property
    def _by_address(self) -> tuple[Rows, Rows]:
        order = np.argsort(self.addresses)
        return order, self.addresses[order]


def _runs(rows: Rows, addresses: Rows) -> tuple[Rows, Rows, Rows]:
    breaks = np.flatnonzero((np.diff(rows) != 1) | (np.diff(addresses) != 1))
    first = np.concatenate([[0], breaks + 1])
    last = np.concatenate([breaks, [len(rows) - 1]])
    return rows[first].astype(np.int64), rows[last].astype(np.int64) + 1, addresses[first].astype(np.int64)
