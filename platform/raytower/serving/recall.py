"""Recall from an index whose shards all lie in this process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raytower.index.reader import Index
from raytower.index.table import ID, TEXT, Document
from raytower.serving.parts import Recalled, Vectors
from raytower.serving.work import Deadline

_Result = TypeVar("_Result")


class LocalRecall:
    """One opened index version; searches run in a few threads."""

    def __init__(self, index: Index, threads: ThreadPoolExecutor) -> None:
        self.index = index
        self._threads = threads
        self.columns = {field.name: str(field.type) for field in index.table.schema}

    @property
    def rows(self) -> int:
        return self.index.num_rows

    def check_filter(self, filter: Mapping[str, Any]) -> None:
        """Raises InputError where it does not fit the columns."""
        self.index.check_filter(filter)

    async def search(
        self, vectors: Vectors, k: int, filter: Mapping[str, Any] | None, deadline: Deadline
    ) -> Recalled:
        """The best min(k, documents that match) rows for each vector of (Q, D)."""
        found = await self._run(lambda: self.index.search(vectors, k, filter=filter), deadline)
        return Recalled(found.scores, found.rows)

    async def documents(
        self, rows: NDArray[np.int64], columns: Sequence[str], deadline: Deadline
    ) -> list[Document]:
        """The documents of `rows` (n,), in order, with those columns; a text that is not asked for is empty."""
        # A document may be a hit of several queries.
        distinct, places = np.unique(rows, return_inverse=True)
        table = await self._run(lambda: self.index.table.take(distinct, [ID, *columns]), deadline)
        documents = documents_of(table)
        return [documents[place] for place in places.tolist()]

    async def find(self, id: str, deadline: Deadline) -> Document | None:
        """The document with an id."""

        def look() -> Document | None:
            names = self.index.table.schema.names
            for batch in self.index.table.find(ID, pa.array([id]), names):
                return documents_of(batch)[0]
            return None

        return await self._run(look, deadline)

    async def _run(self, work: Callable[[], _Result], deadline: Deadline) -> _Result:
        """`work` in a thread, unless the time is over before its turn comes. Raises OutOfTimeError."""

        def unless_late() -> _Result:
            deadline.check()
            return work()

        waiting = asyncio.get_running_loop().run_in_executor(self._threads, unless_late)
        try:
            return await asyncio.wait_for(waiting, deadline.remaining_s())
        except TimeoutError:
            raise deadline.exceeded() from None


def documents_of(table: pa.Table | pa.RecordBatch) -> list[Document]:
    """The rows of a table with a column `id`, perhaps `text`, and others as metadata."""
    values = table.to_pylist()
    return [Document(value.pop(ID), value.pop(TEXT, None) or "", value) for value in values]
