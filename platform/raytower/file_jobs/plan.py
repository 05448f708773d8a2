"""Planning a job from file to file: rows are cut into shares, and shares go to workers. Numbers in, plan out."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raytower.config import FittedWorkersConfig, WorkersConfig
from raytower.data.pieces import Piece
from raytower.workers import Node, fit_workers

TEXTS_IN_PROCESS = 10_000
"""So many texts pass through models before Ray has started and every worker has loaded them."""
NUMBER = "number"
"""Column of a numbered share: a row's place among the good rows of the input, from 0, whatever the shares are."""
# About a minute of a small model on two cores: what is lost when a job is killed, and a worker's least work.
_TEXTS_PER_SHARE = 16_384
_MIN_ROWS = 16


@dataclass(frozen=True)
class Share:
    """Rows `start` to `start + num_rows` of the tables of `pieces`, put together: one task, one part of the output.

    Without pieces they are rows of what the job's arguments hold, and a worker gets their numbers alone.
    """

    pieces: tuple[Piece, ...]
    start: int
    num_rows: int
    is_numbered: bool = False
    """Whether the table that a worker gets has a column NUMBER besides, the place of each row in the input."""

    @property
    def first_row(self) -> int:
        """Good rows of the input before this share."""
        return (self.pieces[0].first_row if self.pieces else 0) + self.start


def choose_rows_per_share(texts_per_row: int, most: int) -> int:
    """Rows of a share, no more than `most`, of which each has so many texts or pairs that pass through a model.

    It does not depend on the workers, so that a job which is started again with others goes on. A query costs 1 text,
    and 101 where its 100 candidates are reranked: 128 rows, or `most` where nothing is reranked.
    """
    rows = max(_TEXTS_PER_SHARE // max(texts_per_row, 1), 1)
    return min(max(1 << (rows.bit_length() - 1), _MIN_ROWS), most)


def shares_of(pieces: Sequence[Piece], *, are_numbered: bool = False) -> list[Share]:
    """Each piece as a share of its own."""
    return [Share((piece,), 0, piece.num_rows, are_numbered) for piece in pieces]


def shares_of_rows(num_rows: int, rows_per_share: int) -> list[Share]:
    """Shares of rows that the job's arguments hold, by their numbers from 0."""
    return [
        Share((), start, min(rows_per_share, num_rows - start), is_numbered=True)
        for start in range(0, num_rows, rows_per_share)
    ]


def shares_between(pieces: Sequence[Piece], starts: NDArray[np.int64], rows_per_share: int) -> list[Share]:
    """Shares of about `rows_per_share` rows of which each begins where a group of rows does.

    Args:
        pieces: those of an input, in order.
        starts: the first row of each group, rising, counted over all pieces; the first is 0.
        rows_per_share: a share ends with the first group that reaches so many rows.

    Three pieces of 4 rows, groups that begin at rows 0, 3 and 9, and 4 rows a share: rows 0 to 9 and 9 to 12.
    """
    total = sum(piece.num_rows for piece in pieces)
    ends = np.append(starts[1:], total)
    cuts = [0]
    for end in ends.tolist():
        if end - cuts[-1] >= rows_per_share or end == total:
            cuts.append(end)
    firsts = np.cumsum([0, *(piece.num_rows for piece in pieces)])
    shares = []
    for first, last in itertools.pairwise(cuts):
        low = int(np.searchsorted(firsts, first, side="right")) - 1
        high = int(np.searchsorted(firsts, last, side="left"))
        shares.append(Share(tuple(pieces[low:high]), first - int(firsts[low]), last - first))
    return shares


def choose_workers(
    asked: FittedWorkersConfig,
    num_texts: int,
    num_shares: int,
    *,
    joins_cluster: bool,
    find_nodes: Callable[[], Sequence[Node]],
    use_gpus: bool = True,
) -> WorkersConfig | None:
    """The workers of a job whose models see `num_texts` texts or pairs; None is this process alone.

    Where `workers.num` is null it is this process for little work, on a machine that would have one worker, and where
    Ray is not installed. Never more workers than shares.
    """
    if asked.num is None:
        if num_texts <= TEXTS_IN_PROCESS or num_shares == 1:
            return None
        if not joins_cluster and importlib.util.find_spec("ray") is None:
            return None
    fitted = fit_workers(asked, find_nodes, use_gpus=use_gpus)
    if asked.num is None and fitted.num == 1 and not joins_cluster:
        return None
    return fitted.model_copy(update={"num": min(fitted.num, num_shares)})
