"""Setting dev rows aside from the training rows: which ones they are, and the survey of what remains. No Ray.

All rows of a query (of a classifier: of a text) lie on one side. Which queries are drawn depends on the seed and on
the queries themselves, not on the order of the rows or the files.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raytower.data.normalised import normalised
from raytower.data.pieces import Picked, Piece, Survey, read_piece
from raytower.errors import InputError
from raytower.progress import log

Hashes = NDArray[np.uint64]

_NAMED_LABELS = 5


def choose_keys(hashes_N: Hashes, strata_N: NDArray[np.int64], share: float) -> Hashes:
    """The hashes that are set aside: of each stratum those whose rows come nearest to `share` of its rows.

    Args:
        hashes_N: (N,) of each row's key, drawn by chance, so that the lowest ones are a random sample of the keys.
        strata_N: (N,) the label of each row as a number; all 0 where rows have none.
        share: between 0 and 1.
    """
    chosen = []
    order_N = np.argsort(strata_N, kind="stable")
    bounds = np.flatnonzero(np.diff(strata_N[order_N])) + 1
    for rows in np.split(order_N, bounds):
        keys, counts = np.unique(hashes_N[rows], return_counts=True)
        rows_taken = np.concatenate([[0], np.cumsum(counts)])
        number = int(np.abs(rows_taken - share * rows_taken[-1]).argmin())
        chosen.append(keys[:number])
    return np.concatenate(chosen)


def give_back(chosen_C: Hashes, hashes_N: Hashes, strata_N: NDArray[np.int64]) -> Hashes:
    """The chosen hashes without one of each stratum that would be left with no row: the last of its draw.

    A stratum may lose its rows to another one too, where both have a text.

    Args:
        chosen_C: (C,) sorted.
        hashes_N, strata_N: as in `choose_keys`.
    """
    num_left_S = np.bincount(strata_N, weights=~_are_among(hashes_N, chosen_C))
    last_S = np.zeros(len(num_left_S), dtype=np.uint64)
    np.maximum.at(last_S, strata_N, hashes_N)
    return np.setdiff1d(chosen_C, last_S[num_left_S == 0])


def set_dev_aside(surveyed: Survey, share: float, seed: int) -> Survey:
    """The survey of the rows that are trained; its `set_aside` are pieces with the others.

    Labels are strata where rows are single texts: every label keeps its share, and a row at least that is trained.
    Memory holds 16 bytes a row.

    Raises:
        InputError: one of the sides would be empty.
    """
    names = surveyed.schema.names
    key = "query" if "query" in names else "text"
    labels: dict[str, int] = {}
    hashes, strata = [], []
    for table in map(read_piece, surveyed.pieces):
        hashes.append(_hash(table[key], seed))
        if key == "text" and "label" in names:
            numbers = [labels.setdefault(label, len(labels)) for label in table["label"].to_pylist()]
            strata.append(np.array(numbers, dtype=np.int64))
        else:
            strata.append(np.zeros(table.num_rows, dtype=np.int64))
    all_hashes = np.concatenate(hashes)
    all_strata = np.concatenate(strata)
    chosen = np.unique(choose_keys(all_hashes, all_strata, share))
    if labels:
        chosen = give_back(chosen, all_hashes, all_strata)
    num_dev = int(_are_among(all_hashes, chosen).sum())
    if not 0 < num_dev < surveyed.num_rows:
        side = "dev" if num_dev == 0 else "training"
        raise InputError(
            f"dev.share is {share:g}, and of {surveyed.num_rows} rows with {len(np.unique(all_hashes))} different "
            f"{'queries' if key == 'query' else 'texts'} it leaves no {side} rows; choose another share, or give dev "
            "rows by dev.path"
        )
    trained, set_aside, first_row = [], [], 0
    for piece, own in zip(surveyed.pieces, hashes, strict=True):
        is_dev = _are_among(own, chosen)
        if is_dev.any():
            set_aside.append(_pick(piece, is_dev))
        if not is_dev.all():
            trained.append(dataclasses.replace(_pick(piece, ~is_dev), first_row=first_row))
            first_row += trained[-1].num_rows
    log(f"dev.share {share:g}: {num_dev:,} rows are set aside to measure with, {first_row:,} are trained")
    if labels:
        _say_labels_without_dev_rows(list(labels), all_strata[_are_among(all_hashes, chosen)])
    return dataclasses.replace(
        surveyed,
        pieces=tuple(trained),
        num_rows=first_row,
        set_aside=tuple(set_aside),
        content=surveyed.content and f"{surveyed.content} without {share!r} by {seed}",
    )


def _say_labels_without_dev_rows(labels: Sequence[str], dev_strata: NDArray[np.int64]) -> None:
    """Log the labels, in the order of their numbers, that `dev_strata`, the numbers of the dev rows, hold none of."""
    missing = np.setdiff1d(np.arange(len(labels)), dev_strata)
    if len(missing):
        names = ", ".join(repr(labels[number]) for number in missing[:_NAMED_LABELS])
        more = " and others" if len(missing) > _NAMED_LABELS else ""
        log(f"{len(missing):,} of {len(labels):,} labels have no dev row: {names}{more}")


def _are_among(hashes_N: Hashes, sorted_C: Hashes) -> NDArray[np.bool_]:
    """(N,) which hashes are among the sorted ones; `np.isin` would sort these again for every piece."""
    if not len(sorted_C):
        return np.zeros(len(hashes_N), dtype=bool)
    places_N = np.searchsorted(sorted_C, hashes_N).clip(max=len(sorted_C) - 1)
    return sorted_C[places_N] == hashes_N


def _pick(piece: Piece, is_read: NDArray[np.bool_]) -> Piece:
    """The piece with these of its rows (N,) alone."""
    return dataclasses.replace(piece, picked=Picked.of(is_read), num_rows=int(is_read.sum()))


def _hash(column: pa.ChunkedArray, seed: int) -> Hashes:
    """(N,) a pseudo-random number for each text; texts that differ in case or spaces alone have the same."""
    key = seed.to_bytes(8, "little")
    digests = (
        hashlib.blake2b(text.encode(), digest_size=8, key=key).digest()
        for text in normalised(column).to_pylist()
    )
    return np.frombuffer(b"".join(digests), dtype="<u8")
