"""Recall from an index whose shards all lie in this process."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raytower.index.hits import Hits
from raytower.index.hybrid import HybridFusion, HybridHits, best_of, candidates_of_a_side, unite
from raytower.index.reader import Index
from raytower.index.table import ID, Document, documents_of
from raytower.retrieval.retriever import EncodedQueries
from raytower.serving.parts import Filter, Recalled, Vectors
from raytower.serving.work import Deadline

_OBJECT_BYTES = 500
_Result = TypeVar("_Result")


class KeptDocuments:
    """The documents asked for last, so that those that many searches find are read once. For one event loop."""

    def __init__(self, most_bytes: int = 64 * 2**20) -> None:
        self._most_bytes = most_bytes
        self._bytes = 0
        self._kept: OrderedDict[tuple[int, tuple[str, ...]], tuple[Document, int]] = OrderedDict()

    def get(self, row: int, columns: tuple[str, ...]) -> Document | None:
        """The document of a row with those columns, if it is still kept."""
        entry = self._kept.get((row, columns))
        if entry is None:
            return None
        self._kept.move_to_end((row, columns))
        return entry[0]

    def put(self, row: int, columns: tuple[str, ...], document: Document, size: int) -> None:
        """Keep a document of about so many bytes; those asked for longest ago give way."""
        key = (row, columns)
        if size > self._most_bytes or key in self._kept:
            return
        self._kept[key] = (document, size)
        self._bytes += size
        while self._bytes > self._most_bytes:
            _, (_, gone) = self._kept.popitem(last=False)
            self._bytes -= gone


class LocalRecall:
    """One opened index version; searches run in a few threads."""

    def __init__(self, index: Index, threads: ThreadPoolExecutor) -> None:
        self.index = index
        self._threads = threads
        self._kept = KeptDocuments()
        self.columns = {field.name: str(field.type) for field in index.table.schema}

    @property
    def rows(self) -> int:
        return self.index.num_rows

    def check_filter(self, filter: Filter) -> None:
        """Raises InputError where it does not fit the columns."""
        self.index.check_filter(filter)

    async def search(self, vectors: Vectors, k: int, filter: Filter | None, deadline: Deadline) -> Recalled:
        """The best min(k, documents that match) rows for each vector of (Q, D)."""
        found = await self._run(
            lambda: self.index.search(vectors, k, filter=filter, check=deadline.check), deadline
        )
        return Recalled(found.scores, found.rows)

    async def search_lexical(
        self, queries: Sequence[str], k: int, filter: Filter | None, deadline: Deadline
    ) -> Recalled:
        """The best rows for each text by its words, at most k. The table alone is asked, wherever the shards are."""
        found = await self._run(
            lambda: self.index.search_lexical(queries, k, filter=filter, check=deadline.check), deadline
        )
        wordless = len(queries) - int((found.rows >= 0).any(axis=1).sum())
        return Recalled(found.scores, found.rows, wordless=wordless)

    async def search_hybrid(
        self, queries: EncodedQueries, k: int, filter: Filter | None, fusion: HybridFusion, deadline: Deadline
    ) -> Recalled:
        """The best min(k, documents that match) rows for each query; both sides are searched at once."""
        vectors, depth = queries.vectors, candidates_of_a_side(k)
        assert vectors is not None, "mode hybrid needs vectors"
        dense, lexical = await asyncio.gather(
            self.search(vectors, depth, filter, deadline),
            self.search_lexical(queries.texts, depth, filter, deadline),
        )

        def fused() -> HybridHits:
            sides = Hits(dense.scores, dense.rows), Hits(lexical.scores, lexical.rows)
            return best_of(unite(self.index, queries.texts, vectors, *sides), fusion, k)

        found = await self._run(fused, deadline)
        return Recalled(found.scores, found.rows, dense.missing, lexical.wordless)

    async def documents(
        self, rows: NDArray[np.int64], columns: Sequence[str], deadline: Deadline
    ) -> list[Document]:
        """The documents of `rows` (n,), in order, with those columns; a text that is not asked for is empty."""
        wanted = tuple(columns)
        found = {row: self._kept.get(row, wanted) for row in rows.tolist()}
        missing = np.array([row for row, document in found.items() if document is None], np.int64)
        if len(missing):
            table = await self._run(lambda: self.index.table.take(missing, [ID, *columns]), deadline)
            # What a row weighs in Arrow is about a third of what it does as Python's objects.
            size = 3 * table.nbytes // len(missing) + _OBJECT_BYTES
            for row, document in zip(missing.tolist(), documents_of(table), strict=True):
                found[row] = document
                self._kept.put(row, wanted, document, size)
        return [kept for row in rows.tolist() if (kept := found[row]) is not None]

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
