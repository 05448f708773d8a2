"""Opening and searching an index version in one process."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raytower.errors import FormatError, InputError
from raytower.index.faiss_import import import_faiss
from raytower.index.filters import Filter, parse_filter
from raytower.index.kinds import Vectors
from raytower.index.manifest import PLACEMENT_NAME, IndexManifest
from raytower.index.placement import Placement
from raytower.index.search import (
    SHARDS_PROBE,
    Document,
    Hits,
    Shard,
    Verify,
    checked_file,
    empty_hits,
    hits_per_shard,
    merge_hits,
    prepare_queries,
    spread_hits,
    unified_schema,
)
from raytower.index.versions import current_version, finished_versions, version_folder
from raytower.storage import Location

# One query alone keeps one core busy in FAISS; over large flat shards a thread a shard is worth its hand-over.
_CONCURRENT_ROWS = 100_000


def default_cache_dir() -> Path:
    """Where shards of remote indexes are kept on this machine."""
    return Path(os.environ.get("RAYTOWER_CACHE", Path.home() / ".cache" / "raytower"))


class Index:
    """One version, opened for search; it keeps answering while newer ones are published. Safe for threads."""

    def __init__(
        self, manifest: IndexManifest, shards: list[Shard], placement: Placement | None = None
    ) -> None:
        self.manifest = manifest
        self.shards = shards
        self.documents_schema = unified_schema([shard.documents_table.schema for shard in shards])
        self._placement = placement
        self._threads: ThreadPoolExecutor | None = None
        if manifest.kind == "flat" and len(shards) > 1 and manifest.rows >= _CONCURRENT_ROWS:
            one_thread = import_faiss().omp_set_num_threads
            workers = min(len(shards), os.cpu_count() or 1)
            self._threads = ThreadPoolExecutor(workers, "index-shard", one_thread, (1,))

    @classmethod
    def open(
        cls,
        uri: str | Location,
        version: str | None = None,
        *,
        encoder_fingerprint: str | None = None,
        verify: Verify = "checksum",
    ) -> Index:
        """Open the published version, or a named one.

        `verify="checksum"` reads every file once; "none" checks sizes and row counts only; "storage" reads remote
        files again, of which copies are at hand.

        Raises:
            InputError: no index there, or no such version.
            FormatError: another encoder's fingerprint, a wrong checksum, size or row count, another format.
        """
        manifest, folder = open_manifest(uri, version)
        if encoder_fingerprint is not None:
            check_fingerprint(manifest, encoder_fingerprint)
        return cls.of_manifest(manifest, folder, verify=verify)

    @classmethod
    def of_manifest(cls, manifest: IndexManifest, folder: Location, *, verify: Verify = "checksum") -> Index:
        """Open the version in `folder` by a manifest that need not be written yet. Raises FormatError as `open`."""
        cache = default_cache_dir()
        numbers = range(len(manifest.shards))
        shards = [Shard.open(folder, n, manifest, cache, verify=verify) for n in numbers]
        return cls(manifest, shards, _open_placement(folder, manifest, cache, verify))

    def use_gpu(self) -> int:
        """Search flat shards and shards of lists on the GPU that FAISS sees; returns how many it holds."""
        return sum([shard.use_gpu() for shard in self.shards])

    @property
    def version(self) -> str:
        return self.manifest.version

    @property
    def dim(self) -> int:
        return self.manifest.dim

    @property
    def num_rows(self) -> int:
        """Rows that can be found; deleted ones are not counted."""
        return self.manifest.rows

    @property
    def fingerprint(self) -> str:
        return self.manifest.fingerprint

    @property
    def encoder(self) -> str:
        """The encoder that made the vectors, as the encoding job was given it."""
        return self.manifest.encoder

    @property
    def prefix(self) -> str:
        """What was put before each document when it was encoded."""
        return self.manifest.prefix

    def check_fingerprint(self, fingerprint: str) -> None:
        """Raises FormatError where an encoder with this fingerprint did not make the vectors."""
        check_fingerprint(self.manifest, fingerprint)

    def search(
        self,
        vectors: NDArray[Any],
        k: int,
        *,
        search_parameters: Mapping[str, int] | None = None,
        filter: Mapping[str, Any] | None = None,
    ) -> Hits:
        """The best min(k, rows that match) hits of each query vector (Q, dim) over all shards.

        `filter` names the documents that may be hits by their columns, as `index.filters` describes; it is applied
        before ranking, so k hits come back whenever k documents match. On an index placed by cluster,
        `search_parameters` may hold `shards_probe`, the number of placed shards that a query visits.

        Raises:
            InputError: k below 1, an unknown search parameter, a filter that does not fit the columns, or vectors of
                the wrong shape, not finite, or zero under cosine.
        """
        if k < 1:
            raise InputError(f"k is {k}; ask for at least 1 hit")
        prepared = prepare_queries(vectors, self.manifest)
        parsed = None if filter is None else parse_filter(filter, self.documents_schema)
        parameters = dict(search_parameters or {})
        visits = self._visits(prepared, parameters.pop(SHARDS_PROBE, None))
        if visits is not None:
            return self._search_visited(prepared, k, parameters, parsed, visits)
        return self._search_all(prepared, k, parameters, parsed)

    def documents(self, shards: NDArray[np.int32], rows: NDArray[np.int64]) -> list[Document]:
        """The documents of one query's hits, in order; a shard of -1, padding of a merge, is left out."""
        found: list[Document] = []
        for shard, row in zip(shards.tolist(), rows.tolist(), strict=True):
            if shard >= 0:
                found += self.shards[shard].documents([row])
        return found

    def document_tables(self) -> Iterator[pa.Table]:
        """Every document that is not deleted, a table of each shard at a time, memory-mapped where all of it lives."""
        for shard in self.shards:
            table = shard.documents_table
            live = shard.live_rows
            yield table if len(live) == table.num_rows else table.take(pa.array(live))

    def _search_all(
        self, prepared: Vectors, k: int, parameters: Mapping[str, int], filter: Filter | None
    ) -> Hits:
        if self._threads is not None and len(prepared) == 1:
            parts = list(
                self._threads.map(lambda shard: shard.search(prepared, k, parameters, filter), self.shards)
            )
            return merge_hits(parts, k)
        depths = [k] * len(self.shards) if filter is not None else self._depths(k, parameters)
        # A running merge: memory holds two answers, however many shards there are.
        best: Hits | None = None
        for shard, depth in zip(self.shards, depths, strict=True):
            found = shard.search(prepared, depth, parameters, filter)
            best = merge_hits([found] if best is None else [best, found], k)
        assert best is not None
        return best

    def _depths(self, k: int, parameters: Mapping[str, int]) -> list[int]:
        """How many hits each shard is asked for; together they hold k wherever the index does."""
        depth = k if self._placement is not None else hits_per_shard(self.manifest, k, parameters)
        # Documents that were added later may be about one thing, and recall was not measured on them.
        measured = [shard.entry.version == self.manifest.recall_version for shard in self.shards]
        depths = [depth if known else k for known in measured]
        counts = [shard.count() for shard in self.shards]
        enough = sum(map(min, depths, counts)) >= min(k, sum(counts))
        return depths if enough else [k] * len(self.shards)

    def _visits(self, prepared: Vectors, asked: int | None) -> NDArray[np.bool_] | None:
        """Which shards each query visits (Q, S), or None for all."""
        if self._placement is None or self.manifest.placement is None:
            if asked is not None:
                raise InputError(
                    f"search parameter {SHARDS_PROBE} is {asked}, but this index is not placed by cluster; leave it out"
                )
            return None
        placed = self.manifest.placement.shards
        probe = self.manifest.search_parameters.get(SHARDS_PROBE, placed) if asked is None else asked
        if probe < 1:
            raise InputError(f"search parameter {SHARDS_PROBE} is {probe}; it must be 1 or more")
        if probe >= placed:
            return None
        visits = np.ones(
            (len(prepared), len(self.shards)), dtype=np.bool_
        )  # added shards are placed by nothing
        visits[:, :placed] = self._placement.visit(prepared, probe)
        return visits

    def _search_visited(
        self,
        prepared: Vectors,
        k: int,
        parameters: Mapping[str, int],
        filter: Filter | None,
        visits: NDArray[np.bool_],
    ) -> Hits:
        depth = min(k, sum(shard.count(filter) for shard in self.shards))
        best = empty_hits(len(prepared), depth)
        for number, shard in enumerate(self.shards):
            queries = np.flatnonzero(visits[:, number])
            if len(queries):
                found = shard.search(prepared[queries], k, parameters, filter)
                best = merge_hits([best, spread_hits(found, queries, len(prepared))], depth)
        short = np.flatnonzero((best.shards < 0).any(axis=1))
        if len(short):
            # The shards visited hold too few rows that match: ask all of them.
            found = self._search_all(prepared[short], k, parameters, filter)
            for name in ("scores", "shards", "rows"):
                getattr(best, name)[short] = getattr(found, name)
        return best


def _open_placement(
    folder: Location, manifest: IndexManifest, cache: Path, verify: Verify
) -> Placement | None:
    entry = manifest.placement
    if entry is None:
        return None
    place = folder.parent / entry.version / PLACEMENT_NAME
    return Placement.load(checked_file(place, entry.file, cache, verify))


def open_manifest(uri: str | Location, version: str | None = None) -> tuple[IndexManifest, Location]:
    """The manifest of a version and its folder. Raises InputError and FormatError as Index.open."""
    index = Location.of(uri)
    name = current_version(index) if version is None else version
    folder = version_folder(index, name)
    if not folder.exists():
        known = ", ".join(finished_versions(index)) or "none"
        raise InputError(f"{index} has no version {name!r}; it has: {known}")
    manifest = IndexManifest.read(folder)
    if manifest.version != name:
        raise FormatError(
            f"{folder} holds the manifest of version {manifest.version!r}; the folder was renamed"
        )
    return manifest, folder


def check_fingerprint(manifest: IndexManifest, fingerprint: str) -> None:
    """Raises FormatError naming both sides."""
    if manifest.fingerprint != fingerprint:
        raise FormatError(
            f"index version {manifest.version} was made by the encoder with fingerprint {manifest.fingerprint} "
            f"({manifest.encoder}), the encoder given has {fingerprint}; use that encoder, or encode and build again"
        )
