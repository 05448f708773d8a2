"""The share of training texts that `max_length` cuts, counted in a sample before training. No Ray."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from raytower.data.pieces import Survey
from raytower.models.token_block import TokenBlock
from raytower.progress import log
from raytower.training.batches import Rows
from raytower.training.inputs import sample_rows
from raytower.training.windows import draw_documents

SAMPLE_ROWS = 1000
Tokenise = Callable[[Sequence[Sequence[str]], int], TokenBlock]
"""Token ids of the rows of one or two columns, cut to a length."""


def spaced_rows(surveyed: Survey, num_rows: int = SAMPLE_ROWS, num_documents: int | None = None) -> Rows:
    """`sample_rows`, of whose candidate lists longer than `num_documents` so many are drawn, as training does."""
    rows = sample_rows(surveyed, num_rows)
    if num_documents is not None:
        rows = draw_documents(rows, num_documents, np.random.default_rng(0))
    return rows.to_pydict()


def cut_shares(
    tokenise: Tokenise, columns: Mapping[str, Sequence[Sequence[str]]], max_length: int
) -> dict[str, float]:
    """Share of the rows of each column with more than `max_length` tokens, special tokens counted.

    Args:
        tokenise: as the model that is trained does it.
        columns: by name, the texts as they are tokenised, or two lists of equal length whose pairs are one row.
        max_length: tokens that training keeps of a row.

    Raises:
        InputError: `max_length` leaves no room beside the special tokens.
    """
    shares = {}
    for name, texts in columns.items():
        tokenise([[""] for _ in texts], max_length)  # says if there is no room at all
        # One token more than is kept tells what is cut, at a cost that does not grow with the texts.
        lengths_N = tokenise(texts, max_length + 1).lengths
        shares[name] = float((lengths_N > max_length).mean())
    return shares


def say_cut_shares(shares: Mapping[str, float], max_length: int, num_rows: int) -> None:
    """Log the shares, in percent of the texts of a sample of `num_rows` rows."""
    counted = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
    remedy = "; raise max_length where the rest of them matters" if any(shares.values()) else ""
    log(f"max_length {max_length} cuts, in a sample of {num_rows:,} rows: {counted}{remedy}")
