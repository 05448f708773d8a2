"""Layout sharded and layout split give the answers of layout together: every kind, placement, depth and filter."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raytower.errors import FormatError
from raytower.index.hits import Hits
from raytower.index.reader import Index
from raytower.index.versions import open_manifest
from raytower.serving.errors import NotReadyError, OutOfTimeError
from raytower.serving.generation import Generation, ModelEntry
from raytower.serving.placements import GroupCalls, PlacedParts
from raytower.serving.shards import RemoteRecall, ShardGroup, planner_of
from raytower.serving.work import Deadline
from tests.support.index_cases import build, clustered_vectors, embeddings_of

LATER = 60_000
NUM_SHARDS = 5
VECTORS = clustered_vectors(600)
QUERIES = clustered_vectors(7, seed=9)
KINDS: dict[str, dict[str, Any]] = {
    "flat": {},
    "hnsw": {"kind": "hnsw"},
    "ivf_flat by cluster": {"kind": "ivf_flat", "placement": "cluster"},
    "hnsw by cluster": {"kind": "hnsw", "placement": "cluster"},
}


def generation_for(index: Path) -> Generation:
    manifest = open_manifest(str(index))
    return Generation(
        collection="default",
        index=str(index),
        index_version=manifest.version,
        manifest_sha256=manifest.sha256(),
        encoder=ModelEntry(uri="", fingerprint=manifest.fingerprint),
    )


@pytest.fixture(scope="module", params=KINDS)
def index(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Several shards, and rows that none holds."""
    folder = tmp_path_factory.mktemp("sharded")
    embeddings = embeddings_of(folder / "in", VECTORS)
    build(folder / "index", embeddings, shards=NUM_SHARDS, **KINDS[request.param])
    return folder / "index"


async def remote(index: Path, num_groups: int, wrap: Callable[[int, Any], Any] | None = None) -> RemoteRecall:
    generation = generation_for(index)
    groups = [ShardGroup(number, num_groups) for number in range(num_groups)]
    for group in groups:
        await group.prepare(generation)
    counts = {number: rows for group in groups for number, rows in group.counts(generation.id).items()}
    opened = Index.open(str(index))
    return RemoteRecall(
        generation.id,
        Index(opened.manifest, opened.table, []),
        planner_of(opened.manifest, opened.planner._placement, counts),
        [wrap(number, group.search) if wrap else group.search for number, group in enumerate(groups)],
        LATER,
        ThreadPoolExecutor(1),
    )


@pytest.mark.parametrize("num_groups", [1, 2, 5])
def test_groups_find_what_one_process_finds(index: Path, num_groups: int) -> None:
    async def work() -> None:
        sharded = await remote(index, num_groups)
        alone = Index.open(str(index))
        for k in (1, 10, 100, 700):
            for filter in (None, {"year": {"$gte": 2300}}, {"year": 2007}, {"year": -1}):
                expected = alone.search(QUERIES, k, filter=filter)
                found = await sharded.search(QUERIES, k, filter, Deadline.after(LATER))
                assert found.rows.tolist() == expected.rows.tolist(), (k, filter)
                np.testing.assert_array_equal(found.scores, expected.scores)
                assert found.missing == ()

    asyncio.run(work())


def test_a_dead_group_is_asked_again_and_then_left_out_by_name(index: Path) -> None:
    failures = {"left": 1}

    def wrap(number: int, search: Any) -> Any:
        async def call(*arguments: Any) -> Hits:
            if number == 1 and failures["left"]:
                failures["left"] -= 1
                raise RuntimeError("the actor died")
            found: Hits = await search(*arguments)
            return found

        return call

    async def work() -> None:
        sharded = await remote(index, 2, wrap)
        found = await sharded.search(QUERIES, 10, {"year": {"$gte": 0}}, Deadline.after(LATER))
        assert found.missing == ()
        failures["left"] = 2
        found = await sharded.search(QUERIES, 10, {"year": {"$gte": 0}}, Deadline.after(LATER))
        assert found.missing == (1, 3), "the shards of group 1"
        alone = Index.open(str(index), part=(0, 2)).search(QUERIES, 10, filter={"year": {"$gte": 0}})
        assert found.rows.tolist() == alone.rows.tolist()

    asyncio.run(work())


def test_a_late_group_is_not_waited_for(index: Path) -> None:
    def wrap(number: int, search: Any) -> Any:
        async def call(*arguments: Any) -> Hits:
            if number == 1:
                await asyncio.sleep(60)
            found: Hits = await search(*arguments)
            return found

        return call

    async def work() -> None:
        sharded = await remote(index, 2, wrap)
        found = await sharded.search(QUERIES[:1], 10, {"year": {"$gte": 0}}, Deadline.after(4000))
        assert found.missing == (1, 3)

    asyncio.run(work())


def test_no_group_at_all_is_an_error_and_not_an_empty_answer(index: Path) -> None:
    def wrap(number: int, search: Any) -> Any:
        async def call(*arguments: Any) -> Hits:
            raise RuntimeError("the actor died")

        return call

    async def work() -> None:
        sharded = await remote(index, 2, wrap)
        with pytest.raises(NotReadyError, match="no shard"):
            await sharded.search(QUERIES, 10, None, Deadline.after(LATER))
        with pytest.raises(OutOfTimeError):
            await sharded.search(QUERIES, 10, None, Deadline.after(0))

    asyncio.run(work())


def test_a_group_holds_what_it_has_prepared_and_shares_an_equal_version(index: Path) -> None:
    async def work() -> None:
        first = generation_for(index)
        second = first.model_copy(update={"query_prefix": "other"})
        group = ShardGroup(0, 2)
        with pytest.raises(NotReadyError):
            group.counts(first.id)
        await group.prepare(first)
        await group.prepare(second)
        assert group.held() == {first.id, second.id}
        assert group._prepared[first.id] is group._prepared[second.id]
        group.drop(first.id)
        assert group.held() == {second.id}
        assert sum(group.counts(second.id).values()) > 0
        with pytest.raises(FormatError, match="built anew"):
            await group.prepare(first.model_copy(update={"manifest_sha256": "0"}))

    asyncio.run(work())


def test_the_groups_counts_are_waited_for(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raytower.serving.placements._POLL_S", 0.001)
    generation = generation_for(index)
    group = ShardGroup(0, 1)
    asyncio.run(group.prepare(generation))
    asked: list[str] = []

    def counts(id: str) -> Mapping[int, int]:
        asked.append(id)
        if len(asked) in (1, 3):
            raise NotReadyError("a copy has not prepared it")
        return group.counts(id)

    parts = PlacedParts(
        None,  # type: ignore[arg-type]  # no model is opened here
        groups=[GroupCalls(counts=counts, search=group.search)],
        copies=2,
    )
    recall = parts._recall(generation, open_manifest(str(index)))
    assert len(asked) == 3 + 6, "each of two copies is met when six answers in a row have come"
    found = asyncio.run(recall.search(QUERIES, 5, None, Deadline.after(LATER)))
    assert found.rows.tolist() == Index.open(str(index)).search(QUERIES, 5).rows.tolist()


def test_a_shard_that_no_group_holds_is_an_error(index: Path) -> None:
    with pytest.raises(FormatError, match=r"no group holds the shards \[1\]"):
        planner_of(open_manifest(str(index)), None, {0: 1, 2: 1, 3: 1, 4: 1})
