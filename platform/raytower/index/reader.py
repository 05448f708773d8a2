"""Opening and searching an index version in one process.

Shape legend: Q queries, D dimension, K hits a query, S shards.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raytower.errors import FormatError, InputError
from raytower.index.allowed import AllowedRows
from raytower.index.asks import Ask, SearchPlanner
from raytower.index.filters import to_sql
from raytower.index.hits import Hits, empty_hits, merge_hits, spread_hits
from raytower.index.kinds import SHARDS_PROBE, Vectors, check_parameters, parameters_for
from raytower.index.lexical import LexicalSide
from raytower.index.manifest import PLACEMENTS_NAME, IndexManifest
from raytower.index.placement import Placement
from raytower.index.rowmap import Rows
from raytower.index.shard import Shard, local_file, shard_rows
from raytower.index.table import Document, DocumentTable
from raytower.index.versions import open_manifest
from raytower.storage import Location

# Masks of the filters asked last.
_FILTERS_KEPT_BYTES = 256 * 2**20
# Hits of a query, from shard after shard, that are merged together.
_MERGED_AT_ONCE = 1 << 16
Filter = Mapping[str, Any] | str


class Index:
    """One version, opened for search; it keeps answering while newer ones are published. Safe for threads."""

    def __init__(
        self,
        manifest: IndexManifest,
        table: DocumentTable,
        shards: Sequence[Shard],
        placement: Placement | None = None,
        lexical: LexicalSide | None = None,
    ) -> None:
        self.manifest = manifest
        self.table = table
        self.shards = list(shards)
        self.planner = SearchPlanner(
            manifest,
            [shard.digest for shard in self.shards],
            [shard.num_live for shard in self.shards],
            placement,
        )
        self._lexical = lexical
        self._filters: OrderedDict[str, list[AllowedRows]] = OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def open(
        cls,
        uri: str | Location,
        version: str | None = None,
        *,
        encoder_fingerprint: str | None = None,
        part: tuple[int, int] = (0, 1),
    ) -> Index:
        """Open the newest version, or a named one; with `part` (i, n), every n-th shard from i on.

        Files are checked by size, and by checksum when they are fetched; `index verify` reads all of them.

        Raises:
            InputError: no index there, or no such version.
            FormatError: another encoder's fingerprint, a file that is missing or wrong, another format.
        """
        manifest = open_manifest(uri, version)
        if encoder_fingerprint is not None:
            check_fingerprint(manifest, encoder_fingerprint)
        return cls.of_manifest(Location.of(uri), manifest, part=part)

    @classmethod
    def of_manifest(
        cls,
        index: Location,
        manifest: IndexManifest,
        *,
        part: tuple[int, int] = (0, 1),
        table: DocumentTable | None = None,
    ) -> Index:
        """Open a version by a document that need not be published yet; `table` where its version is open already.

        Raises FormatError as `open`.
        """
        number, parts = part
        table = table or DocumentTable.open(index, manifest.table_version)
        if table.num_rows != manifest.rows:
            raise FormatError(
                f"version {manifest.version} of {index} says {manifest.rows} rows, version "
                f"{manifest.table_version} of its "
                f"table has {table.num_rows}; roll back, or build the index again"
            )
        shards = [
            Shard.open(index, entry, manifest.dim, table.row_map) for entry in manifest.shards[number::parts]
        ]
        if number == 0:
            tail = _tail(index, manifest, table, shards if parts == 1 else None)
            shards += [tail] if tail is not None else []
        placement = open_placement(index, manifest) if parts == 1 else None
        lexical = LexicalSide.open(index, manifest, table) if manifest.lexical else None
        return cls(manifest, table, shards, placement, lexical)

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
        """Documents that can be found."""
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

    def check_filter(self, filter: Filter) -> None:
        """Raises InputError where a filter does not fit the documents' columns."""
        self._condition(filter)

    def search(
        self,
        vectors: NDArray[Any],
        k: int,
        *,
        search_parameters: Mapping[str, int] | None = None,
        filter: Filter | None = None,
        check: Callable[[], None] | None = None,
    ) -> Hits:
        """The best min(k, documents that match) hits of each query vector (Q, D) over all shards.

        `check` is called before each shard is searched, for whoever may not need the answer any more; what it raises
        ends the search.

        `filter` names the documents that may be hits by their columns, as `index.filters` describes, or is an SQL
        condition; it is applied before ranking, so k hits come back whenever k documents match. On an index placed by
        cluster, `search_parameters` may hold `shards_probe`, the number of placed shards that a query visits.

        Raises:
            InputError: k below 1, an unknown search parameter, a filter that does not fit the columns, or vectors of
                the wrong shape, not finite, or zero under cosine.
        """
        if k < 1:
            raise InputError(f"k is {k}; ask for at least 1 hit")
        prepared = prepare_queries(vectors, self.manifest)
        parameters = resolve_parameters(self.manifest, k, search_parameters)
        asks, visits_some = self.planner.first(prepared, k, parameters, is_filtered=filter is not None)
        best = self.answer(prepared, k, asks, parameters, filter, check)
        if not visits_some:
            return best
        best = merge_hits(
            [empty_hits(len(prepared), min(k, self.planner.num_rows)), best], min(k, self.planner.num_rows)
        )
        short = self.planner.rest(best)
        if len(short):
            asks = self.planner.everywhere(k, parameters)
            found = self.answer(prepared[short], k, asks, parameters, check=check)
            best.scores[short], best.rows[short] = found.scores, found.rows
        return best

    def search_lexical(
        self,
        queries: Sequence[str],
        k: int,
        *,
        filter: Filter | None = None,
        check: Callable[[], None] | None = None,
    ) -> Hits:
        """The best hits of each query text by BM25 over tokens, (Q, K) with K at most k; as `search` for `filter`.

        `check` is called before each query, as `search` calls it before each shard.

        A hit shares a token with its query. A query without tokens, such as punctuation alone, has no hits.

        Raises:
            InputError: k below 1, an index without a lexical side, or a filter that does not fit the columns.
        """
        if k < 1:
            raise InputError(f"k is {k}; ask for at least 1 hit")
        condition = None if filter is None else self._condition(filter)
        return self._lexical_side.search(queries, k, condition, check)

    def lexical_scores(self, queries: Sequence[str], rows: Sequence[Rows]) -> list[NDArray[np.float32]]:
        """The BM25 scores (n,) of each query's rows (n,), as `search_lexical` gives them; 0 where no token is shared.

        Raises:
            InputError: an index without a lexical side. FormatError: a row that this version does not hold.
        """
        return self._lexical_side.scores(queries, rows)

    @property
    def _lexical_side(self) -> LexicalSide:
        if self._lexical is None:
            raise InputError(
                f"index version {self.version} has no lexical side, so it cannot be searched by words; make one, which "
                "encodes nothing: `raytower index compact --lexical true`, or search with vectors"
            )
        return self._lexical

    def answer(
        self,
        prepared: Vectors,
        k: int,
        asks: Sequence[Ask],
        parameters: Mapping[str, int],
        filter: Filter | None = None,
        check: Callable[[], None] | None = None,
    ) -> Hits:
        """The best k hits of prepared queries (Q, D) in what is asked of shards, by their positions here.

        `check` is called before each of them.
        """
        allowed = None if filter is None else self._allowed(filter)
        parameters = {name: value for name, value in parameters.items() if name != SHARDS_PROBE}
        # Memory holds a few answers, however many shards there are.
        found: list[Hits] = []
        for ask in asks:
            if check is not None:
                check()
            shard, rows = self.shards[ask.shard], allowed[ask.shard] if allowed else None
            if rows is not None and not rows.count:
                continue
            queries = prepared if ask.queries is None else prepared[ask.queries]
            hits = shard.search(queries, ask.depth, self._parameters_of(shard, parameters), rows)
            found.append(hits if ask.queries is None else spread_hits(hits, ask.queries, len(prepared)))
            if len(found) * k > _MERGED_AT_ONCE:
                found = [merge_hits(found, k)]
        return merge_hits(found, k) if found else empty_hits(len(prepared), 0)

    def documents(self, rows: Rows) -> list[Document]:
        """The documents of hits (n,), in order; a row of -1, padding of a merge, is left out."""
        return self.table.documents(rows[rows >= 0])

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Some columns of every document, a batch at a time."""
        return self.table.scan(columns)

    def _parameters_of(self, shard: Shard, parameters: Mapping[str, int]) -> Mapping[str, int]:
        # A small shard that was added is searched exactly.
        return parameters if shard.kind == self.manifest.kind else {}

    def _condition(self, filter: Filter) -> str:
        return filter if isinstance(filter, str) else to_sql(filter, self.table.schema)

    def _allowed(self, filter: Filter) -> list[AllowedRows]:
        """The positions of each shard that a filter lets through; those of the filters asked last are kept."""
        condition = self._condition(filter)
        with self._lock:
            known = self._filters.get(condition)
            if known is not None:
                self._filters.move_to_end(condition)
                return known
        matching = self.table.matching(condition)
        allowed = [shard.allowed(matching) for shard in self.shards]
        with self._lock:
            self._filters[condition] = allowed
            kept = sum(len(rows.mask) + len(rows.bits) for parts in self._filters.values() for rows in parts)
            while kept > _FILTERS_KEPT_BYTES and len(self._filters) > 1:
                _, dropped = self._filters.popitem(last=False)
                kept -= sum(len(rows.mask) + len(rows.bits) for rows in dropped)
        return allowed


def resolve_parameters(
    manifest: IndexManifest, k: int, given: Mapping[str, int] | None = None
) -> dict[str, int]:
    """What a search for k hits uses: what was given, else what was measured for at least k hits.

    A search for more hits than were measured goes as many times wider, which keeps its recall about where it was.

    Raises:
        InputError: a parameter that the kind does not have, or a value below 1.
    """
    given = dict(given or {})
    probe = given.pop(SHARDS_PROBE, None)
    if probe is not None and (manifest.placement is None or probe < 1):
        raise InputError(
            f"search parameter {SHARDS_PROBE} is {probe}; it must be 1 or more, and the index placed by cluster"
        )
    check_parameters(manifest.kind, given, rescored=manifest.exact_dtype is not None)
    measured = {int(at): values for at, values in manifest.search_parameters.items()}
    chosen = parameters_for(k, measured)
    return {**chosen, **given, **({SHARDS_PROBE: probe} if probe is not None else {})}


def prepare_queries(vectors: NDArray[Any], manifest: IndexManifest) -> Vectors:
    """Query vectors (Q, D) as float32, contiguous, of unit length under cosine.

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


def check_fingerprint(manifest: IndexManifest, fingerprint: str, encoder: str | None = None) -> None:
    """Raises FormatError naming both sides. `encoder` is the name of the one given, where it is at hand."""
    if manifest.fingerprint != fingerprint:
        from raytower.models.encoder import former_words  # torch, which building and reading do without

        raise FormatError(
            f"index version {manifest.version} was made by the encoder with fingerprint {manifest.fingerprint} "
            f"({manifest.encoder}), the encoder given{f' ({encoder})' if encoder else ''} has {fingerprint}; use that "
            f"encoder, or encode and build again{former_words(manifest.fingerprint, encoder or manifest.encoder)}"
        )


def _tail(
    index: Location, manifest: IndexManifest, table: DocumentTable, shards: Sequence[Shard] | None
) -> Shard | None:
    """The rows that no shard holds, searched exactly; None where there are none."""
    if shards is None:
        held = [shard_rows(index, entry) for entry in manifest.shards]
    else:
        held = [shard.rows for shard in shards]
    rows = table.row_map.outside(held)
    if not len(rows):
        return None
    return Shard.in_memory(table.vectors(rows, unit=manifest.metric == "cosine"), rows, table.row_map)


def open_placement(index: Location, manifest: IndexManifest) -> Placement | None:
    """Which shard holds which part of space; None where the version is not placed by cluster."""
    entry = manifest.placement
    if entry is None:
        return None
    return Placement.load(local_file(index / PLACEMENTS_NAME / f"{entry.digest}.npz", entry.file))
