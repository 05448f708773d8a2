"""Batches of training rows: how many steps they make, and their columns. Pure; no Ray."""

from __future__ import annotations

from typing import Any

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


def count_unused(num_rows: int, batch_rows: int, epochs: float) -> int:
    """Rows of a run that fill no step: what is left of its last pass. Of 127 rows and steps of 64, 63.

    Arguments as of `count_steps`.
    """
    return max(int(num_rows * epochs) - count_steps(num_rows, batch_rows, epochs) * batch_rows, 0)


def num_rows(rows: Rows) -> int:
    """How many rows there are."""
    return len(next(iter(rows.values())))
