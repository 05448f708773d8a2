"""Reading whole vectors back out of an index file, for kinds that keep them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from raytower.index.config import BuiltKind
from raytower.index.faiss_import import import_faiss

WHOLE_VECTOR_KINDS: frozenset[BuiltKind] = frozenset({"flat", "hnsw", "ivf_flat"})


def stored_vectors(kind: BuiltKind, index: Any, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    """Vectors (len(rows), D) of some rows of an index of a kind in `WHOLE_VECTOR_KINDS`. Not for concurrent use."""
    faiss = import_faiss()
    if kind == "hnsw":
        index = faiss.downcast_index(index.refine_index)
    elif kind == "ivf_flat":
        # Where each row stands in its list: 8 bytes a row, made at the first call.
        index.make_direct_map()
    vectors: NDArray[np.float32] = index.reconstruct_batch(rows)
    return vectors
