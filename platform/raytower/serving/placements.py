"""The layouts of a server: which parts of a generation lie in the ingress, and which are asked of other processes.

Each layout opens the same `Parts` for the engine; only where a stage lies differs. Imports torch and FAISS, no Ray:
what asks other processes is given as functions.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from raytower.errors import RaytowerError
from raytower.index.lexical import LexicalSide
from raytower.index.manifest import IndexManifest
from raytower.index.reader import Index, open_placement
from raytower.index.table import DocumentTable
from raytower.serving.calls import ServedModel
from raytower.serving.errors import NotReadyError, OutOfTimeError
from raytower.serving.forwards import Lane
from raytower.serving.generation import Generation
from raytower.serving.models import ModelPool
from raytower.serving.opening import LocalParts, checked_manifest
from raytower.serving.parts import PairModel, Pairs, Parts, RecallStage, Scored
from raytower.serving.prepared import Prepared
from raytower.serving.shards import RemoteRecall, ShardCall, planner_of
from raytower.serving.work import Deadline
from raytower.storage import Location

# Of what was learned about the time of a pair, this share is forgotten with each answer.
_FORGETTING = 0.1
_FIRST_PAIR_S = 0.005
_POLL_S = 0.1
# What an answer takes on its way back.
_RETURN_MS = 10
_T = TypeVar("_T")


# Asks a reranker in another process; its parameters are those of `Reranker.score`.
ScoreCall = Callable[[str, Pairs, int], Awaitable[Scored]]


@dataclass(frozen=True, kw_only=True)
class RerankerCalls:
    """How the reranker is asked. `describe` blocks; it raises NotReadyError while a generation is not prepared."""

    describe: Callable[[str], ServedModel | None]
    score: ScoreCall


@dataclass(frozen=True, kw_only=True)
class GroupCalls:
    """How one group of shards is asked. `counts` blocks, as `RerankerCalls.describe`."""

    counts: Callable[[str], Mapping[int, int]]
    search: ShardCall


class PlacedParts:
    """Opens generations whose reranker, or whose shards, lie in other processes.

    Args:
        models: the models of this process.
        reranker: None has the reranker here.
        groups: none has all shards here.
        shard_timeout_ms: how long a group is waited for.
        copies: how many processes may answer a call, each of which is to have prepared a generation.
        patience_s: how long other processes may take to prepare one.
    """

    def __init__(
        self,
        models: ModelPool,
        *,
        reranker: RerankerCalls | None = None,
        groups: Sequence[GroupCalls] = (),
        shard_timeout_ms: int = 500,
        copies: int = 1,
        patience_s: float = 600.0,
        recall_threads: int = 4,
    ) -> None:
        self._reranker = reranker
        self._groups = groups
        self._shard_timeout_ms = shard_timeout_ms
        self._copies = copies
        self._patience_s = patience_s
        self._threads = ThreadPoolExecutor(recall_threads, thread_name_prefix="raytower-recall")
        self._local = LocalParts(models, recall_threads)

    def __call__(self, generation: Generation) -> Parts:
        """Raises InputError: no such index or model. FormatError: another encoder made the index, or damage."""
        if self._reranker is None and not self._groups:
            return self._local(generation)
        manifest = checked_manifest(generation)
        return self._local.of_stages(
            generation,
            manifest,
            lambda: self._recall(generation, manifest),
            lambda: self._scorer(generation),
        )

    def _recall(self, generation: Generation, manifest: IndexManifest) -> RecallStage:
        if not self._groups:
            return self._local.recall(generation)
        counts: dict[int, int] = {}
        for number, group in enumerate(self._groups):
            counts.update(self._once_prepared(partial(group.counts, generation.id), f"shard group {number}"))
        place = Location.of(generation.index)
        table = DocumentTable.open(place, manifest.table_version)
        # Words are looked up in the table, which every ingress reads; only vectors lie in the groups.
        lexical = LexicalSide.open(place, manifest, table) if manifest.lexical else None
        index = Index(manifest, table, [], lexical=lexical)
        return RemoteRecall(
            generation.id,
            index,
            planner_of(manifest, open_placement(place, manifest), counts),
            [group.search for group in self._groups],
            self._shard_timeout_ms,
            self._threads,
        )

    def _scorer(self, generation: Generation) -> PairModel | None:
        if self._reranker is None or generation.reranker is None:
            return self._local.scorer(generation)
        served = self._once_prepared(partial(self._reranker.describe, generation.id), "the reranker")
        if served is None:
            raise RaytowerError("the reranker's process holds no reranker for this generation")
        return RemoteScorer(generation.id, served, self._reranker.score)

    def _once_prepared(self, ask: Callable[[], _T], who: str) -> _T:
        """What every copy answers once it has prepared a generation; each is met by chance, so they are asked often."""
        until = time.monotonic() + self._patience_s
        in_a_row = 0
        while True:
            try:
                answer = ask()
                in_a_row += 1
                if in_a_row >= (1 if self._copies == 1 else 3 * self._copies):
                    return answer
            except NotReadyError as error:
                in_a_row = 0
                if time.monotonic() > until:
                    raise RaytowerError(f"{who} did not prepare it in {self._patience_s:g} s") from error
                time.sleep(_POLL_S)


class RemoteScorer:
    """The reranker of a generation in another process."""

    def __init__(self, generation_id: str, served: ServedModel, call: ScoreCall) -> None:
        self.served = served
        self._generation_id = generation_id
        self._call = call
        self._pair_s = _FIRST_PAIR_S

    def predict(self, num_pairs: int, lane: Lane) -> float:
        """Seconds that so many pairs would take, by what those before took."""
        return num_pairs * self._pair_s

    async def score(self, pairs: Pairs, deadline: Deadline) -> Scored:
        """Logits as `PairModel.score`.

        Raises:
            OutOfTimeError: it does not answer in time; or, where the pairs may be shortened, it does not answer.
            NotReadyError: it does not answer.
        """
        began = time.monotonic()
        timeout_ms = max(int(deadline.remaining_s() * 1000) - _RETURN_MS, 1)
        for attempt in range(2):
            try:
                async with asyncio.timeout(deadline.remaining_s()):
                    scored = await self._call(self._generation_id, pairs, timeout_ms)
            except TimeoutError:
                raise deadline.exceeded() from None
            except (asyncio.CancelledError, OutOfTimeError):
                raise
            except Exception as error:
                if attempt == 0 and deadline.remaining_s():
                    continue  # of several copies one may just have died
                if pairs.may_shorten:
                    raise deadline.exceeded() from error
                raise NotReadyError(
                    "the reranker does not answer; try again", headers={"Retry-After": "1"}
                ) from error
            num_pairs = sum(map(len, scored.logits))
            if num_pairs:
                spent = (time.monotonic() - began) / num_pairs
                self._pair_s += _FORGETTING * (spent - self._pair_s)
            return scored
        raise AssertionError("every attempt returns or raises")


class Reranker(Prepared[PairModel | None]):
    """Rerankers in a process of their own: what members hold of generations with layout split."""

    def __init__(self, models: ModelPool) -> None:
        super().__init__()
        self._models = models

    async def prepare(self, generation: Generation) -> None:
        """Load the generation's reranker, and score a pair with it."""
        scorer: PairModel | None = await asyncio.to_thread(self._models.scorer, generation)
        if scorer is not None:
            await scorer.score(Pairs([""], [["warm up"]], Lane.QUERY), Deadline.after(60_000))
        self._prepared[generation.id] = scorer

    def describe(self, generation_id: str) -> ServedModel | None:
        """The reranker as callers see it; None where the generation has none. Raises NotReadyError."""
        scorer = self._of(generation_id)
        return scorer.served if scorer else None

    async def score(self, generation_id: str, pairs: Pairs, timeout_ms: int) -> Scored:
        """Logits of each query with its candidates. Raises NotReadyError, OutOfTimeError."""
        scorer = self._of(generation_id)
        if scorer is None:
            raise NotReadyError(f"generation {generation_id} has no reranker")
        return await scorer.score(pairs, Deadline.after(timeout_ms))
