"""Exact search over the vectors of the table, in one pass, for measuring what the shards lose.

Shape legend: Q queries, D dimension, K hits a query.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from raytower.errors import InputError
from raytower.index.hits import Hits, empty_hits, merge_hits
from raytower.index.reader import Index, prepare_queries
from raytower.index.table import ROW, VECTOR

# Rows that are scored together: 16 MiB of 256 dimensions.
_ROWS_AT_ONCE = 16_384


def search_exact(index: Index, vectors: NDArray[Any], k: int) -> Hits:
    """The best min(k, rows) hits of each query vector (Q, D), by exact scores over the stored vectors.

    Memory holds the queries, their best hits so far, and a block of rows, however large the index is. The time is that
    of Q · rows inner products.

    Raises:
        InputError: as `Index.search`.
    """
    import faiss

    if k < 1:
        raise InputError(f"k is {k}; ask for at least 1 hit")
    prepared = prepare_queries(vectors, index.manifest)
    depth = min(k, index.num_rows)
    best = empty_hits(len(prepared), 0)
    for batch in index.batches([ROW, VECTOR]):
        numbers = batch.column(ROW).to_numpy()
        for start in range(0, len(numbers), _ROWS_AT_ONCE):
            rows = numbers[start : start + _ROWS_AT_ONCE]
            flat = batch.column(VECTOR).slice(start, len(rows)).flatten().to_numpy(zero_copy_only=False)
            block = np.ascontiguousarray(flat.reshape(len(rows), index.dim), dtype=np.float32)
            if index.manifest.metric == "cosine":
                block = block / np.linalg.norm(block, axis=1, keepdims=True)
            scores, places = faiss.knn(
                prepared, block, min(depth, len(rows)), metric=faiss.METRIC_INNER_PRODUCT
            )
            best = merge_hits([best, Hits(scores, rows[places].astype(np.int64))], depth)
    return best
