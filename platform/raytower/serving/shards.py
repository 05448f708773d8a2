"""The index as the engine sees it: all shards in this process, or each in another one."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any, Protocol

import pyarrow as pa

from raytower.errors import FormatError, RaytowerError
from raytower.evaluation.recall import Candidate, Vectors, index_recall
from raytower.index.filters import parse_filter
from raytower.index.manifest import IndexManifest
from raytower.index.reader import Index, default_cache_dir, open_manifest
from raytower.index.search import Shard, merge_hits, prepare_queries, read_documents_schema
from raytower.serving.ports import keep_replica_local
from raytower.serving.schemas import NotReadyError
from raytower.serving.work import Deadline

_LOGGER = logging.getLogger("raytower.serving")
# Opening a shard reads and checks all of it; that may take long, and only a start or a new version waits for it.
_OPEN_TIMEOUT_S = 600.0
# Requests that began on the version before may still come while the new one is taken up.
_VERSIONS_KEPT = 2
# Share of the remaining time that shards may use, so that an answer without a slow one can still be given.
_RECALL_SHARE = 0.6
_FETCH_S = 0.01
# Vectors [Q, D], a depth and a filter to the candidates of one shard.
ShardRecall = Callable[[Vectors, int, Mapping[str, Any] | None], list[list[Candidate]]]


class _OneVersion:
    """What the engine asks of any index version; read from its manifest and its documents' columns."""

    def __init__(self, manifest: IndexManifest, documents_schema: pa.Schema) -> None:
        self.manifest = manifest
        self._documents_schema = documents_schema

    def check_filter(self, filter: Mapping[str, Any]) -> None:
        """Raises InputError where it does not fit the documents' columns."""
        parse_filter(filter, self._documents_schema)

    @property
    def version(self) -> str:
        return self.manifest.version

    @property
    def fingerprint(self) -> str:
        return self.manifest.fingerprint

    @property
    def encoder(self) -> str | None:
        return self.manifest.encoder or None

    @property
    def dim(self) -> int:
        return self.manifest.dim


class LocalIndex(_OneVersion):
    """All shards in this process."""

    def __init__(self, index: Index) -> None:
        super().__init__(index.manifest, index.documents_schema)
        self._index = index

    @staticmethod
    def open(uri: str, version: str | None) -> LocalIndex:
        """Raises InputError, FormatError: what opening the index raises."""
        return LocalIndex(Index.open(uri, version))

    def recall(
        self, vectors: Vectors, k: int, deadline: Deadline, filter: Mapping[str, Any] | None = None
    ) -> tuple[list[list[Candidate]], bool]:
        """Candidates of each vector; a shard in this process is never missing."""
        return index_recall(self._index, filter)(vectors, k), False


class ShardResponse(Protocol):
    """What a Serve handle returns for a call."""

    def result(self, *, timeout_s: float | None = None) -> Any: ...

    def cancel(self) -> None: ...


class ShardedIndex(_OneVersion):
    """Each shard in a process of its own, reached through Serve handles; `shards[i]` answers for shard i.

    Every call names the version, so shards that are still moving to another one never mix into an answer.
    """

    def __init__(
        self,
        manifest: IndexManifest,
        documents_schema: pa.Schema,
        shards: Sequence[Any],
        shard_timeout_ms: int,
    ) -> None:
        super().__init__(manifest, documents_schema)
        self._shards = list(shards[: len(manifest.shards)])
        self._shard_timeout_s = shard_timeout_ms / 1000

    @staticmethod
    def open(uri: str, version: str | None, shards: Sequence[Any], shard_timeout_ms: int) -> ShardedIndex:
        """Have every shard open the version, and wait for all of them.

        Raises:
            FormatError: the version has more shards than there are processes.
            RaytowerError: a shard could not open it.
        """
        manifest, folder = open_manifest(uri, version)
        if len(manifest.shards) > len(shards):
            raise FormatError(
                f"index version {manifest.version!r} has {len(manifest.shards)} shards, but {len(shards)} are served; "
                "start the server again"
            )
        schema = read_documents_schema(folder, manifest)
        index = ShardedIndex(manifest, schema, shards, shard_timeout_ms)
        responses = [shard.prepare.remote(manifest.version) for shard in index._shards]
        for number, response in enumerate(responses):
            try:
                response.result(timeout_s=_OPEN_TIMEOUT_S)
            except Exception as error:
                raise RaytowerError(
                    f"shard {number} could not open version {manifest.version!r}: {error}"
                ) from error
        return index

    def recall(
        self, vectors: Vectors, k: int, deadline: Deadline, filter: Mapping[str, Any] | None = None
    ) -> tuple[list[list[Candidate]], bool]:
        """Ask all shards at once and merge what answers in time.

        Raises:
            OutOfTimeError: no shard answered before the deadline. NotReadyError: none answered, for another reason.
        """
        until = Deadline.after(self._wait_ms(deadline))
        responses = [shard.recall.remote(self.version, vectors, k, filter) for shard in self._shards]
        found = [self._collect(number, response, until) for number, response in enumerate(responses)]
        answered = [part for part in found if part is not None]
        if not answered:
            deadline.check()
            raise NotReadyError("no shard of the index answered; try again", headers={"Retry-After": "1"})
        return merge_candidates(answered, k), len(answered) < len(found)

    def _wait_ms(self, deadline: Deadline) -> int:
        return max(int(1000 * min(self._shard_timeout_s, deadline.remaining_s() * _RECALL_SHARE)), 1)

    def _collect(self, number: int, response: ShardResponse, until: Deadline) -> list[list[Candidate]] | None:
        try:
            # What has arrived is taken, even when the shard before it used up the time.
            found: list[list[Candidate]] = response.result(timeout_s=max(until.remaining_s(), _FETCH_S))
            return found
        except Exception as error:
            # Whatever the reason (late, killed, broken), the answer is given without this shard and says so.
            response.cancel()
            _LOGGER.warning("shard %d did not answer: %s: %s", number, type(error).__name__, error)
            return None


def merge_candidates(parts: Sequence[Sequence[Sequence[Candidate]]], k: int) -> list[list[Candidate]]:
    """The best `k` of each query over `parts` [shard][query]; of equal scores the lower shard's come first."""
    merged = []
    for lists in zip(*parts, strict=True):
        together = [item for items in lists for item in items]
        together.sort(key=lambda item: -item.score)  # stable, so shard order decides ties
        merged.append(together[:k])
    return merged


class ShardServer:
    """One index shard in its own process, holding the versions that are or just were served."""

    def __init__(self, uri: str, number: int) -> None:
        keep_replica_local()
        self._uri = uri
        self._number = number
        self._open: OrderedDict[str, ShardRecall] = OrderedDict()
        self._lock = threading.Lock()
        self._opening = threading.Lock()

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Open the version that will be asked for; one that cannot be opened is refused when it is asked for."""
        try:
            await self.prepare(user_config["version"])
        except RaytowerError:
            _LOGGER.exception("shard %d cannot open version %r", self._number, user_config["version"])

    async def prepare(self, version: str) -> None:
        """Open a version. Raises what opening raises."""
        await asyncio.to_thread(self._recall_of, version)

    async def recall(
        self, version: str, vectors: Vectors, k: int, filter: Mapping[str, Any] | None = None
    ) -> list[list[Candidate]]:
        """At most `k` candidates of this shard for each vector, from exactly that version."""
        return await asyncio.to_thread(lambda: self._recall_of(version)(vectors, k, filter))

    def _recall_of(self, version: str) -> ShardRecall:
        known = self._known(version)
        if known is not None:
            return known
        # Opening takes its own lock: requests on a version that is open go on meanwhile.
        with self._opening:
            known = self._known(version)
            if known is None:
                known = open_shard(self._uri, version, self._number)
                with self._lock:
                    self._open[version] = known
                    while len(self._open) > _VERSIONS_KEPT:
                        self._open.popitem(last=False)
            return known

    def _known(self, version: str) -> ShardRecall | None:
        with self._lock:
            known = self._open.get(version)
            if known is not None:
                self._open.move_to_end(version)
            return known


def open_shard(uri: str, version: str, number: int) -> ShardRecall:
    """Recall from one shard of a version. Raises InputError, FormatError: what opening an index raises."""
    manifest, folder = open_manifest(uri, version)
    shard = Shard.open(folder, number, manifest, default_cache_dir())
    schema = read_documents_schema(folder, manifest)

    def recall(vectors: Vectors, k: int, filter: Mapping[str, Any] | None) -> list[list[Candidate]]:
        parsed = None if filter is None else parse_filter(filter, schema)
        # A merge of one part puts equal scores in the order that a merge of all shards would.
        hits = merge_hits([shard.search(prepare_queries(vectors, manifest), k, filter=parsed)], k)
        real = hits.shards >= 0  # [Q, K]; the rest is padding
        documents = iter(shard.documents(hits.rows[real]))
        return [
            [
                Candidate(document.id, document.text, document.metadata, score)
                for document, score in zip(islice(documents, len(scores)), scores, strict=True)
            ]
            for scores in (row[kept].tolist() for row, kept in zip(hits.scores, real, strict=True))
        ]

    return recall


def shard_deployment_name(number: int) -> str:
    return f"shard-{number:05d}"
