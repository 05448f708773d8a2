"""One shard, and the merge of many.

Shape legend: Q queries, D dimension, K hits a query.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raytower.errors import FormatError, InputError
from raytower.index.faiss_import import import_faiss
from raytower.index.kinds import SEARCH_PARAMETER, Vectors, check_parameters, search_index
from raytower.index.manifest import DOCUMENTS_NAME, VECTORS_NAME, IndexManifest, ShardEntry
from raytower.storage import Location


@dataclass(frozen=True)
class Document:
    """A stored document; `metadata` holds the columns besides id and text."""

    id: str
    text: str
    metadata: dict[str, Any]


@dataclass(frozen=True)
class Hits:
    """Hits of Q queries, best first, each array (Q, K). `rows` count within their shard; none is padding."""

    scores: Vectors
    shards: NDArray[np.int32]
    rows: NDArray[np.int64]


class Shard:
    """One shard, memory-mapped. Safe for concurrent searches."""

    def __init__(self, number: int, index: Any, documents: pa.Table, manifest: IndexManifest) -> None:
        self.number = number
        self.documents_table = documents
        self._index = index
        self._manifest = manifest
        # Taking rows batch by batch never joins the columns of a mapped file into new memory.
        self._batches = documents.to_batches()
        self._batch_starts = np.cumsum([0, *(batch.num_rows for batch in self._batches)])

    @classmethod
    def open(
        cls, folder: Location, number: int, manifest: IndexManifest, cache: Path, *, verify: bool = True
    ) -> Shard:
        """Open shard `number` of the version in `folder`. `verify` reads both files for their checksums.

        Raises:
            FormatError: a file is missing, its size or checksum differs, or row counts do not agree.
        """
        entry = manifest.shards[number]
        place = folder.parent / entry.version / entry.name
        vectors = _checked(place / VECTORS_NAME, entry.vectors_sha256, entry.vectors_bytes, cache, verify)
        documents = _checked(
            place / DOCUMENTS_NAME, entry.documents_sha256, entry.documents_bytes, cache, verify
        )
        faiss = import_faiss()
        try:
            index = faiss.read_index(str(vectors), faiss.IO_FLAG_MMAP_IFC)
            table = pa.ipc.open_file(pa.memory_map(str(documents))).read_all()
        except (RuntimeError, pa.ArrowInvalid, OSError) as error:
            raise FormatError(f"shard {place} cannot be read: {error}; build the index again") from error
        _check_content(place, entry, index, table, manifest.dim)
        return cls(number, index, table, manifest)

    @property
    def num_rows(self) -> int:
        return int(self._index.ntotal)

    def search(self, vectors: Vectors, k: int, search_parameters: Mapping[str, int] | None = None) -> Hits:
        """The min(k, rows) hits of each query vector (Q, D) that `prepare_queries` made."""
        chosen = resolve_parameters(self._manifest, k, search_parameters)
        scores, rows = search_index(self._manifest.kind, self._index, vectors, k, chosen)
        return Hits(scores, np.full(rows.shape, self.number, np.int32), rows)

    def documents(self, rows: Sequence[int] | NDArray[np.int64]) -> list[Document]:
        """The documents of some rows, in their order."""
        return [self._document(int(row)) for row in rows]

    def _document(self, row: int) -> Document:
        batch = int(np.searchsorted(self._batch_starts, row, side="right")) - 1
        taken = self._batches[batch].slice(row - int(self._batch_starts[batch]), 1).to_pylist()[0]
        return Document(taken.pop("id"), taken.pop("text"), taken)


def resolve_parameters(
    manifest: IndexManifest, k: int, given: Mapping[str, int] | None = None
) -> dict[str, int]:
    """What a search for k hits uses: what was given, else what the build chose.

    The build chose efSearch for `recall_k` hits. A search for more hits walks as many times wider, which keeps its
    recall about where it was measured.

    Raises:
        InputError: a parameter that the kind does not have, or a value below 1.
    """
    check_parameters(manifest.kind, given or {})
    chosen = {**manifest.search_parameters, **(given or {})}
    if SEARCH_PARAMETER.get(manifest.kind) == "efSearch" and not given and k > manifest.recall_k:
        chosen["efSearch"] = -(-chosen["efSearch"] * k // manifest.recall_k)
    return chosen


def merge_hits(parts: Sequence[Hits], k: int) -> Hits:
    """The best k of several answers to the same queries; equal scores go by shard, then row."""
    if not parts:
        raise InputError("there are no answers to merge; at least one shard must have answered")
    scores = np.concatenate([part.scores for part in parts], axis=1)
    shards = np.concatenate([part.shards for part in parts], axis=1)
    rows = np.concatenate([part.rows for part in parts], axis=1)
    order = _order_by_score(scores)
    ranked = np.take_along_axis(scores, order, 1)
    # Only queries with equal scores, wherever those fall, need the slower sort by three keys.
    tied = np.flatnonzero((ranked[:, 1:] == ranked[:, :-1]).any(axis=1))
    if len(tied):
        order[tied] = np.lexsort((rows[tied], shards[tied], -scores[tied]), axis=1)
    order = order[:, :k]
    take = np.take_along_axis
    return Hits(take(scores, order, 1), take(shards, order, 1), take(rows, order, 1))


def prepare_queries(vectors: NDArray[Any], manifest: IndexManifest) -> Vectors:
    """float32, contiguous, unit length under cosine.

    Raises:
        InputError: the wrong shape or dimension, values that are not finite, or a zero vector under cosine.
    """
    prepared = np.ascontiguousarray(vectors, dtype=np.float32)
    if prepared.ndim != 2 or prepared.shape[1] != manifest.dim:
        raise InputError(
            f"query vectors have shape {prepared.shape}; index version {manifest.version} takes (queries, "
            f"{manifest.dim}): encode queries with the index's encoder, {manifest.encoder}"
        )
    if not np.isfinite(prepared).all():
        raise InputError("query vectors hold NaN or infinity; check the encoder that made them")
    if manifest.metric == "cosine":
        norms = np.linalg.norm(prepared, axis=1, keepdims=True)
        if (norms == 0).any():
            raise InputError(
                "a query vector is zero, which has no cosine with anything; check the encoder that made it"
            )
        prepared = prepared / norms
    return prepared


def _order_by_score(scores: Vectors) -> NDArray[np.int64]:
    """Column numbers (Q, K) by falling score.

    One sort of integers does it: the upper half holds the score's bits, turned so that they rise as it falls, the
    lower half the column. That is several times faster than sorting indices by floats.
    """
    bits = (scores + np.float32(0)).view(np.uint32)  # adding zero makes -0.0 equal to 0.0
    rising = np.where(bits >> 31, bits, ~(bits | np.uint32(1 << 31)))
    keys = (rising.astype(np.uint64) << np.uint64(32)) | np.arange(scores.shape[1], dtype=np.uint64)
    keys.sort(axis=1)
    return (keys & np.uint64(0xFFFFFFFF)).astype(np.int64)


def _checked(place: Location, sha256: str, size: int, cache: Path, verify: bool) -> Path:
    if not place.is_file():
        raise FormatError(f"{place} is missing; the index is damaged: roll back or build it again")
    if place.size_bytes() != size:
        raise FormatError(
            f"{place} has {place.size_bytes()} bytes, its manifest says {size}: it was truncated or changed; roll "
            "back or build it again"
        )
    path = place.fetch(cache, sha256)
    if verify:
        found = Location.of(path).sha256()
        if found != sha256:
            raise FormatError(
                f"{place} has sha256 {found[:12]}…, its manifest says {sha256[:12]}…: it was changed; roll back or "
                "build it again"
            )
    return path


def _check_content(place: Location, entry: ShardEntry, index: Any, table: pa.Table, dim: int) -> None:
    if not index.ntotal == table.num_rows == entry.rows:
        raise FormatError(
            f"shard {place} has {index.ntotal} vectors and {table.num_rows} documents; its manifest says "
            f"{entry.rows} rows"
        )
    if index.d != dim:
        raise FormatError(f"shard {place} has dimension {index.d}; its manifest says {dim}")
    missing = {"id", "text"} - set(table.column_names)
    if missing:
        raise FormatError(f"shard {place} has documents without the columns {sorted(missing)}")
