"""How each index kind is searched, with which parameters. Every kind scores by inner product.

Where only some rows are allowed, by a filter or because others are deleted, the way is chosen by what it costs:

    few rows allowed    Score each of them exactly. This finds every hit there is.
    many                Search as if there were no filter, but R results deep: R is k over the share of rows allowed,
                        with a margin for chance. Then keep the allowed ones. That is enough where the filter has
                        nothing to do with the vectors: a search R/k times as wide finds the first R about as well as it
                        finds the first k. A filter may have to do with them (one by language does), so each answer is
                        checked. A query that fails is searched four times as widely, and exactly once that is cheaper.
      a graph           is walked for all rows. Among the first R of its ranking there must be k allowed ones.
      lists             are read for allowed rows only. The farther three quarters of the lists that are read must add
                        no hits to the nearest quarter: a search of few lists relies on that, and it does not hold once
                        the k-th allowed row is farther off than the clusters are wide.

So k hits come back whenever k rows are allowed, and recall stays about what it is without a filter or above, as
benchmarks/bench_filters.py measures. Codes without stored vectors can only rank as well as they were decoded. A search
of the graph or of a few lists with faiss.IDSelectorBitmap alone promises neither: it answers with rows that it met on
its way, allowed and far from the query, while nearer ones are never visited.

Shape legend: Q queries, D dimension, K hits a query, C candidates a query, R rows of a ranking.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from raytower.errors import InputError
from raytower.index.allowed import AllowedRows
from raytower.index.config import BuiltKind
from raytower.index.faiss_import import import_faiss
from raytower.index.faiss_index import Copies, GpuIndex, copies_of, graph_of
from raytower.index.faiss_index import Vectors as Vectors

Mask = NDArray[np.bool_]
Found = tuple[Vectors, NDArray[np.int64]]  # scores and rows, each (Q, K)
# So many times k candidates of the 8-bit walk are scored exactly: enough that the codes cost no measurable recall.
_HNSW_RESCORED = 2
# The same for the codes of the lists, where the vectors are stored; product quantisation may need more of them.
_K_FACTORS: dict[BuiltKind, tuple[int, ...]] = {
    "ivf_flat": (1,),
    "ivf_rabitq": (4, 16, 64),
    "ivf_sq8": (4,),
    "ivf_pq": (4, 16, 64),
}
# Codes of one bit are that much coarser among rows that a filter lets through, which may all be far from the query: so
# many times the candidates that were measured without a filter are then scored.
_FILTERED_FACTOR: dict[BuiltKind, int] = {"ivf_rabitq": 8}
# Vectors copied out at once to be scored: small enough to be scored from the processor's cache.
_BLOCK_BYTES = 2 * 2**20
# Entries of a ranking, or of a table of lists, in memory at once.
_RANKED_AT_ONCE = 2**22
# A ranking that deep, in multiples of k, is searched for allowed rows whatever the index: deleted rows cost no check.
_NEAR = 2
# The share of hits that the farther lists may add, one in so many.
_STRAY_HITS = 50

# What things cost beside one product of two vectors in the cache: CPU times of 100,000 vectors of 128 dimensions, where
# that unit is 8 ns. benchmarks/bench_filters.py shows how well the ways are chosen by them.
_COPY_COST = 5.0  # a vector copied out, shared by all queries of a call
_CANDIDATE_COST = 12.0  # a vector copied out and scored for one query
_IN_PLACE_COST = 3.0  # a row of a flat index, allowed or not
_EDGE_COST = 4.0  # an edge of the graph
_BIT_COST = 0.7  # a row of a list, allowed or not
_CODE_COST = 3.5  # the codes of a row that is allowed
# What a wide search costs in all, with the queries that are asked again, beside its first round.
_GRAPH_ROUNDS = 1.5
_LISTS_ROUNDS = 3.0
_WIDENING = 4
# The search parameter of an index placed by cluster: how many of the placed shards a query visits.
SHARDS_PROBE = "shards_probe"
SEARCH_PARAMETER: dict[BuiltKind, str] = {
    "hnsw": "efSearch",
    "ivf_flat": "nprobe",
    "ivf_rabitq": "nprobe",
    "ivf_sq8": "nprobe",
    "ivf_pq": "nprobe",
}


def parameter_grid(
    kind: BuiltKind,
    parameters: Mapping[str, int],
    rows: int,
    k: int,
    *,
    rescored: bool = False,
    shards: int = 1,
) -> list[dict[str, int]]:
    """Search parameters from the cheapest up; one empty setting for a kind that has none.

    Where candidates are rescored with stored vectors, the whole range of nprobe comes with the smallest k_factor, then
    again with each larger one. FAISS never walks with an efSearch below the number of hits asked, so smaller values
    would measure the same; one of several shards may be asked for fewer than k (see `SearchPlanner`).
    """
    if kind == "flat":
        return [{}]
    low, high = (
        (-(-(k + 1) // shards), max(min(rows, 1024), 8 * k)) if kind == "hnsw" else (1, parameters["nlist"])
    )
    values, value = [], low
    while value < high:
        values.append(value)
        value = max(value + 1, value * 5 // 4)
    settings = [{SEARCH_PARAMETER[kind]: item} for item in [*values, high]]
    if kind == "hnsw" or not rescored:
        return settings
    # Once a factor takes every row as a candidate, a larger one measures the same.
    factors = [
        factor
        for factor, before in zip(_K_FACTORS[kind], (0, *_K_FACTORS[kind]), strict=False)
        if before * k < rows
    ]
    return [{**setting, "k_factor": factor} for factor in factors for setting in settings]


def parameters_for(k: int, measured: Mapping[int, Mapping[str, int]]) -> dict[str, int]:
    """The search parameters that a search for `k` hits takes, of those that were chosen at some k.

    They are those of the next larger k. Beyond the largest the search widens as k grows, which keeps its recall about
    where it was measured; `k_factor` is in multiples of k already.
    """
    nearest = min((at for at in measured if at >= k), default=max(measured))
    widened = max(k, nearest)
    return {
        name: value if name == "k_factor" else -(-value * widened // nearest)
        for name, value in measured[nearest].items()
    }


def check_parameters(kind: BuiltKind, given: Mapping[str, int], *, rescored: bool = False) -> None:
    """Raises InputError for a search parameter that this kind does not have, or one below 1.

    `rescored` says that the index stores exact vectors beside codes, which gives it `k_factor`.
    """
    known = [SEARCH_PARAMETER[kind]] if kind in SEARCH_PARAMETER else []
    if rescored and kind in _K_FACTORS:
        known.append("k_factor")
    for name, value in given.items():
        if name not in known:
            has = f"it has {' and '.join(map(repr, known))}" if known else "it has none"
            if name == "k_factor" and kind in _K_FACTORS:
                has += "; k_factor needs exact vectors beside the codes, which this index was built without"
            raise InputError(f"an index of kind {kind} has no search parameter {name!r}; {has}")
        if value < 1:
            raise InputError(f"search parameter {name} is {value}; it must be 1 or more")


def search_index(
    kind: BuiltKind,
    index: Any,
    queries: Vectors,
    k: int,
    parameters: Mapping[str, int],
    *,
    allowed: AllowedRows | None = None,
    exact: NDArray[Any] | None = None,
    gpu: GpuIndex | None = None,
) -> Found:
    """Scores and rows, each (Q, min(k, rows that are allowed)), best first and without FAISS's -1 padding.

    A query whose lists or graph hold too few rows is asked again more widely until it has all it should.

    Args:
        allowed: the rows that may be hits; all without it.
        exact: the stored vectors (rows, D), float32 or float16, of an index of lists. The best `k_factor` times k rows
            by their codes are then scored with these vectors, and so are few allowed rows. Other kinds hold theirs;
            ivf_rabitq cannot do without.
        gpu: a copy of a flat index or one of lists, which searches without a filter then go to.

    Safe for concurrent calls on one index.
    """
    return Searchable(kind, index, exact, gpu).search(queries, k, parameters, allowed)


class Searchable:
    """An index opened for `search_index`: it holds what is the same for every query. Safe for concurrent calls."""

    def __init__(
        self, kind: BuiltKind, index: Any, exact: NDArray[Any] | None = None, gpu: GpuIndex | None = None
    ) -> None:
        """`exact`: the stored vectors (rows, D). Raises ValueError for another shape, or where `kind` needs them."""
        self._total = int(index.ntotal)
        if exact is not None and exact.shape != (self._total, index.d):
            raise ValueError(
                f"the stored vectors have shape {exact.shape}, the index has {(self._total, index.d)}"
            )
        if kind == "ivf_rabitq" and exact is None:
            raise ValueError(
                "one bit a dimension ranks too coarsely without the stored vectors; give them as `exact`"
            )
        self._kind = kind
        self._index = _Parts.of(index) if kind == "hnsw" else index
        self._exact = exact
        self._gpu = gpu

    def search(
        self, queries: Vectors, k: int, parameters: Mapping[str, int], allowed: AllowedRows | None = None
    ) -> Found:
        """Scores and rows (Q, k), as `search_index`. Raises ValueError if `allowed` is for another number of rows."""
        total = self._total
        if allowed is not None and len(allowed.mask) != total:
            raise ValueError(f"the mask of allowed rows has {len(allowed.mask)} rows, the index has {total}")
        count = total if allowed is None else allowed.count
        depth = min(k, count)
        if depth == 0 or len(queries) == 0:
            shape = (len(queries), depth)
            return np.empty(shape, np.float32), np.empty(shape, np.int64)
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        way = _way(self._kind, self._index, parameters, self._exact, self._gpu)
        if allowed is None or count == total:
            return way.search(queries, depth)
        return _search_allowed(way, queries, depth, allowed)


def _search_allowed(way: _Way, queries: Vectors, depth: int, allowed: AllowedRows) -> Found:
    scores = np.empty((len(queries), depth), np.float32)
    rows = np.empty((len(queries), depth), np.int64)
    pending = np.arange(len(queries))
    reach = _first_reach(depth, allowed)
    while len(pending) and reach < len(allowed.mask):
        if way.width_cost(depth, allowed, reach) >= way.exact_cost(allowed, len(pending)):
            break
        (scores[pending], rows[pending]), sure = way.widely(queries[pending], depth, allowed, reach)
        pending = pending[~sure]
        reach *= _WIDENING
    if len(pending):
        scores[pending], rows[pending] = way.exactly(queries[pending], depth, allowed)
    return scores, rows


def _first_reach(depth: int, allowed: AllowedRows) -> int:
    """Rank at which the depth-th allowed row is expected where rows are allowed by chance, and two standard deviations.

    Where each row is allowed with probability p, that place has mean depth/p and deviation sqrt(depth (1-p))/p (the
    negative binomial distribution).
    """
    share = allowed.count / len(allowed.mask)
    return math.ceil((depth + 2 * math.sqrt(depth * (1 - share))) / share)


# Ways through an index


class _Way(Protocol):
    """One index at one setting. Every answer is (Q, depth), best first."""

    def search(self, queries: Vectors, depth: int) -> Found:
        """Among all rows."""

    def exactly(self, queries: Vectors, depth: int, allowed: AllowedRows) -> Found:
        """Among the allowed rows, leaving none out."""

    def exact_cost(self, allowed: AllowedRows, num_queries: int) -> float:
        """Of `exactly`, a query."""

    def widely(self, queries: Vectors, depth: int, allowed: AllowedRows, reach: int) -> tuple[Found, Mask]:
        """Among the allowed rows, as widely as it takes to rank `reach` rows; and which answers (Q,) are good.

        The others are not to be used.
        """

    def width_cost(self, depth: int, allowed: AllowedRows, reach: int) -> float:
        """Of `widely`, a query."""


def _way(
    kind: BuiltKind,
    index: Any,
    parameters: Mapping[str, int],
    exact: NDArray[Any] | None,
    gpu: GpuIndex | None = None,
) -> _Way:
    if kind == "flat":
        return _Flat(index, gpu)
    if kind == "hnsw":
        return _Graph(index if isinstance(index, _Parts) else _Parts.of(index), parameters["efSearch"])
    k_factor = parameters.get("k_factor", _K_FACTORS[kind][0])
    filtered = k_factor * _FILTERED_FACTOR.get(kind, 1)
    return _Lists(index, parameters["nprobe"], k_factor, filtered, exact, gpu)


@dataclass(frozen=True)
class _Flat:
    index: Any
    gpu: GpuIndex | None = None

    def search(self, queries: Vectors, depth: int) -> Found:
        gpu = self.gpu if self.gpu is not None and self.gpu.reaches(depth) else None
        return (gpu or self.index).search(queries, depth)

    def exactly(self, queries: Vectors, depth: int, allowed: AllowedRows) -> Found:
        if len(allowed.mask) * _IN_PLACE_COST <= _scoring_cost(allowed, len(queries)):
            return self.index.search(
                queries, depth, params=_selecting(import_faiss().SearchParameters, allowed)
            )
        return _score_rows(self.vectors, queries, allowed.rows, depth)

    def exact_cost(self, allowed: AllowedRows, num_queries: int) -> float:
        return min(len(allowed.mask) * _IN_PLACE_COST, _scoring_cost(allowed, num_queries))

    def widely(self, queries: Vectors, depth: int, allowed: AllowedRows, reach: int) -> tuple[Found, Mask]:
        return self.exactly(queries, depth, allowed), np.ones(len(queries), np.bool_)

    def width_cost(self, depth: int, allowed: AllowedRows, reach: int) -> float:
        return math.inf

    @property
    def vectors(self) -> NDArray[Any]:
        """(rows, D), float32 or float16, where they lie. The index must outlive them."""
        size = int(self.index.code_size)
        codes = import_faiss().rev_swig_ptr(self.index.codes.data(), self.index.ntotal * size)
        dtype = np.float16 if size == 2 * self.index.d else np.float32
        vectors: NDArray[Any] = codes.view(dtype).reshape(self.index.ntotal, self.index.d)
        return vectors


@lru_cache(maxsize=256)
def _walk(width: int, candidates: int, depth: int) -> Any:
    """Making these takes as long as a walk over some thousand rows; searches only read them."""
    faiss = import_faiss()
    # Either queue gives the same hits; FAISS's default takes 5 % longer in narrow walks and as long in wide ones.
    walk = faiss.SearchParametersHNSW(efSearch=width, bounded_queue=False)
    # FAISS truncates depth * k_factor to a whole number, in 32-bit floats.
    return faiss.IndexRefineSearchParameters(k_factor=(candidates + 0.5) / depth, base_index_params=walk)


@dataclass(frozen=True)
class _Parts:
    """A graph and what belongs to it: to look these up takes longer than some searches."""

    index: Any
    walked: Any
    flat: _Flat
    copies: Copies | None
    total: int
    edges: int  # of a row

    @classmethod
    def of(cls, index: Any) -> _Parts:
        faiss = import_faiss()
        return cls(
            index=index,
            walked=faiss.downcast_index(index.base_index),
            flat=_Flat(faiss.downcast_index(index.refine_index)),
            copies=copies_of(index),
            total=int(index.ntotal),
            edges=graph_of(index).hnsw.nb_neighbors(0),
        )


@dataclass(frozen=True)
class _Graph:
    parts: _Parts
    ef_search: int

    def search(self, queries: Vectors, depth: int) -> Found:
        width = max(self.ef_search, depth)
        candidates = min(width, _HNSW_RESCORED * depth, self.parts.total)
        scores, rows = self.parts.index.search(queries, depth, params=_walk(width, candidates, depth))
        if self.parts.copies is not None:
            self._add_copies(queries, self.parts.copies, scores, rows)
        short = rows[:, -1] < 0
        if short.any():
            # Rows that no walk reaches are found by scoring every full vector.
            scores[short], rows[short] = self.parts.flat.search(queries[short], depth)
        return scores, rows

    def exactly(self, queries: Vectors, depth: int, allowed: AllowedRows) -> Found:
        return self.parts.flat.exactly(queries, depth, allowed)

    def exact_cost(self, allowed: AllowedRows, num_queries: int) -> float:
        return self.parts.flat.exact_cost(allowed, num_queries)

    def widely(self, queries: Vectors, depth: int, allowed: AllowedRows, reach: int) -> tuple[Found, Mask]:
        width = self._width(depth, reach)
        walk = import_faiss().SearchParametersHNSW(efSearch=width)
        candidates = np.empty((len(queries), _HNSW_RESCORED * depth), np.int64)
        sure = np.empty(len(queries), np.bool_)
        copies = self.parts.copies
        for block in _blocks(len(queries), _RANKED_AT_ONCE // width):
            _, ranking = self.parts.walked.search(queries[block], width, params=walk)
            if copies is not None:
                ranking = copies.expanded(ranking, width)
            candidates[block], places = _first_allowed(ranking, allowed, candidates.shape[1])
            sure[block] = places[:, depth - 1] < reach
        return _rescored(self.parts.flat.vectors, queries, candidates, depth), sure

    def width_cost(self, depth: int, allowed: AllowedRows, reach: int) -> float:
        return _GRAPH_ROUNDS * self._width(depth, reach) * self.parts.edges * _EDGE_COST

    def _add_copies(self, queries: Vectors, copies: Copies, scores: Vectors, rows: NDArray[np.int64]) -> None:
        """Let the copies of hits be hits too, in place."""
        places = np.searchsorted(copies.originals, rows)
        copied = copies.originals[np.minimum(places, len(copies.originals) - 1)] == rows
        lines = np.flatnonzero(copied.any(axis=1))
        if len(lines):
            depth = rows.shape[1]
            candidates = copies.expanded(rows[lines], _HNSW_RESCORED * depth)
            scores[lines], rows[lines] = _rescored(self.parts.flat.vectors, queries[lines], candidates, depth)

    def _width(self, depth: int, reach: int) -> int:
        return min(math.ceil(reach * max(self.ef_search, depth) / depth), self.parts.total)


@dataclass(frozen=True)
class _Lists:
    index: Any
    nprobe: int
    k_factor: int
    filtered_k_factor: int
    exact: NDArray[Any] | None
    gpu: GpuIndex | None = None

    def search(self, queries: Vectors, depth: int) -> Found:
        probes = self.nprobe
        scores, rows = self._read(queries, depth, probes, None)
        short = np.flatnonzero((rows < 0).any(axis=1))
        # At nlist every list is read and every row is found.
        while len(short) and probes < self.index.nlist:
            probes = min(probes * _WIDENING, self.index.nlist)
            scores[short], rows[short] = self._read(queries[short], depth, probes, None)
            short = short[(rows[short] < 0).any(axis=1)]
        return scores, rows

    def exactly(self, queries: Vectors, depth: int, allowed: AllowedRows) -> Found:
        if self.exact is not None:
            return _score_rows(self.exact, queries, allowed.rows, depth)
        return self._read(queries, depth, self.index.nlist, allowed)

    def exact_cost(self, allowed: AllowedRows, num_queries: int) -> float:
        if self.exact is not None:
            return _scoring_cost(allowed, num_queries)
        return self.index.nlist * (1 + self._list_cost(allowed))

    def widely(self, queries: Vectors, depth: int, allowed: AllowedRows, reach: int) -> tuple[Found, Mask]:
        probes = self._probes(depth, reach)
        if probes == self.index.nlist:
            return self._read(queries, depth, probes, allowed), np.ones(len(queries), np.bool_)
        if reach <= _NEAR * depth:
            scores, ranking = self._read(queries, reach, probes, None)
            rows, places = _first_allowed(ranking, allowed, depth)
            sure = places[:, -1] < reach
            return (np.take_along_axis(scores, np.minimum(places, reach - 1), 1), rows), sure
        scores = np.empty((len(queries), depth), np.float32)
        rows = np.empty((len(queries), depth), np.int64)
        sure = np.empty(len(queries), np.bool_)
        for block in _blocks(len(queries), _RANKED_AT_ONCE // probes):
            (scores[block], rows[block]), strays = self._read_apart(queries[block], depth, probes, allowed)
            sure[block] = (rows[block] >= 0).all(axis=1) & (strays <= depth // _STRAY_HITS)
        return (scores, rows), sure

    def width_cost(self, depth: int, allowed: AllowedRows, reach: int) -> float:
        rescored = 0 if self.exact is None else 2 * self._candidates(depth, allowed) * _CANDIDATE_COST
        lists = self.index.nlist + self._probes(depth, reach) * self._list_cost(allowed)
        return _LISTS_ROUNDS * (lists + rescored)

    def _probes(self, depth: int, reach: int) -> int:
        # A fourth of fewer than four lists is none.
        least = 1 if reach <= _NEAR * depth else _WIDENING
        return min(max(math.ceil(self.nprobe * reach / depth), least), self.index.nlist)

    def _list_cost(self, allowed: AllowedRows) -> float:
        return (len(allowed.mask) * _BIT_COST + allowed.count * _CODE_COST) / self.index.nlist

    def _read(self, queries: Vectors, depth: int, probes: int, allowed: AllowedRows | None) -> Found:
        """The best of the nearest `probes` lists; -1 where they hold too few rows that are allowed."""
        params = _selecting(import_faiss().SearchParametersIVF, allowed, nprobe=probes)
        candidates = self._candidates(depth, allowed)
        gpu = None if allowed is not None or self.gpu is None else self.gpu
        if gpu is not None and not gpu.reaches(candidates, probes):
            gpu = None
        scores, rows = (gpu or self.index).search(queries, candidates, params=params)
        return (scores, rows) if self.exact is None else _rescored(self.exact, queries, rows, depth)

    def _read_apart(
        self, queries: Vectors, depth: int, probes: int, allowed: AllowedRows
    ) -> tuple[Found, NDArray[np.int64]]:
        """As _read; and how many hits (Q,) are not from the nearest fourth of the lists."""
        near = probes // _WIDENING
        similarities, lists = self.index.quantizer.search(queries, probes)
        halves = [
            self._read_lists(queries, depth, similarities[:, part], lists[:, part], allowed)
            for part in (slice(0, near), slice(near, probes))
        ]
        scores = np.concatenate([found[0] for found in halves], axis=1)
        rows = np.concatenate([found[1] for found in halves], axis=1)
        order = np.argsort(-scores, axis=1, kind="stable")[:, :depth]
        found = np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)
        return found, (order >= depth).sum(axis=1)

    def _read_lists(
        self,
        queries: Vectors,
        depth: int,
        similarities: Vectors,
        lists: NDArray[np.int64],
        allowed: AllowedRows,
    ) -> Found:
        """The best rows of given lists (Q, lists) with the similarity of each to its query; -1 where there are few."""
        faiss = import_faiss()
        similarities, lists = np.ascontiguousarray(similarities), np.ascontiguousarray(lists)
        params = _selecting(faiss.SearchParametersIVF, allowed, nprobe=lists.shape[1])
        shape = (len(queries), self._candidates(depth, allowed))
        scores, rows = np.empty(shape, np.float32), np.empty(shape, np.int64)
        arrays = [faiss.swig_ptr(array) for array in (lists, similarities, scores, rows)]
        # The wrapper without the suffix takes no parameters.
        self.index.search_preassigned_c(
            len(queries), faiss.swig_ptr(queries), shape[1], *arrays, False, params
        )
        return (scores, rows) if self.exact is None else _rescored(self.exact, queries, rows, depth)

    def _candidates(self, depth: int, allowed: AllowedRows | None) -> int:
        if self.exact is None:
            return depth
        if allowed is None:
            return min(depth * self.k_factor, len(self.exact))
        return min(depth * self.filtered_k_factor, allowed.count)


def _selecting(parameters: Any, allowed: AllowedRows | None, **values: int) -> Any:
    """Search parameters of a FAISS class that keep to the allowed rows.

    They hold the selector, and the selector the bits that it points to.
    """
    if allowed is None:
        return parameters(**values)
    return parameters(sel=import_faiss().IDSelectorBitmap(allowed.bits), **values)


def _scoring_cost(allowed: AllowedRows, num_queries: int) -> float:
    """Of _score_rows, a query."""
    return allowed.count * (1 + _COPY_COST / num_queries)


# Exact scores


def _score_rows(vectors: NDArray[Any], queries: Vectors, rows: NDArray[np.int64], depth: int) -> Found:
    """The best `depth` of these rows by exact scores, a block of them at a time; depth <= len(rows)."""
    faiss = import_faiss()
    vectors = np.asarray(vectors)  # indexing a memmap goes through its slow subclass
    best_scores = np.empty((len(queries), 0), np.float32)
    best_rows = np.empty((len(queries), 0), np.int64)
    size = min(max(_BLOCK_BYTES // (4 * vectors.shape[1]), 16 * depth), len(rows))
    copied = np.empty((size, vectors.shape[1]), vectors.dtype)  # filled anew by each block
    for block in _blocks(len(rows), size):
        taken = np.take(vectors, rows[block], axis=0, out=copied[: len(rows[block])], mode="clip")
        taken = taken.astype(np.float32, copy=False)
        scores, places = faiss.knn(queries, taken, min(depth, len(taken)), faiss.METRIC_INNER_PRODUCT)
        best_scores = np.concatenate([best_scores, scores], axis=1)
        best_rows = np.concatenate([best_rows, rows[block][places]], axis=1)
        best_scores, best_rows = _best(best_scores, best_rows, depth)
    return best_scores, best_rows


def _rescored(vectors: NDArray[Any], queries: Vectors, candidates: NDArray[np.int64], depth: int) -> Found:
    """The best `depth` of each query's candidates (Q, C) by exact scores; -1 is no candidate."""
    vectors = np.asarray(vectors)
    scores = np.empty(candidates.shape, np.float32)
    for block in _blocks(len(queries), _BLOCK_BYTES // (4 * vectors.shape[1] * candidates.shape[1])):
        taken = vectors[np.maximum(candidates[block], 0)].astype(np.float32, copy=False)  # (Q, C, D)
        scores[block] = np.matmul(taken, queries[block, :, None])[:, :, 0]
    scores[candidates < 0] = -np.inf
    return _best(scores, candidates, depth)


def _best(scores: Vectors, rows: NDArray[np.int64], depth: int) -> Found:
    """The best `depth` columns of each line, in order; padded with -1 where there are fewer."""
    order = np.argsort(-scores, axis=1, kind="stable")[:, :depth]
    return np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)


def _first_allowed(
    ranking: NDArray[np.int64], allowed: AllowedRows, num: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The first `num` allowed rows of each line of a ranking (Q, R), and their places in it.

    Both are (Q, num), ending in row -1 and place R where there are fewer. A ranking may hold -1 too.
    """
    is_allowed = allowed.mask[ranking] & (ranking >= 0)
    ordinals = np.cumsum(is_allowed, axis=1, dtype=np.int32)
    lines, places = np.nonzero(is_allowed & (ordinals <= num))
    found_rows = np.full((len(ranking), num), -1, np.int64)
    found_places = np.full((len(ranking), num), ranking.shape[1], np.int64)
    columns = ordinals[lines, places] - 1
    found_rows[lines, columns] = ranking[lines, places]
    found_places[lines, columns] = places
    return found_rows, found_places


def _blocks(total: int, size: int) -> Iterator[slice]:
    for start in range(0, total, max(size, 1)):
        yield slice(start, start + max(size, 1))
