"""Recall from an index whose shards lie in other processes, dealt out to groups; and such a process. No Ray.

Group i of n holds the shards i, i + n, i + 2n, …; group 0 also the rows that no shard holds. What is asked of each
shard is decided here as it is in one process (`SearchPlanner`), so the answers are the same.

Shape legend: Q queries, D dimension, K hits a query.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from raytower.errors import FormatError
from raytower.index.asks import Ask, SearchPlanner
from raytower.index.hits import Hits, empty_hits, merge_hits
from raytower.index.manifest import IndexManifest
from raytower.index.placement import Placement
from raytower.index.reader import Index, prepare_queries, resolve_parameters
from raytower.serving.errors import NotReadyError
from raytower.serving.generation import Generation
from raytower.serving.opening import checked_manifest
from raytower.serving.parts import Filter, Recalled, Vectors
from raytower.serving.prepared import Prepared
from raytower.serving.recall import LocalRecall
from raytower.serving.work import Deadline

_LOGGER = logging.getLogger("raytower.serving")
# Share of the remaining time that shards may use, so that an answer without a slow one can still be given.
_RECALL_SHARE = 0.6


@dataclass(frozen=True, kw_only=True)
class GroupSearch:
    """What a group is asked for: the best `k` hits of each query in some shards."""

    prepared: Vectors
    """The queries, float32 (Q, D), as `prepare_queries` makes them."""
    k: int
    asks: Sequence[Ask]
    """Which queries each shard is searched for, and how deep."""
    parameters: Mapping[str, int]
    """Of the search, by the kind of the index."""
    filter: Filter | None


# Asks one group, wherever it is; its parameters are those of `ShardGroup.search`.
ShardCall = Callable[[str, GroupSearch], Awaitable[Hits]]


class RemoteRecall(LocalRecall):
    """One index version whose shards are asked of groups; the documents are read from the table in this process.

    Args:
        generation_id: what the groups know the version by.
        index: the version, without a shard.
        planner: decides what each shard is asked.
        groups: how each group is asked.
        shard_timeout_ms: how long a group is waited for.
    """

    def __init__(
        self,
        generation_id: str,
        index: Index,
        planner: SearchPlanner,
        groups: Sequence[ShardCall],
        shard_timeout_ms: int,
        threads: ThreadPoolExecutor,
    ) -> None:
        super().__init__(index, threads)
        self._generation_id = generation_id
        self._manifest = index.manifest
        self._planner = planner
        self._groups = list(groups)
        self._shard_timeout_s = shard_timeout_ms / 1000

    async def search(self, vectors: Vectors, k: int, filter: Filter | None, deadline: Deadline) -> Recalled:
        """The best min(k, documents that match) rows for each vector of (Q, D), of the groups that answer in time.

        Raises:
            OutOfTimeError: none answered before the deadline. NotReadyError: none answered, for another reason.
        """
        prepared = prepare_queries(vectors, self._manifest)
        parameters = resolve_parameters(self._manifest, k)
        until = asyncio.get_running_loop().time() + min(
            self._shard_timeout_s, deadline.remaining_s() * _RECALL_SHARE
        )
        asks, visits_some = self._planner.first(prepared, k, parameters, is_filtered=filter is not None)
        asked = GroupSearch(prepared=prepared, k=k, asks=asks, parameters=parameters, filter=filter)
        best, missing = await self._ask(asked, until, deadline)
        if not visits_some:
            return Recalled(best.scores, best.rows, missing)
        depth = min(k, self._planner.num_rows)
        best = merge_hits([empty_hits(len(prepared), depth), best], depth)
        short = self._planner.rest(best)
        if len(short):
            everywhere = self._planner.everywhere(k, parameters)
            asked = replace(asked, prepared=prepared[short], asks=everywhere, filter=None)
            found, more = await self._ask(asked, until, deadline)
            found = merge_hits([empty_hits(len(short), depth), found], depth)
            best.scores[short], best.rows[short] = found.scores, found.rows
            missing = tuple(sorted({*missing, *more}))
        return Recalled(best.scores, best.rows, missing)

    async def _ask(
        self, asked: GroupSearch, until: float, deadline: Deadline
    ) -> tuple[Hits, tuple[int, ...]]:
        """What the groups answer in time, merged, and the numbers of the shards whose group did not."""
        by_group: dict[int, list[Ask]] = {}
        for ask in asked.asks:
            by_group.setdefault(self._group_of(ask.shard), []).append(ask)
        results = await asyncio.gather(
            *(
                self._ask_group(group, replace(asked, asks=wanted), until)
                for group, wanted in by_group.items()
            )
        )
        answered = [hits for hits in results if hits is not None]
        if not answered and by_group:
            deadline.check()
            raise NotReadyError("no shard of the index answered; try again", headers={"Retry-After": "1"})
        missing = sorted(
            ask.shard
            for wanted, hits in zip(by_group.values(), results, strict=True)
            if hits is None
            for ask in wanted
        )
        found = merge_hits(answered, asked.k) if answered else empty_hits(len(asked.prepared), 0)
        return found, tuple(missing)

    async def _ask_group(self, group: int, asked: GroupSearch, until: float) -> Hits | None:
        """A group's hits; None where it is late, or has failed twice: of several copies one may just have died."""
        for _ in range(2):
            try:
                async with asyncio.timeout_at(until):
                    return await self._groups[group](self._generation_id, asked)
            except asyncio.CancelledError:
                raise
            except TimeoutError:
                _LOGGER.warning("shard group %d did not answer in time", group)
                return None
            except Exception as error:
                # Whatever the reason, the answer does without this group and says so.
                _LOGGER.warning("shard group %d did not answer: %s: %s", group, type(error).__name__, error)
        return None

    def _group_of(self, shard: int) -> int:
        # The rows that no shard holds come last, and lie in group 0.
        return shard % len(self._groups) if shard < len(self._manifest.shards) else 0


def planner_of(
    manifest: IndexManifest, placement: Placement | None, counts: Mapping[int, int]
) -> SearchPlanner:
    """The planner of a version, from the live rows of each shard. Raises FormatError where a shard's are missing."""
    num_shards = len(manifest.shards)
    wanted = range(max(num_shards, max(counts, default=-1) + 1))
    lost = [number for number in wanted if number not in counts]
    if lost:
        raise FormatError(f"no group holds the shards {lost}; start the server again")
    digests = [entry.digest for entry in manifest.shards] + [""] * (len(wanted) - num_shards)
    return SearchPlanner(manifest, digests, [counts[number] for number in wanted], placement)


class ShardGroup(Prepared[Index]):
    """The shards of one group, in a process of their own: what members hold of a generation with layout sharded."""

    def __init__(self, number: int, num_groups: int, threads: int = 4) -> None:
        super().__init__()
        self._number = number
        self._num_groups = num_groups
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="raytower-recall")

    # --- as a member ------------------------------------------------------------------------------------------

    async def prepare(self, generation: Generation) -> None:
        """Open the group's shards of a generation's index version, and search them once."""
        if generation.id not in self._prepared:
            self._prepared[generation.id] = await asyncio.to_thread(self._open, generation)

    def _open(self, generation: Generation) -> Index:
        manifest = checked_manifest(generation)
        for known in self._prepared.values():
            if known.manifest == manifest:  # another model with the same version
                return known
        index = Index.open(generation.index, generation.index_version, part=(self._number, self._num_groups))
        if index.shards:
            index.search(np.ones((1, manifest.dim), np.float32), 1)
        return index

    # --- what is asked ----------------------------------------------------------------------------------------

    def counts(self, generation_id: str) -> dict[int, int]:
        """Live rows of the shards that this group holds. Raises NotReadyError."""
        index = self._of(generation_id)
        return {
            self._shard_at(position, index): shard.num_live for position, shard in enumerate(index.shards)
        }

    async def search(self, generation_id: str, asked: GroupSearch) -> Hits:
        """The best hits in what is asked of this group's shards.

        Raises NotReadyError where the generation is not held here.
        """
        index = self._of(generation_id)
        position = {self._shard_at(position, index): position for position in range(len(index.shards))}
        asks = [Ask(position[ask.shard], ask.depth, ask.queries) for ask in asked.asks]
        return await asyncio.get_running_loop().run_in_executor(
            self._threads,
            lambda: index.answer(asked.prepared, asked.k, asks, asked.parameters, asked.filter),
        )

    def _shard_at(self, position: int, index: Index) -> int:
        """The number in the whole index of the shard at a position here."""
        num_shards = len(index.manifest.shards)
        number = self._number + position * self._num_groups
        return min(number, num_shards) if self._number == 0 else number
