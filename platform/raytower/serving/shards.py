"""The index as the engine sees it: all shards in this process, or each in another one."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import pyarrow as pa

from raytower.errors import RaytowerError
from raytower.index.filters import to_sql
from raytower.index.manifest import IndexManifest
from raytower.index.reader import Index, check_fingerprint
from raytower.index.table import DocumentTable
from raytower.index.versions import open_manifest
from raytower.retrieval.retriever import Candidate, Vectors, index_recall
from raytower.serving.ports import keep_replica_local
from raytower.serving.schemas import NotReadyError
from raytower.serving.work import Deadline
from raytower.storage import Location

_LOGGER = logging.getLogger("raytower.serving")
# Opening a shard reads and checks all of it. Only a start or a new version waits for it, so the limit is high.
_OPEN_TIMEOUT_S = 600.0
# While a new version is opened, requests for the one before still arrive.
_VERSIONS_KEPT = 2
# Share of the remaining time that shards may use, so that an answer without a slow one can still be given.
_RECALL_SHARE = 0.6
_FETCH_S = 0.01


class _OneVersion:
    """The facts that the engine asks of any index version, from its manifest and its table's columns."""

    def __init__(self, manifest: IndexManifest, documents_schema: pa.Schema) -> None:
        self.manifest = manifest
        self._documents_schema = documents_schema

    def check_filter(self, filter: Mapping[str, Any]) -> None:
        """Raises InputError if the filter does not fit the documents' columns."""
        to_sql(filter, self._documents_schema)

    def check_fingerprint(self, fingerprint: str) -> None:
        """Raises FormatError where an encoder with this fingerprint did not make the vectors."""
        check_fingerprint(self.manifest, fingerprint)

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
        super().__init__(index.manifest, index.table.schema)
        self._index = index

    @staticmethod
    def open(uri: str, version: str | None) -> LocalIndex:
        """Raises InputError, FormatError: what opening the index raises."""
        return LocalIndex(Index.open(uri, version))

    def recall(
        self, vectors: Vectors, k: int, deadline: Deadline, filter: Mapping[str, Any] | None = None
    ) -> tuple[list[list[Candidate]], bool]:
        """Candidates of each vector of (Q, D); a shard in this process is never missing."""
        return index_recall(self._index, filter)(vectors, k), False


class ShardResponse(Protocol):
    """The pending answer that a Serve handle returns for a call."""

    def result(self, *, timeout_s: float | None = None) -> Any: ...

    def cancel(self) -> None: ...


class ShardedIndex(_OneVersion):
    """The shards in other processes, reached through Serve handles. Process i of n holds the shards i, i + n, i + 2n, …

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
        self._shards = list(shards)
        self._shard_timeout_s = shard_timeout_ms / 1000

    @staticmethod
    def open(uri: str, version: str | None, shards: Sequence[Any], shard_timeout_ms: int) -> ShardedIndex:
        """Make every process open the version, and wait for all of them.

        Raises:
            RaytowerError: a process could not open it.
        """
        manifest = open_manifest(uri, version)
        schema = DocumentTable.open(Location.of(uri), manifest.table_version).schema
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
        """Ask all shards at once for vectors (Q, D), and merge the answers that come in time.

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
            # An answer that has arrived is taken even if the shard before it used up the time.
            found: list[list[Candidate]] = response.result(timeout_s=max(until.remaining_s(), _FETCH_S))
            return found
        except Exception as error:
            # Whatever the reason (late, killed, broken), the answer does without this shard and says so.
            response.cancel()
            _LOGGER.warning("shard %d did not answer: %s: %s", number, type(error).__name__, error)
            return None


def merge_candidates(parts: Sequence[Sequence[Sequence[Candidate]]], k: int) -> list[list[Candidate]]:
    """The best `k` of each query over `parts` [process][query]; equal scores go by row, as in one process."""
    merged = []
    for lists in zip(*parts, strict=True):
        together = [item for items in lists for item in items]
        together.sort(key=lambda item: (-item.score, item.row))
        merged.append(together[:k])
    return merged


class ShardServer:
    """Some shards of an index in a process of their own. It holds the version that is served and the one before."""

    def __init__(self, uri: str, number: int, num_processes: int) -> None:
        keep_replica_local()
        self._uri = uri
        self._number = number
        self._num_processes = num_processes
        self._open: OrderedDict[str, Index] = OrderedDict()
        self._lock = threading.Lock()
        self._opening = threading.Lock()

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Open the version that requests will name. If that fails, those requests are refused."""
        try:
            await self.prepare(user_config["version"])
        except RaytowerError:
            _LOGGER.exception("shard %d cannot open version %r", self._number, user_config["version"])

    async def prepare(self, version: str) -> None:
        """Open a version. Raises what opening raises."""
        await asyncio.to_thread(self._opened, version)

    async def recall(
        self, version: str, vectors: Vectors, k: int, filter: Mapping[str, Any] | None = None
    ) -> list[list[Candidate]]:
        """At most `k` candidates of these shards for each vector of (Q, D), from exactly that version."""
        return await asyncio.to_thread(lambda: index_recall(self._opened(version), filter)(vectors, k))

    def _opened(self, version: str) -> Index:
        known = self._known(version)
        if known is not None:
            return known
        # Opening takes its own lock: requests on a version that is open go on meanwhile.
        with self._opening:
            known = self._known(version)
            if known is None:
                known = Index.open(self._uri, version, part=(self._number, self._num_processes))
                with self._lock:
                    self._open[version] = known
                    while len(self._open) > _VERSIONS_KEPT:
                        self._open.popitem(last=False)
            return known

    def _known(self, version: str) -> Index | None:
        with self._lock:
            known = self._open.get(version)
            if known is not None:
                self._open.move_to_end(version)
            return known


def shard_deployment_name(number: int) -> str:
    return f"shard-{number:05d}"
