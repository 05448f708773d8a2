"""Where an index takes its rows from: an embeddings folder, or the live rows of a version that is compacted.

A source is small and travels to workers; each reads what it needs from storage. Shape legend: N rows, D dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raytower.encoding.manifest import EmbeddingsManifest
from raytower.index.costs import BATCH_ROWS
from raytower.index.kinds import Vectors
from raytower.index.manifest import ExactDtype, Origin
from raytower.index.reader import Index, open_manifest
from raytower.index.vectors import VectorBatch, metric_of, sample_rows, stream_rows
from raytower.storage import Location


class VectorSource(Protocol):
    """Rows numbered from 0, always in the same order."""

    @property
    def origin(self) -> Origin: ...

    @property
    def rows(self) -> int: ...

    @property
    def dtype(self) -> ExactDtype:
        """What the vectors are stored with."""
        ...

    @property
    def text_bytes(self) -> int:
        """About what ids, texts and other columns take."""
        ...

    def identity(self) -> Any:
        """JSON that two sources share only if they hold the same rows."""
        ...

    def stream(self, start: int, end: int) -> Iterator[VectorBatch]:
        """Rows start to end (exclusive), a batch at a time; vectors of unit length under cosine."""
        ...

    def sample(self, count: int, seed: int) -> tuple[NDArray[np.int64], Vectors]:
        """`count` distinct random rows (all where there are fewer), rising, and their vectors (N, D)."""
        ...


class EmbeddingsSource:
    """The rows of an embeddings folder, files in manifest order."""

    def __init__(self, folder: Location) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return EmbeddingsSource, (self.folder,)

    @cached_property
    def manifest(self) -> EmbeddingsManifest:
        """Raises FormatError where the folder is unfinished or none."""
        return EmbeddingsManifest.read(self.folder)

    @property
    def origin(self) -> Origin:
        made = self.manifest
        return Origin(
            fingerprint=made.fingerprint,
            encoder=made.encoder,
            metric=metric_of(made),
            dim=made.dim,
            prefix=made.prefix,
            query_prefix=made.query_prefix,
            max_length=made.max_length,
        )

    @property
    def rows(self) -> int:
        return self.manifest.rows

    @property
    def dtype(self) -> ExactDtype:
        return self.manifest.dtype

    @property
    def text_bytes(self) -> int:
        vectors = self.rows * self.manifest.dim * np.dtype(self.dtype).itemsize
        return max(sum(item.bytes for item in self.manifest.files) - vectors, 0)

    def identity(self) -> Any:
        return [[item.name, item.rows, item.sha256] for item in self.manifest.files]

    def stream(self, start: int, end: int) -> Iterator[VectorBatch]:
        return stream_rows(self.folder, self.manifest, start, end)

    def sample(self, count: int, seed: int) -> tuple[NDArray[np.int64], Vectors]:
        return sample_rows(self.folder, self.manifest, count, seed)


class VersionSource:
    """The live rows of an index version, shard after shard, with the vectors that its shards keep."""

    def __init__(self, index: Location, version: str) -> None:
        self.index = index
        self.version = version

    def __reduce__(self) -> Any:
        return VersionSource, (self.index, self.version)

    @cached_property
    def opened(self) -> Index:
        manifest, folder = open_manifest(self.index, self.version)
        return Index.of_manifest(manifest, folder, verify="none")

    @property
    def origin(self) -> Origin:
        return self.opened.manifest.origin

    @property
    def rows(self) -> int:
        return self.opened.num_rows

    @property
    def dtype(self) -> ExactDtype:
        return self.opened.manifest.exact_dtype or "float32"

    @property
    def text_bytes(self) -> int:
        return sum(entry.files["documents.arrow"].bytes for entry in self.opened.manifest.shards)

    def identity(self) -> Any:
        manifest = self.opened.manifest
        return [
            [file.sha256 for file in entry.files.values()]
            + ([entry.deleted.file.sha256] if entry.deleted else [])
            for entry in manifest.shards
        ]

    def stream(self, start: int, end: int) -> Iterator[VectorBatch]:
        first = 0
        for shard in self.opened.shards:
            live = shard.live_rows
            wanted = live[max(start - first, 0) : max(end - first, 0)]
            number = first + max(start - first, 0)
            first += len(live)
            for begin in range(0, len(wanted), BATCH_ROWS):
                rows = wanted[begin : begin + BATCH_ROWS]
                documents = shard.documents_table.take(pa.array(rows))
                yield VectorBatch(number + begin, shard.vectors(rows), documents)

    def sample(self, count: int, seed: int) -> tuple[NDArray[np.int64], Vectors]:
        generator = np.random.default_rng(seed)
        chosen = np.sort(generator.choice(self.rows, size=min(count, self.rows), replace=False))
        parts, first = [], 0
        for shard in self.opened.shards:
            live = shard.live_rows
            inside = chosen[(chosen >= first) & (chosen < first + len(live))] - first
            first += len(live)
            if len(inside):
                parts.append(shard.vectors(live[inside]))
        return chosen, np.concatenate(parts)
