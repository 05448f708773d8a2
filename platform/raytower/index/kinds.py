"""What each index kind is in FAISS: how it is made, trained and asked. Every kind scores by inner product.

`hnsw` walks its graph over 8-bit codes and scores what it finds with the full vectors beside them: the walk reads a
quarter of the memory, which more than pays for searching several smaller graphs, and scores stay exact.

Shape legend: Q queries, D dimension, K hits a query.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raytower.errors import InputError
from raytower.index.config import BuiltKind
from raytower.index.faiss_import import import_faiss

Vectors = NDArray[np.float32]
# So many times k candidates of the 8-bit walk are scored exactly: enough that the codes cost no measurable recall.
_HNSW_RESCORED = 2
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


def parameter_grid(kind: BuiltKind, parameters: Mapping[str, int], rows: int, k: int) -> list[dict[str, int]]:
    """Search parameters from the cheapest up; one empty setting for a kind that has none.

    FAISS never walks with an efSearch below the number of hits asked, so smaller values would measure the same.
    """
    if kind == "flat":
        return [{}]
    low, high = (k + 1, max(min(rows, 1024), 8 * k)) if kind == "hnsw" else (1, parameters["nlist"])
    values, value = [], low
    while value < high:
        values.append(value)
        value = max(value + 1, value * 5 // 4)
    return [{SEARCH_PARAMETER[kind]: item} for item in [*values, high]]


def check_parameters(kind: BuiltKind, given: Mapping[str, int]) -> None:
    """Raises InputError for a search parameter that this kind does not have, or one below 1."""
    known = SEARCH_PARAMETER.get(kind)
    for name, value in given.items():
        if name != known:
            has = f"its parameter is {known!r}" if known else "it has none"
            raise InputError(f"an index of kind {kind} has no search parameter {name!r}; {has}")
        if value < 1:
            raise InputError(f"search parameter {name} is {value}; it must be 1 or more")


def search_index(
    kind: BuiltKind, index: Any, queries: Vectors, k: int, parameters: Mapping[str, int]
) -> tuple[Vectors, NDArray[np.int64]]:
    """Scores and rows, each (Q, min(k, rows)), best first and without FAISS's -1 padding.

    A query whose lists or graph hold too few rows is asked again more widely until it has all it should.
    """
    depth = min(k, int(index.ntotal))
    scores, rows = _search(kind, index, queries, depth, parameters)
    short = np.flatnonzero((rows < 0).any(axis=1))
    if len(short) and kind == "hnsw":
        # Rows that no walk reaches are found by scoring every full vector.
        exact = import_faiss().downcast_index(index.refine_index)
        scores[short], rows[short] = exact.search(queries[short], depth)
    nprobe = parameters.get("nprobe", 0)
    # At nlist every list is read and every row is found.
    while kind != "hnsw" and len(short) and nprobe < index.nlist:
        nprobe = min(nprobe * _WIDENING, index.nlist)
        scores[short], rows[short] = _search(kind, index, queries[short], depth, {"nprobe": nprobe})
        short = short[(rows[short] < 0).any(axis=1)]
    return scores, rows


def _search(
    kind: BuiltKind, index: Any, queries: Vectors, depth: int, parameters: Mapping[str, int]
) -> tuple[Vectors, NDArray[np.int64]]:
    faiss = import_faiss()
    if kind == "flat":
        return index.search(queries, depth)
    if kind != "hnsw":
        return index.search(queries, depth, params=faiss.SearchParametersIVF(nprobe=parameters["nprobe"]))
    width = max(parameters["efSearch"], depth)
    candidates = min(width, _HNSW_RESCORED * depth, int(index.ntotal))
    walk = faiss.SearchParametersHNSW(efSearch=width)
    # FAISS truncates depth * k_factor to a whole number, in 32-bit floats.
    rescore = faiss.IndexRefineSearchParameters(k_factor=(candidates + 0.5) / depth, base_index_params=walk)
    return index.search(queries, depth, params=rescore)
