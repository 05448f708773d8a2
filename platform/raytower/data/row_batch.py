"""The rows that the readers of every format pass on: those that become records, and those that break a rule."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raytower.data.slices import Extent, Slice

Column: TypeAlias = pa.Array | list[Any]
"""Values of a passed-through column. JSON values stay Python objects, because their types may differ by row."""


@dataclass(frozen=True)
class Rejection:
    """A row that breaks a rule, by its line number (row number in Parquet), counted from 1."""

    line: int
    reason: str


class BadRowError(ValueError):
    """A rule that one row breaks; its text is the reason."""


@dataclass
class RowBatch:
    """Rows in file order; each check takes out those that break its rule. `columns` holds one Arrow column per field,
    and in the end one per column of the record."""

    lines: np.ndarray
    """int64 [rows]: the line of each row. A candidates line with 3 positives becomes 3 rows."""
    columns: dict[str, pa.Array]
    extra: dict[str, Column] = field(default_factory=dict)
    """Columns passed through, by the names that the file gives them."""
    rejections: list[Rejection] = field(default_factory=list)
    derived_ids: bool = False
    """Some rows bring no id and get one from their file and line."""
    unread: frozenset[str] = frozenset()
    """Columns or keys of the file that no field of the record comes from."""
    num_repeated: int = 0
    """Documents of candidates that were left out because their row has them already."""

    def reject(self, bad: np.ndarray, reason: Callable[[int], str]) -> None:
        """Take out the rows where `bad`, bool [rows], holds; `reason(position)` gives each one's reason."""
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


@dataclass(frozen=True)
class Chunk:
    """One extent with its rows parsed, in batches, because the texts of all may be too long for one Arrow array."""

    extent: Extent
    batches: Sequence[RowBatch]
    content: Slice | pa.Table

    @property
    def lines(self) -> np.ndarray:
        """int64 [rows]: the lines of the rows of all batches."""
        return np.concatenate([rows.lines for rows in self.batches])

    def values(self, column: str) -> list[Any]:
        return [value for rows in self.batches for value in rows.columns[column].to_pylist()]

    def raw(self, line: int) -> bytes:
        """The row's bytes as they stand in the file; for Parquet the row as JSON."""
        position = line - self.extent.first_line
        if isinstance(self.content, Slice):
            return self.content.rows()[position]
        row = self.content.slice(position, 1)
        values = {name: _plain_value(row.column(name)[0]) for name in row.column_names}
        return json.dumps(values, ensure_ascii=False, default=str).encode("utf-8")


def mask_of(condition: pa.Array) -> np.ndarray:
    """A condition as bool [rows], null as False."""
    return pc.fill_null(condition, False).to_numpy(zero_copy_only=False)


def _plain_value(cell: pa.Scalar) -> Any:
    """The value of `cell`; strings that are no UTF-8 with their odd bytes escaped, dates beyond Python's as numbers."""
    try:
        return cell.as_py()
    except (ValueError, OverflowError):
        if isinstance(cell, pa.StructScalar):
            return {name: _plain_value(member) for name, member in cell.items()}
        if isinstance(cell, pa.DictionaryScalar):
            return _plain_value(cell.value)
        if isinstance(cell, pa.ListScalar | pa.LargeListScalar | pa.FixedSizeListScalar):
            return [_plain_value(element) for element in cell.values]
        if isinstance(cell, pa.TimestampScalar | pa.Date32Scalar | pa.Date64Scalar):
            return cell.value
        return cell.as_buffer().to_pybytes().decode("utf-8", errors="backslashreplace")
