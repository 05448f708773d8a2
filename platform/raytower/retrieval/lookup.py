"""Finding documents of an index by the value of a column."""

from __future__ import annotations

from collections.abc import Collection

import pyarrow as pa

from raytower.index.reader import Index
from raytower.index.table import DocumentTable


def find_documents(index: Index, column: str, values: Collection[str], wanted: str) -> dict[str, list[str]]:
    """For each of `values` that occurs in `column`: the `wanted` column of the documents that have it.

    Memory holds `values`, the matches and a batch of documents.
    """
    return find_in_table(index.table, column, values, wanted)


def find_in_table(
    table: DocumentTable, column: str, values: Collection[str], wanted: str
) -> dict[str, list[str]]:
    """As `find_documents`, of a version's table alone: no shard of the index has to be opened, or fetched."""
    found: dict[str, list[str]] = {}
    if not values:
        return found
    for batch in table.find(
        column, pa.array(sorted(values), pa.string()), list(dict.fromkeys([column, wanted]))
    ):
        # Values are compared as text, because metadata such as labels may be numbers.
        keys = batch.column(column).cast(pa.string()).to_pylist()
        for value, other in zip(keys, batch.column(wanted).to_pylist(), strict=True):
            found.setdefault(value, []).append(other)
    return found
