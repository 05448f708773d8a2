"""Documents that searches find, and which of them are kept."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raytower.index.reader import Index
from raytower.index.table import Document
from raytower.serving.errors import OutOfTimeError
from raytower.serving.recall import KeptDocuments, LocalRecall
from raytower.serving.work import Deadline
from tests.support.served_index import TEXTS, write_version

LATER = 60_000


@pytest.fixture(scope="module")
def recall(tmp_path_factory: pytest.TempPathFactory, dummy_encoder_dir: Path) -> LocalRecall:
    folder = tmp_path_factory.mktemp("recall") / "index"
    write_version(folder, "000001", dummy_encoder_dir)
    return LocalRecall(Index.open(str(folder)), ThreadPoolExecutor(2))


def test_documents_come_in_order_and_repeated_ones_each_time(recall: LocalRecall) -> None:
    async def ask() -> list[list[Document]]:
        rows = np.array([7, 3, 7, 0])
        deadline = Deadline.after(LATER)
        return [
            await recall.documents(rows, ["text", "number"], deadline),
            await recall.documents(rows[::-1], ["text", "number"], deadline),
            await recall.documents(rows, ["number"], deadline),
        ]

    first, again, untold = asyncio.run(ask())
    assert [(item.id, item.text, item.metadata) for item in first] == [
        (f"000001/{row}", TEXTS[row], {"number": row}) for row in (7, 3, 7, 0)
    ]
    assert again == first[::-1]
    assert [item.text for item in untold] == [""] * 4


def test_a_document_that_was_read_is_not_read_again(
    recall: LocalRecall, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def ask() -> None:
        await recall.documents(np.array([20, 21]), ["text"], Deadline.after(LATER))

    asyncio.run(ask())
    taken: list[int] = []
    real = recall.index.table.take

    def take(rows: np.ndarray, columns: list[str]) -> object:
        taken.extend(rows.tolist())
        return real(rows, columns)

    monkeypatch.setattr(recall.index.table, "take", take)

    async def ask_again() -> list[Document]:
        return await recall.documents(np.array([22, 20, 21]), ["text"], Deadline.after(LATER))

    assert [item.text for item in asyncio.run(ask_again())] == [TEXTS[row] for row in (22, 20, 21)]
    assert taken == [22]


def test_what_is_kept_stays_within_its_bytes_and_the_oldest_go() -> None:
    kept = KeptDocuments(most_bytes=100)
    for row in range(4):
        kept.put(row, ("text",), Document(str(row), "", {}), 30)
        kept.get(0, ("text",))
    assert [kept.get(row, ("text",)) is not None for row in range(4)] == [True, False, True, True]
    kept.put(9, ("text",), Document("9", "", {}), 101)
    assert kept.get(9, ("text",)) is None


def test_a_document_is_found_by_its_id_or_not(recall: LocalRecall) -> None:
    async def ask(id: str) -> Document | None:
        return await recall.find(id, Deadline.after(LATER))

    found = asyncio.run(ask("000001/4"))
    assert found is not None
    assert (found.text, found.metadata) == (TEXTS[4], {"number": 4})
    assert asyncio.run(ask("it's none")) is None


def test_a_search_that_becomes_late_ends_between_queries_and_between_shards(
    recall: LocalRecall, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread of a request that nobody waits for went on with its other queries."""
    asked: list[str] = []
    real = recall.index.table.best_matches

    def slow(*arguments: Any) -> Any:
        asked.append("query")
        time.sleep(0.05)
        return real(*arguments)

    monkeypatch.setattr(type(recall.index.table), "best_matches", lambda self, *arguments: slow(*arguments))

    async def by_words() -> None:
        await recall.search_lexical(["sun 3"] * 40, 3, None, Deadline.after(120))

    with pytest.raises(OutOfTimeError):
        asyncio.run(by_words())
    time.sleep(0.3)  # for the thread to end
    assert 1 <= len(asked) <= 5
    shard = type(recall.index.shards[0])
    searched: list[int] = []
    answer = shard.search

    def slow_shard(self: Any, *arguments: Any) -> Any:
        searched.append(1)
        time.sleep(0.1)
        return answer(self, *arguments)

    monkeypatch.setattr(shard, "search", slow_shard)

    async def by_vectors() -> None:
        await recall.search(np.ones((1, 32), np.float32), 3, None, Deadline.after(60))

    assert len(recall.index.shards) == 2
    with pytest.raises(OutOfTimeError):
        asyncio.run(by_vectors())
    time.sleep(0.3)
    assert len(searched) == 1


def test_a_search_that_is_late_is_not_begun(recall: LocalRecall) -> None:
    async def ask() -> None:
        await recall.search(np.zeros((1, 32), np.float32), 1, None, Deadline(0.0, 1))

    with pytest.raises(OutOfTimeError):
        asyncio.run(ask())
