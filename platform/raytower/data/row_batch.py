"""Rows on their way to being records, and those that break a rule: what the readers of every format hand on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

Extra = dict[str, pa.Array] | list[dict[str, Any]]
"""Columns passed through: Arrow columns by name (TSV, Parquet), or one mapping a row (JSONL)."""


@dataclass(frozen=True)
class Rejection:
    """A row that breaks a rule, by its line number (row number in Parquet), counted from 1."""

    line: int
    reason: str


@dataclass
class Parsed:
    """The good rows of a slice, in file order, and the rows that break a rule."""

    columns: dict[str, pa.Array]
    extra: Extra
    lines: np.ndarray
    """The line of each row; a line of candidates with several positives gives as many rows."""
    rejections: list[Rejection]

    @property
    def num_rows(self) -> int:
        return len(self.lines)


class BadRowError(ValueError):
    """A rule that one row breaks; its text is the reason."""


@dataclass
class RowBatch:
    """Rows that are being checked: one Arrow column for each field, thinned out as rules are broken."""

    lines: np.ndarray
    columns: dict[str, pa.Array]
    extra: Extra = field(default_factory=dict)
    rejections: list[Rejection] = field(default_factory=list)

    def reject(self, bad: np.ndarray, reason: Callable[[int], str]) -> None:
        """Take out the rows where `bad` (bool [rows]) holds; `reason` is asked with each row's position."""
        if not bad.any():
            return
        self.rejections += [Rejection(int(self.lines[i]), reason(int(i))) for i in np.flatnonzero(bad)]
        keep = ~bad
        mask = pa.array(keep)
        self.lines = self.lines[keep]
        self.columns = {name: column.filter(mask) for name, column in self.columns.items()}
        if isinstance(self.extra, dict):
            self.extra = {name: column.filter(mask) for name, column in self.extra.items()}
        else:
            self.extra = [row for row, kept in zip(self.extra, keep, strict=True) if kept]
