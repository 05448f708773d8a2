"""Rows on their way to being records, and those that break a rule: what the readers of every format hand on."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa

Column: TypeAlias = pa.Array | pa.ChunkedArray | list[Any]
"""Values of a column that passes through; of JSON as Python has them, for one row may differ in type from the next."""


@dataclass(frozen=True)
class Rejection:
    """A row that breaks a rule, by its line number (row number in Parquet), counted from 1."""

    line: int
    reason: str


@dataclass
class Parsed:
    """The good rows of a slice, in file order, and the rows that break a rule."""

    columns: dict[str, pa.Array | pa.ChunkedArray]
    extra: dict[str, Column]
    """Columns passed through, by the names that the file gives them."""
    lines: np.ndarray
    """The line of each row; a line of candidates with several positives gives as many rows."""
    rejections: list[Rejection]
    derived_ids: bool = False
    """Some rows bring no id; theirs are the places that they have in their files."""

    @property
    def num_rows(self) -> int:
        return len(self.lines)

    @classmethod
    def joined(cls, parts: Sequence[Parsed]) -> Parsed:
        """Arrow parts that follow one another, as chunks: put into one array, their texts might be too long for it."""
        if len(parts) == 1:
            return parts[0]
        columns = {
            name: pa.chunked_array([part.columns[name] for part in parts]) for name in parts[0].columns
        }
        extra: dict[str, Column] = {}
        for name in dict.fromkeys(name for part in parts for name in part.extra):
            found = [part.extra.get(name) for part in parts]
            kind = next(column.type for column in found if isinstance(column, pa.Array))
            extra[name] = pa.chunked_array(
                [
                    pa.nulls(part.num_rows, kind) if column is None else column
                    for part, column in zip(parts, found, strict=True)
                ]
            )
        lines = np.concatenate([part.lines for part in parts])
        rejections = [rejection for part in parts for rejection in part.rejections]
        return cls(columns, extra, lines, rejections, any(part.derived_ids for part in parts))


class BadRowError(ValueError):
    """A rule that one row breaks; its text is the reason."""


@dataclass
class RowBatch:
    """Rows that are being checked: one Arrow column for each field, thinned out as rules are broken."""

    lines: np.ndarray
    columns: dict[str, pa.Array]
    extra: dict[str, Column] = field(default_factory=dict)
    rejections: list[Rejection] = field(default_factory=list)
    derived_ids: bool = False

    def reject(self, bad: np.ndarray, reason: Callable[[int], str]) -> None:
        """Take out the rows where `bad` (bool [rows]) holds; `reason` is asked with each row's position."""
        if not bad.any():
            return
        self.rejections += [Rejection(int(self.lines[i]), reason(int(i))) for i in np.flatnonzero(bad)]
        keep = ~bad
        mask = pa.array(keep)
        self.lines = self.lines[keep]
        self.columns = {name: column.filter(mask) for name, column in self.columns.items()}
        self.extra = {
            name: list(itertools.compress(column, keep)) if isinstance(column, list) else column.filter(mask)
            for name, column in self.extra.items()
        }
