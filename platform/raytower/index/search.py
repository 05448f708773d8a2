"""One shard, and the merge of many. FAISS pads short answers with -1; no padding ever becomes a hit.

Shape legend: Q queries, D dimension, K hits a query.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raytower.errors import FormatError, InputError
from raytower.index.faiss_import import import_faiss
from raytower.index.manifest import DOCUMENTS_NAME, VECTORS_NAME, IndexManifest, ShardEntry
from raytower.storage import Location

Vectors = NDArray[np.float32]


@dataclass(frozen=True)
class Document:
    """A stored document; `metadata` holds the columns besides id and text."""

    id: str
    text: str
    metadata: dict[str, Any]


@dataclass(frozen=True)
class Hits:
    """Best first. Row lists of equal length K; a query with fewer hits ends in shard -1, score -inf."""

    scores: NDArray[np.float32]
    shards: NDArray[np.int32]
    rows: NDArray[np.int64]


class Shard:
    """One shard, memory-mapped. Safe for concurrent searches."""

    def __init__(self, number: int, index: Any, documents: pa.Table, manifest: IndexManifest) -> None:
        self.number = number
        self.documents_table = documents
        self._index = index
        self._manifest = manifest

    @classmethod
    def open(
        cls, folder: Location, number: int, manifest: IndexManifest, cache: Path, *, verify: bool = True
    ) -> Shard:
        """Open shard `number` of a version.

        Raises:
            FormatError: a file is missing, its size or checksum differs, or row counts do not agree.
        """
        entry = manifest.shards[number]
        place = folder / entry.name
        vectors = _checked(place / VECTORS_NAME, entry.vectors_sha256, entry.vectors_bytes, cache, verify)
        documents = _checked(
            place / DOCUMENTS_NAME, entry.documents_sha256, entry.documents_bytes, cache, verify
        )
        faiss = import_faiss()
        try:
            index = faiss.read_index(str(vectors), faiss.IO_FLAG_MMAP_IFC)
            table = pa.ipc.open_file(pa.memory_map(str(documents))).read_all()
        except (RuntimeError, pa.ArrowInvalid) as error:
            raise FormatError(f"shard {place} cannot be read: {error}; build the index again") from error
        _check_counts(place, entry, index, table, manifest.dim)
        return cls(number, index, table, manifest)

    @property
    def num_rows(self) -> int:
        return int(self._index.ntotal)

    def search(self, vectors: Vectors, k: int, search_parameters: dict[str, int] | None = None) -> Hits:
        """min(k, rows) hits of each prepared query vector (Q, D); cosine queries must have unit length."""
        kept = min(k, self.num_rows)
        chosen = {**self._manifest.search_parameters, **(search_parameters or {})}
        parameters = _faiss_parameters(self._manifest.kind, chosen)
        scores, rows = self._index.search(vectors, kept, params=parameters)
        short = (rows < 0).any(axis=1)
        if short.any():
            # The graph or the probed lists reached fewer rows than were asked for, though the shard holds them.
            scores[short], rows[short] = self._search_everything(vectors[short], kept)
        shards = np.where(rows < 0, -1, self.number).astype(np.int32)
        return Hits(np.where(rows < 0, -np.inf, scores).astype(np.float32), shards, rows.astype(np.int64))

    def _search_everything(
        self, vectors: Vectors, kept: int
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        faiss = import_faiss()
        if self._manifest.kind == "hnsw":
            flat = faiss.downcast_index(self._index.storage)
            return flat.search(vectors, kept)
        parameters = faiss.SearchParametersIVF(nprobe=self._manifest.parameters["nlist"])
        return self._index.search(vectors, kept, params=parameters)

    def documents(self, rows: Sequence[int] | NDArray[np.int64]) -> list[Document]:
        """The documents of some rows, in their order."""
        taken = self.documents_table.take(pa.array(np.asarray(rows, dtype=np.int64)))
        return [
            Document(
                row["id"],
                row["text"],
                {name: value for name, value in row.items() if name not in ("id", "text")},
            )
            for row in taken.to_pylist()
        ]


def merge_hits(parts: Sequence[Hits], k: int) -> Hits:
    """The best k of several answers to the same queries; equal scores go by shard, then row."""
    scores = np.concatenate([part.scores for part in parts], axis=1)
    shards = np.concatenate([part.shards for part in parts], axis=1)
    rows = np.concatenate([part.rows for part in parts], axis=1)
    order = np.lexsort((rows, shards, -scores), axis=1)[:, :k]
    return Hits(
        np.take_along_axis(scores, order, 1),
        np.take_along_axis(shards, order, 1),
        np.take_along_axis(rows, order, 1),
    )


def prepare_queries(vectors: NDArray[Any], manifest: IndexManifest) -> Vectors:
    """float32, contiguous, unit length under cosine.

    Raises:
        InputError: the wrong shape or dimension, values that are not finite, or a zero vector under cosine.
    """
    prepared = np.ascontiguousarray(vectors, dtype=np.float32)
    if prepared.ndim != 2 or prepared.shape[1] != manifest.dim:
        raise InputError(
            f"query vectors have shape {prepared.shape}; this index takes (queries, {manifest.dim})"
        )
    if not np.isfinite(prepared).all():
        raise InputError("query vectors hold values that are not finite; check the encoder")
    if manifest.metric == "cosine":
        norms = np.linalg.norm(prepared, axis=1, keepdims=True)
        if (norms == 0).any():
            raise InputError("a query vector is zero, which has no cosine with anything; check the encoder")
        prepared = prepared / norms
    return prepared


def _faiss_parameters(kind: str, chosen: dict[str, int]) -> Any:
    faiss = import_faiss()
    if kind == "hnsw":
        return faiss.SearchParametersHNSW(efSearch=chosen["efSearch"])
    if kind.startswith("ivf"):
        return faiss.SearchParametersIVF(nprobe=chosen["nprobe"])
    return None


def _checked(place: Location, sha256: str, size: int, cache: Path, verify: bool) -> Path:
    if not place.is_file():
        raise FormatError(f"{place} is missing; the index is damaged, build it again or roll back")
    if place.size_bytes() != size:
        raise FormatError(
            f"{place} has {place.size_bytes()} bytes, its manifest says {size}: truncated or changed"
        )
    path = place.fetch(cache, sha256)
    if verify:
        found = Location.of(path).sha256()
        if found != sha256:
            raise FormatError(
                f"{place} has sha256 {found[:12]}…, its manifest says {sha256[:12]}…: it was changed"
            )
    return path


def _check_counts(place: Location, entry: ShardEntry, index: Any, table: pa.Table, dim: int) -> None:
    if not index.ntotal == table.num_rows == entry.rows:
        raise FormatError(
            f"shard {place} has {index.ntotal} vectors and {table.num_rows} documents; its manifest says {entry.rows}"
        )
    if index.d != dim:
        raise FormatError(f"shard {place} has dimension {index.d}; its manifest says {dim}")
