"""Opening and searching an index version in one process."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from raytower.errors import FormatError, InputError
from raytower.index.manifest import IndexManifest, current_version, version_folder
from raytower.index.search import Document, Hits, Shard, merge_hits, prepare_queries
from raytower.storage import Location

# Fewer queries than this go to the shards at once, one thread each; more go shard by shard, all cores on each.
_CONCURRENT_QUERIES = 4


def default_cache_dir() -> Path:
    """Where shards of remote indexes are kept on this machine."""
    return Path(os.environ.get("RAYTOWER_CACHE", Path.home() / ".cache" / "raytower"))


class Index:
    """One version, opened for search; it keeps answering while newer ones are published. Safe for threads."""

    def __init__(self, manifest: IndexManifest, shards: list[Shard]) -> None:
        self.manifest = manifest
        self.shards = shards
        self._threads = ThreadPoolExecutor(len(shards)) if len(shards) > 1 else None

    @classmethod
    def open(
        cls,
        uri: str | Location,
        version: str | None = None,
        *,
        encoder_fingerprint: str | None = None,
        verify: Literal["checksum", "size"] = "checksum",
    ) -> Index:
        """Open the published version, or a named one.

        Raises:
            InputError: no index there, or no such version.
            FormatError: another encoder's fingerprint, a wrong checksum, size or row count, a newer format.
        """
        manifest, folder = open_manifest(uri, version)
        if encoder_fingerprint is not None:
            check_fingerprint(manifest, encoder_fingerprint)
        cache = default_cache_dir()
        numbers = range(len(manifest.shards))
        return cls(
            manifest, [Shard.open(folder, n, manifest, cache, verify=verify == "checksum") for n in numbers]
        )

    @property
    def version(self) -> str:
        return self.manifest.version

    @property
    def dim(self) -> int:
        return self.manifest.dim

    @property
    def num_rows(self) -> int:
        return self.manifest.rows

    @property
    def fingerprint(self) -> str:
        return self.manifest.fingerprint

    @property
    def prefix(self) -> str:
        return self.manifest.prefix

    def check_fingerprint(self, fingerprint: str) -> None:
        """Raises FormatError where an encoder with this fingerprint did not make the vectors."""
        check_fingerprint(self.manifest, fingerprint)

    def search(
        self, vectors: NDArray[Any], k: int, *, search_parameters: dict[str, int] | None = None
    ) -> Hits:
        """The best min(k, rows) hits of each query vector (Q, dim) over all shards.

        Raises:
            InputError: k below 1, or vectors of the wrong shape, not finite, or zero under cosine.
        """
        if k < 1:
            raise InputError(f"k is {k}; ask for at least 1 hit")
        prepared = prepare_queries(vectors, self.manifest)
        if not len(prepared):
            empty = np.zeros((0, min(k, self.num_rows)))
            return Hits(empty.astype(np.float32), empty.astype(np.int32), empty.astype(np.int64))
        if self._threads is not None and len(prepared) < _CONCURRENT_QUERIES:
            parts = list(
                self._threads.map(lambda shard: shard.search(prepared, k, search_parameters), self.shards)
            )
        else:
            parts = [shard.search(prepared, k, search_parameters) for shard in self.shards]
        return merge_hits(parts, min(k, self.num_rows))

    def documents(self, shards: NDArray[np.int32], rows: NDArray[np.int64]) -> list[Document]:
        """The documents of one query's hits, in order; padding (shard -1) is left out."""
        found: dict[int, Document] = {}
        for number in np.unique(shards[shards >= 0]):
            places = np.flatnonzero(shards == number)
            found |= dict(zip(places.tolist(), self.shards[number].documents(rows[places]), strict=True))
        return [found[place] for place in sorted(found)]


def open_manifest(uri: str | Location, version: str | None = None) -> tuple[IndexManifest, Location]:
    """The manifest of a version and its folder. Raises InputError and FormatError as Index.open."""
    index = Location.of(uri)
    name = version or current_version(index)
    folder = version_folder(index, name)
    if not folder.exists():
        raise InputError(f"{index} has no version {name!r}; `raytower index list --index {index}` names them")
    return IndexManifest.read(folder), folder


def check_fingerprint(manifest: IndexManifest, fingerprint: str) -> None:
    """Raises FormatError naming both sides."""
    if manifest.fingerprint != fingerprint:
        raise FormatError(
            f"index version {manifest.version} was made by the encoder with fingerprint {manifest.fingerprint[:12]}… "
            f"({manifest.encoder}), the encoder given has {fingerprint[:12]}…; use that encoder, or encode again"
        )
