"""One shard, and the merge of many.

Shape legend: Q queries, D dimension, K hits a query.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from raytower.errors import FormatError, InputError
from raytower.index.allowed import AllowedRows
from raytower.index.faiss_import import import_faiss
from raytower.index.faiss_index import GpuIndex
from raytower.index.filters import Filter
from raytower.index.kinds import SEARCH_PARAMETER, Vectors, check_parameters, search_index
from raytower.index.kinds import SHARDS_PROBE as SHARDS_PROBE
from raytower.index.manifest import (
    DELETED_NAME,
    DOCUMENTS_NAME,
    EXACT_NAME,
    VECTORS_NAME,
    FileEntry,
    IndexManifest,
    ShardEntry,
)
from raytower.index.stored import WHOLE_VECTOR_KINDS, stored_vectors
from raytower.storage import Location

# How the files of an index are proved when it is opened: "checksum" reads the files that will be mapped, which for
# remote storage are the local copies; "storage" reads what lies in the storage as well; "none" looks at sizes only.
Verify = Literal["storage", "checksum", "none"]
# Masks of the filters asked last, a byte and a bit for each row of the shard.
_FILTERS_KEPT = 16


@dataclass(frozen=True)
class Document:
    """A stored document; `metadata` holds the columns besides id and text."""

    id: str
    text: str
    metadata: dict[str, Any]


@dataclass(frozen=True)
class Hits:
    """Hits of Q queries, best first, each array (Q, K). `rows` count within their shard.

    A query with fewer hits than another ends in padding: score -inf, shard and row -1.
    """

    scores: Vectors
    shards: NDArray[np.int32]
    rows: NDArray[np.int64]


class Shard:
    """One shard, memory-mapped. Safe for concurrent searches."""

    def __init__(
        self,
        number: int,
        manifest: IndexManifest,
        index: Any,
        documents: pa.Table,
        exact: NDArray[Any] | None,
        deleted: NDArray[np.int64],
    ) -> None:
        self.number = number
        self.entry = manifest.shards[number]
        self.documents_table = documents
        self._index = index
        self._manifest = manifest
        self._exact = exact
        self._gpu: GpuIndex | None = None
        self._live: AllowedRows | None = None  # None: every row
        if len(deleted):
            mask = np.ones(documents.num_rows, dtype=np.bool_)
            mask[deleted] = False
            self._live = AllowedRows.of(mask)
        self._filtered: OrderedDict[str, AllowedRows] = OrderedDict()
        self._lock = threading.Lock()
        # Taking rows batch by batch never joins the columns of a mapped file into new memory.
        self._batches = documents.to_batches()
        self._batch_starts = np.cumsum([0, *(batch.num_rows for batch in self._batches)])

    @classmethod
    def open(
        cls,
        folder: Location,
        number: int,
        manifest: IndexManifest,
        cache: Path,
        *,
        verify: Verify = "checksum",
    ) -> Shard:
        """Open shard `number` of the version in `folder`.

        Raises:
            FormatError: a file is missing, its size or checksum differs, or row counts do not agree.
        """
        entry = manifest.shards[number]
        place = folder.parent / entry.version / entry.name
        paths = {name: checked_file(place / name, file, cache, verify) for name, file in entry.files.items()}
        faiss = import_faiss()
        try:
            index = faiss.read_index(str(paths[VECTORS_NAME]), faiss.IO_FLAG_MMAP_IFC)
            table = pa.ipc.open_file(pa.memory_map(str(paths[DOCUMENTS_NAME]))).read_all()
            exact = np.load(paths[EXACT_NAME], mmap_mode="r") if EXACT_NAME in paths else None
        except (KeyError, RuntimeError, ValueError, pa.ArrowInvalid, OSError) as error:
            raise FormatError(f"shard {place} cannot be read: {error}; build the index again") from error
        _check_content(place, entry, index, table, exact, manifest.dim)
        return cls(number, manifest, index, table, exact, _read_deleted(folder, entry, cache, verify))

    def use_gpu(self) -> bool:
        """Search a copy on the GPU that FAISS sees, where no row is ruled out; False where it holds none."""
        self._gpu = GpuIndex.of(self.entry.kind, self._index)
        return self._gpu is not None

    @property
    def num_rows(self) -> int:
        """Rows in the files, deleted ones too."""
        return int(self._index.ntotal)

    @property
    def live_rows(self) -> NDArray[np.int64]:
        """Numbers of the rows that are not deleted, rising."""
        return np.arange(self.num_rows) if self._live is None else self._live.rows

    @property
    def has_vectors(self) -> bool:
        """Whether whole vectors can be had, or codes only."""
        return self._exact is not None or self.entry.kind in WHOLE_VECTOR_KINDS

    def is_live(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of some rows are not deleted."""
        return np.ones(len(rows), np.bool_) if self._live is None else self._live.mask[rows]

    def count(self, filter: Filter | None = None) -> int:
        """Rows that a search with this filter may find."""
        allowed = self._allowed(filter)
        return self.num_rows if allowed is None else allowed.count

    def search(
        self,
        vectors: Vectors,
        k: int,
        search_parameters: Mapping[str, int] | None = None,
        filter: Filter | None = None,
    ) -> Hits:
        """The min(k, rows that may be found) hits of each query vector (Q, D) that `prepare_queries` made."""
        chosen = resolve_parameters(self._manifest, k, search_parameters)
        if self.entry.kind != self._manifest.kind:
            chosen = {}  # a small shard that was added, searched exactly
        scores, rows = search_index(
            self.entry.kind,
            self._index,
            vectors,
            k,
            chosen,
            allowed=self._allowed(filter),
            exact=self._exact,
            gpu=self._gpu,
        )
        return Hits(scores, np.full(rows.shape, self.number, np.int32), rows)

    def vectors(self, rows: NDArray[np.int64]) -> Vectors:
        """The stored vectors (len(rows), D) of some rows, float32, unit length under cosine.

        Not for concurrent use. Raises InputError where the shard keeps codes only.
        """
        if self._exact is not None:
            vectors = np.asarray(self._exact[rows], dtype=np.float32)
        elif self.entry.kind in WHOLE_VECTOR_KINDS:
            vectors = stored_vectors(self.entry.kind, self._index, rows)
        else:
            raise InputError(
                f"shard {self.entry.name} of kind {self.entry.kind} keeps codes and no exact vectors, so it cannot "
                "be built anew from itself; build the index from its embeddings, with rescore: true"
            )
        if self._manifest.metric == "cosine":
            vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors

    def documents(self, rows: Sequence[int] | NDArray[np.int64]) -> list[Document]:
        """The documents of some rows, in their order."""
        return [self._document(int(row)) for row in rows]

    def new_like(self) -> Any:
        """An empty FAISS index with this one's training, in memory."""
        faiss = import_faiss()
        index = faiss.deserialize_index(faiss.serialize_index(self._index))
        index.reset()
        return index

    def _document(self, row: int) -> Document:
        batch = int(np.searchsorted(self._batch_starts, row, side="right")) - 1
        taken = self._batches[batch].slice(row - int(self._batch_starts[batch]), 1).to_pylist()[0]
        return Document(taken.pop("id"), taken.pop("text"), taken)

    def _allowed(self, filter: Filter | None) -> AllowedRows | None:
        if filter is None:
            return self._live
        with self._lock:
            found = self._filtered.get(filter.key)
            if found is not None:
                self._filtered.move_to_end(filter.key)
                return found
        mask = filter.mask(self.documents_table)
        allowed = AllowedRows.of(mask if self._live is None else mask & self._live.mask)
        with self._lock:
            self._filtered[filter.key] = allowed
            if len(self._filtered) > _FILTERS_KEPT:
                self._filtered.popitem(last=False)
        return allowed


def find_ids(shard: Shard, ids: pa.Array) -> tuple[list[str], NDArray[np.int64]]:
    """Which of `ids` stand in live rows of the shard, and the numbers of those rows."""
    found: list[str] = []
    rows: list[NDArray[np.int64]] = []
    start = 0
    for batch in shard.documents_table.select(["id"]).to_batches():
        column = batch.column(0)
        places = np.flatnonzero(pc.is_in(column, value_set=ids).to_numpy(zero_copy_only=False))
        places = places[shard.is_live(start + places)]
        found += column.take(pa.array(places)).to_pylist()
        rows.append(start + places)
        start += batch.num_rows
    return found, np.concatenate([*rows, np.empty(0, np.int64)]).astype(np.int64)


def resolve_parameters(
    manifest: IndexManifest, k: int, given: Mapping[str, int] | None = None
) -> dict[str, int]:
    """What a search for k hits uses: what was given, else what the build chose.

    The build chose efSearch for `recall_k` hits. A search for more hits walks as many times wider, which keeps its
    recall about where it was measured.

    Raises:
        InputError: a parameter that the kind does not have, or a value below 1.
    """
    check_parameters(manifest.kind, given or {}, rescored=manifest.exact_dtype is not None)
    chosen = {**manifest.search_parameters, **(given or {})}
    chosen.pop(SHARDS_PROBE, None)  # of the index, not of a shard
    if SEARCH_PARAMETER.get(manifest.kind) == "efSearch" and not given and k > manifest.recall_k:
        chosen["efSearch"] = -(-chosen["efSearch"] * k // manifest.recall_k)
    return chosen


def hits_per_shard(manifest: IndexManifest, k: int, given: Mapping[str, int] | None = None) -> int:
    """How many hits each shard gives for the best k of all, in a search without a filter over all shards.

    It is k, but for a graph with an efSearch below k: FAISS walks at least as wide as the hits it is asked for, so k
    of each of S shards would be S times the work for hits of which most are dropped. Such a shard gives efSearch hits,
    or its share of k where that is more. Of k hits that lie on shards by chance, few shards hold many more than their
    share (Vespa bounds its searches of several nodes so, by top-k-probability); how they really lie is what recall is
    measured on. Raises InputError as `resolve_parameters`.
    """
    if manifest.kind != "hnsw":
        return k
    ef_search = resolve_parameters(manifest, k, given)["efSearch"]
    return min(k, max(ef_search, -(-k // len(manifest.shards))))


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


def empty_hits(num_queries: int, depth: int) -> Hits:
    """Nothing but padding, (num_queries, depth)."""
    shape = (num_queries, depth)
    return Hits(
        np.full(shape, -np.inf, np.float32), np.full(shape, -1, np.int32), np.full(shape, -1, np.int64)
    )


def spread_hits(hits: Hits, queries: NDArray[np.int64], num_queries: int) -> Hits:
    """Hits of the queries with these numbers, among padding for the others."""
    spread = empty_hits(num_queries, hits.scores.shape[1])
    spread.scores[queries], spread.shards[queries], spread.rows[queries] = hits.scores, hits.shards, hits.rows
    return spread


def unified_schema(schemas: Sequence[pa.Schema]) -> pa.Schema:
    """The columns of all, each with a type that holds every shard's. Raises FormatError where there is none."""
    try:
        # A file may infer a column as null or int where another has text or float.
        return pa.unify_schemas(
            [schema.remove_metadata() for schema in schemas], promote_options="permissive"
        )
    except (pa.ArrowTypeError, pa.ArrowInvalid) as error:
        raise FormatError(f"the documents do not agree on their columns: {error}") from error


def read_documents_schema(folder: Location, manifest: IndexManifest) -> pa.Schema:
    """The documents' columns of the version in `folder`, from the head of each shard's file.

    Raises:
        FormatError: a file is missing or damaged.
    """
    schemas = []
    for entry in manifest.shards:
        place = folder.parent / entry.version / entry.name / DOCUMENTS_NAME
        try:
            with place.open_read() as stream:
                schemas.append(pa.ipc.open_file(stream).schema)
        except (InputError, pa.ArrowInvalid, OSError) as error:
            raise FormatError(
                f"{place} cannot be read: {error}; roll back or build the index again"
            ) from error
    return unified_schema(schemas)


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


def checked_file(place: Location, file: FileEntry, cache: Path, verify: Verify) -> Path:
    """A local path with this very file, fetched into `cache` where it is remote.

    Raises:
        FormatError: it is missing, or its size or checksum differs.
    """
    if not place.is_file():
        raise FormatError(f"{place} is missing; the index is damaged: roll back or build it again")
    if place.size_bytes() != file.bytes:
        raise FormatError(
            f"{place} has {place.size_bytes()} bytes, its manifest says {file.bytes}: it was truncated or changed; "
            "roll back or build it again"
        )
    # A remote file's copy is proved by `fetch`.
    if verify == "storage" or (verify == "checksum" and place.is_local):
        found = place.sha256()
        if found != file.sha256:
            raise FormatError(
                f"{place} has sha256 {found[:12]}…, its manifest says {file.sha256[:12]}…: it was changed; roll back "
                "or build it again"
            )
    return place.fetch(cache, file.sha256, file.bytes, verify=verify != "none")


def deleted_place(versions: Location, entry: ShardEntry) -> Location:
    """Where the tombstones of a shard are, below the folder of all versions."""
    assert entry.deleted is not None
    return versions / entry.deleted.version / DELETED_NAME / f"{entry.version}-{entry.name}.npy"


def _read_deleted(folder: Location, entry: ShardEntry, cache: Path, verify: Verify) -> NDArray[np.int64]:
    if entry.deleted is None:
        return np.empty(0, np.int64)
    place = deleted_place(folder.parent, entry)
    path = checked_file(place, entry.deleted.file, cache, verify)
    try:
        rows = np.load(path, allow_pickle=False)
    except (ValueError, OSError) as error:
        raise FormatError(f"{place} cannot be read: {error}; roll back or compact again") from error
    if len(rows) != entry.deleted.rows or (len(rows) and not 0 <= rows.min() <= rows.max() < entry.rows):
        raise FormatError(
            f"{place} holds {len(rows)} deleted rows of a shard with {entry.rows}; its manifest says "
            f"{entry.deleted.rows}"
        )
    return rows


def _check_content(
    place: Location, entry: ShardEntry, index: Any, table: pa.Table, exact: NDArray[Any] | None, dim: int
) -> None:
    if not index.ntotal == table.num_rows == entry.rows:
        raise FormatError(
            f"shard {place} has {index.ntotal} vectors and {table.num_rows} documents; its manifest says "
            f"{entry.rows} rows"
        )
    if index.d != dim:
        raise FormatError(f"shard {place} has dimension {index.d}; its manifest says {dim}")
    if exact is not None and exact.shape != (entry.rows, dim):
        raise FormatError(
            f"shard {place} has exact vectors of shape {exact.shape}, its manifest says {(entry.rows, dim)}"
        )
    missing = {"id", "text"} - set(table.column_names)
    if missing:
        raise FormatError(f"shard {place} has documents without the columns {sorted(missing)}")
