"""What each index kind is in FAISS: how it is made, trained and asked. Every kind scores by inner product.

`hnsw` walks its graph over 8-bit codes and scores what it finds with the full vectors beside them: the walk reads a
quarter of the memory, which more than pays for searching several smaller graphs, and scores stay exact.

Where only some rows are allowed, by a filter or because others are deleted, the way is chosen by what it costs:

    few are allowed     Score each of them exactly. This finds every hit there is.
    many are            Rank all rows, as without a filter but deeper: where the filter has nothing to do with the
                        vectors, the first R rows of the ranking hold k allowed ones, R being k over the share of rows
                        allowed, with a margin for chance. FAISS is asked R/k times as wide as without a filter: what
                        finds the first k of a ranking with some recall finds the first R with about that recall when
                        it is so much wider.
    many, but elsewhere A query whose first R rows hold fewer than k allowed ones lies where rows are seldom allowed:
                        the filter goes by what the vectors tell too. It is asked again with a deeper ranking, and
                        exactly once that is cheaper.

So recall does not fall below that of a search without a filter, and k hits come back whenever k rows are allowed. A
search of the graph or of a few lists with faiss.IDSelectorBitmap alone promises neither: it answers with rows that it
met on its way, allowed and far from the query, while nearer ones are never visited.

Shape legend: Q queries, D dimension, K hits a query, C candidates a query, R rows of a ranking.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from raytower.errors import InputError
from raytower.index.allowed import AllowedRows
from raytower.index.config import BuiltKind
from raytower.index.faiss_import import import_faiss

Vectors = NDArray[np.float32]
Found = tuple[Vectors, NDArray[np.int64]]  # scores and rows, each (Q, K)
# So many times k candidates of the 8-bit walk are scored exactly: enough that the codes cost no measurable recall.
_HNSW_RESCORED = 2
# The same for the codes of the lists, where the vectors are stored; product quantisation may need more of them.
_K_FACTORS: dict[BuiltKind, tuple[int, ...]] = {"ivf_flat": (1,), "ivf_sq8": (4,), "ivf_pq": (4, 16, 64)}
# Vectors copied out at once to be scored: small enough to be scored from the processor's cache.
_BLOCK_BYTES = 2 * 2**20
_RANKED_AT_ONCE = 2**22
_WALK_COST = 40.0
_BIT_COST = 0.1
_CODE_COST = 0.5
_WIDENING = 4
SEARCH_PARAMETER: dict[BuiltKind, str] = {
    "hnsw": "efSearch",
    "ivf_flat": "nprobe",
    "ivf_sq8": "nprobe",
    "ivf_pq": "nprobe",
}


def new_index(kind: BuiltKind, dim: int, parameters: Mapping[str, int]) -> Any:
    """An empty FAISS index, untrained where its kind trains."""
    faiss = import_faiss()
    if kind == "flat":
        return faiss.IndexFlatIP(dim)
    if kind == "hnsw":
        index = faiss.index_factory(dim, f"HNSW{parameters['M']}_SQ8,RFlat", faiss.METRIC_INNER_PRODUCT)
        faiss.downcast_index(index.base_index).hnsw.efConstruction = parameters["efConstruction"]
        return index
    if kind == "ivf_pq":
        code = f"PQ{parameters['pq_m']}x{parameters['nbits']}"
    else:
        code = {"ivf_flat": "Flat", "ivf_sq8": "SQ8"}[kind]
    return faiss.index_factory(dim, f"IVF{parameters['nlist']},{code}", faiss.METRIC_INNER_PRODUCT)


def parameter_grid(
    kind: BuiltKind, parameters: Mapping[str, int], rows: int, k: int, *, rescored: bool = False
) -> list[dict[str, int]]:
    """Search parameters from the cheapest up; one empty setting for a kind that has none.

    Where candidates are rescored with stored vectors, the whole range of nprobe comes with the smallest k_factor, then
    again with each larger one. FAISS never walks with an efSearch below the number of hits asked, so smaller values
    would measure the same.
    """
    if kind == "flat":
        return [{}]
    low, high = (k + 1, max(min(rows, 1024), 8 * k)) if kind == "hnsw" else (1, parameters["nlist"])
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
) -> Found:
    """Scores and rows, each (Q, min(k, rows that are allowed)), best first and without FAISS's -1 padding.

    A query whose lists or graph hold too few rows is asked again more widely until it has all it should.

    Args:
        allowed: the rows that may be hits; all without it.
        exact: the stored vectors (rows, D), float32 or float16, of an index of lists. The best `k_factor` times k rows
            by their codes are then scored with these vectors, and so are few allowed rows. Other kinds hold theirs.

    Safe for concurrent calls on one index.
    """
    total = int(index.ntotal)
    if allowed is not None and len(allowed.mask) != total:
        raise ValueError(f"the mask of allowed rows has {len(allowed.mask)} rows, the index has {total}")
    if exact is not None and exact.shape != (total, index.d):
        raise ValueError(f"the stored vectors have shape {exact.shape}, the index has {(total, index.d)}")
    count = total if allowed is None else allowed.count
    depth = min(k, count)
    if depth == 0 or len(queries) == 0:
        shape = (len(queries), depth)
        return np.empty(shape, np.float32), np.empty(shape, np.int64)
    way = _way(kind, index, parameters, exact)
    if allowed is None or count == total:
        return way.search(queries, depth)
    return _search_allowed(way, queries, depth, allowed)


def _search_allowed(way: _Way, queries: Vectors, depth: int, allowed: AllowedRows) -> Found:
    scores = np.empty((len(queries), depth), np.float32)
    rows = np.empty((len(queries), depth), np.int64)
    pending = np.arange(len(queries))
    reach = _first_reach(depth, allowed)
    while len(pending) and way.prefers_ranking(depth, allowed, reach):
        (scores[pending], rows[pending]), reached = way.ranked(queries[pending], depth, allowed, reach)
        pending = pending[~reached]
        reach *= _WIDENING
    if len(pending):
        scores[pending], rows[pending] = way.exactly(queries[pending], depth, allowed)
    return scores, rows


def _first_reach(depth: int, allowed: AllowedRows) -> int:
    """How far down a ranking the depth-th allowed row stands, by chance at most: its mean and two standard deviations.

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

    def prefers_ranking(self, depth: int, allowed: AllowedRows, reach: int) -> bool:
        """Whether `ranked` costs less than `exactly`."""

    def ranked(
        self, queries: Vectors, depth: int, allowed: AllowedRows, reach: int
    ) -> tuple[Found, NDArray[np.bool_]]:
        """Among the allowed rows, by a ranking of all; and which queries have depth allowed rows in its first `reach`.

        The answer to another query is not to be used.
        """


def _way(kind: BuiltKind, index: Any, parameters: Mapping[str, int], exact: NDArray[Any] | None) -> _Way:
    if kind == "flat":
        return _Flat(index)
    if kind == "hnsw":
        return _Graph(index, parameters["efSearch"])
    return _Lists(index, parameters["nprobe"], parameters.get("k_factor", _K_FACTORS[kind][0]), exact)


@dataclass(frozen=True)
class _Flat:
    index: Any

    def search(self, queries: Vectors, depth: int) -> Found:
        return self.index.search(queries, depth)

    def exactly(self, queries: Vectors, depth: int, allowed: AllowedRows) -> Found:
        return _score_rows(_flat_vectors(self.index), queries, allowed.rows, depth)

    def prefers_ranking(self, depth: int, allowed: AllowedRows, reach: int) -> bool:
        return False

    def ranked(
        self, queries: Vectors, depth: int, allowed: AllowedRows, reach: int
    ) -> tuple[Found, NDArray[np.bool_]]:
        return self.exactly(queries, depth, allowed), np.ones(len(queries), np.bool_)


@dataclass(frozen=True)
class _Graph:
    index: Any
    ef_search: int

    def search(self, queries: Vectors, depth: int) -> Found:
        faiss = import_faiss()
        width = max(self.ef_search, depth)
        candidates = min(width, _HNSW_RESCORED * depth, int(self.index.ntotal))
        # FAISS truncates depth * k_factor to a whole number, in 32-bit floats.
        rescore = faiss.IndexRefineSearchParameters(
            k_factor=(candidates + 0.5) / depth,
            base_index_params=faiss.SearchParametersHNSW(efSearch=width),
        )
        scores, rows = self.index.search(queries, depth, params=rescore)
        short = np.flatnonzero((rows < 0).any(axis=1))
        if len(short):
            # Rows that no walk reaches are found by scoring every full vector.
            scores[short], rows[short] = faiss.downcast_index(self.index.refine_index).search(
                queries[short], depth
            )
        return scores, rows

    def exactly(self, queries: Vectors, depth: int, allowed: AllowedRows) -> Found:
        return _score_rows(self._vectors(), queries, allowed.rows, depth)

    def prefers_ranking(self, depth: int, allowed: AllowedRows, reach: int) -> bool:
        return _WALK_COST * self._width(depth, reach) < allowed.count

    def ranked(
        self, queries: Vectors, depth: int, allowed: AllowedRows, reach: int
    ) -> tuple[Found, NDArray[np.bool_]]:
        faiss = import_faiss()
        graph = faiss.downcast_index(self.index.base_index)
        width = self._width(depth, reach)
        walk = faiss.SearchParametersHNSW(efSearch=width)
        candidates = np.empty((len(queries), _HNSW_RESCORED * depth), np.int64)
        reached = np.empty(len(queries), np.bool_)
        for block in _blocks(len(queries), _RANKED_AT_ONCE // width):
            _, ranking = graph.search(queries[block], width, params=walk)
            candidates[block], places = _first_allowed(ranking, allowed, candidates.shape[1])
            reached[block] = places[:, depth - 1] < reach
        return _rescored(self._vectors(), queries, candidates, depth), reached

    def _width(self, depth: int, reach: int) -> int:
        return min(math.ceil(reach * max(self.ef_search, depth) / depth), int(self.index.ntotal))

    def _vectors(self) -> Vectors:
        return _flat_vectors(import_faiss().downcast_index(self.index.refine_index))


@dataclass(frozen=True)
class _Lists:
    index: Any
    nprobe: int
    k_factor: int
    exact: NDArray[Any] | None

    def search(self, queries: Vectors, depth: int) -> Found:
        probes = self.nprobe
        scores, rows = self._probe(queries, depth, probes, None)
        short = np.flatnonzero((rows < 0).any(axis=1))
        # At nlist every list is read and every row is found.
        while len(short) and probes < self.index.nlist:
            probes = min(probes * _WIDENING, self.index.nlist)
            scores[short], rows[short] = self._probe(queries[short], depth, probes, None)
            short = short[(rows[short] < 0).any(axis=1)]
        return scores, rows

    def exactly(self, queries: Vectors, depth: int, allowed: AllowedRows) -> Found:
        if self.exact is not None:
            return _score_rows(self.exact, queries, allowed.rows, depth)
        return self._probe(queries, depth, self.index.nlist, allowed)

    def prefers_ranking(self, depth: int, allowed: AllowedRows, reach: int) -> bool:
        total, nlist = len(allowed.mask), self.index.nlist
        share = allowed.count / total
        a_list = total / nlist * (_BIT_COST + share * _CODE_COST)
        exact = nlist * a_list if self.exact is None else allowed.count
        return nlist * _CODE_COST + self._probes(depth, reach) * a_list < exact

    def ranked(
        self, queries: Vectors, depth: int, allowed: AllowedRows, reach: int
    ) -> tuple[Found, NDArray[np.bool_]]:
        probes = self._probes(depth, reach)
        # Lists with twice as many rows as the ranking is deep.
        near = min(probes, max(self.nprobe, math.ceil(2 * reach * self.index.nlist / len(allowed.mask))))
        reached = np.empty(len(queries), np.bool_)
        params = import_faiss().SearchParametersIVF(nprobe=near)
        for block in _blocks(len(queries), _RANKED_AT_ONCE // reach):
            _, ranking = self.index.search(queries[block], reach, params=params)
            reached[block] = (allowed.mask[ranking] & (ranking >= 0)).sum(axis=1) >= depth
        scores = np.empty((len(queries), depth), np.float32)
        rows = np.empty((len(queries), depth), np.int64)
        scores[reached], rows[reached] = self._probe(queries[reached], depth, probes, allowed)
        reached[reached] = (rows[reached] >= 0).all(axis=1)
        return (scores, rows), reached

    def _probes(self, depth: int, reach: int) -> int:
        return min(math.ceil(self.nprobe * reach / depth), self.index.nlist)

    def _probe(self, queries: Vectors, depth: int, probes: int, allowed: AllowedRows | None) -> Found:
        """The best of the first `probes` lists; -1 where they hold too few rows that are allowed."""
        faiss = import_faiss()
        # The parameters keep the selector alive, and the selector the bits that it points to.
        selector = None if allowed is None else faiss.IDSelectorBitmap(allowed.bits)
        params = faiss.SearchParametersIVF(nprobe=probes, sel=selector)
        if self.exact is None:
            return self.index.search(queries, depth, params=params)
        count = len(self.exact) if allowed is None else allowed.count
        _, candidates = self.index.search(queries, min(depth * self.k_factor, count), params=params)
        return _rescored(self.exact, queries, candidates, depth)


# Exact scores


def _flat_vectors(index: Any) -> Vectors:
    """The vectors (rows, D) of a flat index, where they lie. The index must outlive them."""
    view = import_faiss().rev_swig_ptr(index.get_xb(), index.ntotal * index.d)
    return view.reshape(index.ntotal, index.d)


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
