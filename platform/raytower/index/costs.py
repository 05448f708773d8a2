"""What an index costs: bytes on disk and in memory, seconds to build, milliseconds a query. Pure arithmetic.

Bytes follow from how FAISS lays an index out, plus what streaming a batch takes. Times follow from rates measured on
one core of a server CPU with AVX-512 (benchmarks/bench_plan.py prints both beside what is measured); another machine
is faster or slower by a factor, about the same for all kinds.

Shape legend: D dimension.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from raytower.index.config import BuiltKind

_ID_BYTES = 8
_FLOAT_BYTES = 4
_MIB = 2**20

# Rows that are streamed at once: few enough that what FAISS and Arrow make of them is small beside a shard, many enough
# for a matrix product.
BATCH_ROWS = 4_096
# A batch exists in Parquet's pages, decoded, as float32, normalised, in what FAISS makes of it, and in what the
# allocator has not given back of earlier ones.
_BATCH_COPIES = 9
# Arrow's readers, writers and buffers, whatever the dimension.
_STREAM_BYTES = 48 * _MIB
# FAISS assigns rows to lists by blocks of 4,096 x 1,024 products.
_ASSIGN_BYTES = 20 * _MIB
# Each list is an array that doubles as it grows; on average a third of it is room to grow.
_LIST_SLACK = 1.5
# Locks and marks of visited rows while a graph is built, and a digest of each code to find equal ones.
_GRAPH_WORK_BYTES = 5 + 130
# FAISS trains the codes on the residuals of so many rows; where the sample has more it copies these first.
_SCALAR_TRAIN_ROWS = 100_000
_TRAIN_ROWS_PER_CODE = 256

# Rounds of k-means that FAISS makes for lists and for codes.
_LIST_ROUNDS = 10
_CODE_ROUNDS = 25
# k-means over sub-vectors of a few dimensions is that much slower than encoding with them.
_CODE_TRAINING = 14
# Of one dimension, beside the search for the list.
_CODE_US: dict[BuiltKind, float] = {"ivf_flat": 0.002, "ivf_rabitq": 0.006, "ivf_sq8": 0.002}
_SCAN_BYTES_PER_MS = 24e6
_EF_SEARCH = 64
# Short Chinese questions, whose characters and pairs are many: benchmarks/bench_lexical.py. Words take less.
_LEXICAL_SHARE = 5.4
_NPROBE = 32


def bytes_per_row(kind: BuiltKind, dim: int, parameters: Mapping[str, int]) -> int:
    """Bytes of one row in an index file of this kind."""
    vector = dim * _FLOAT_BYTES
    if kind == "flat":
        return vector
    if kind == "hnsw":
        vector = dim * parameters.get("float_bits", 32) // 8
        # The graph runs over one byte a dimension; full vectors lie beside it for exact scores. Level 0 has 2·M
        # links of 4 bytes, upper levels M links for about one row in M; then an offset and a level number.
        return vector + dim + (2 * parameters["M"] + 1) * 4 + 8 + 4
    if kind == "ivf_pq":
        return -(-parameters["pq_m"] * parameters["nbits"] // 8) + _ID_BYTES
    if kind == "ivf_rabitq":
        return -(-dim // 8) + 2 * _FLOAT_BYTES + _ID_BYTES  # a bit a dimension, two correcting factors
    return (dim if kind == "ivf_sq8" else vector) + _ID_BYTES


def shard_bytes(kind: BuiltKind, rows: int, dim: int, parameters: Mapping[str, int]) -> int:
    """Bytes of the index file of a shard: what a search maps into memory."""
    lists = parameters.get("nlist", 0)
    tables = lists * (dim * _FLOAT_BYTES + _ID_BYTES)
    if kind in ("ivf_sq8", "hnsw"):
        tables += 2 * dim * _FLOAT_BYTES
    if kind == "ivf_pq":
        tables += dim * _FLOAT_BYTES << parameters["nbits"]
    return rows * bytes_per_row(kind, dim, parameters) + tables


def lexical_bytes(text_bytes: int) -> int:
    """Bytes on disk of the tokens of texts, the inverted index over them, and the documents that hold each token."""
    return int(text_bytes * _LEXICAL_SHARE)


def fill_bytes(kind: BuiltKind, rows: int, dim: int, parameters: Mapping[str, int]) -> int:
    """Memory that filling a shard adds to a worker process: the index, and the batches that stream into it."""
    index = shard_bytes(kind, rows, dim, parameters)
    if kind.startswith("ivf"):
        payload = rows * bytes_per_row(kind, dim, parameters)
        index += int((_LIST_SLACK - 1) * payload) + _assign_bytes(rows, parameters["nlist"])
    elif kind == "hnsw":
        index += rows * _GRAPH_WORK_BYTES
    return index + _stream_bytes(rows, dim)


def train_bytes(kind: BuiltKind, train_rows: int, dim: int, parameters: Mapping[str, int]) -> int:
    """Memory that training adds to a worker process: the sample, and what FAISS copies of it."""
    if not train_rows:
        return 0
    row = dim * _FLOAT_BYTES
    copied = 0
    if kind in ("ivf_sq8", "ivf_pq"):
        wanted = _SCALAR_TRAIN_ROWS if kind == "ivf_sq8" else _TRAIN_ROWS_PER_CODE << parameters["nbits"]
        copied = (2 if train_rows > wanted else 1) * min(train_rows, wanted) * row
    elif kind == "ivf_rabitq":
        copied = train_rows * row  # residuals of the whole sample
    centroids = 3 * parameters.get("nlist", 0) * row
    # The value ranges of 8-bit codes are taken from a transposed piece of the sample.
    work = _assign_bytes(train_rows, parameters["nlist"]) if "nlist" in parameters else train_rows * row // 4
    return train_rows * row + copied + centroids + work + _stream_bytes(train_rows, dim)


def _stream_bytes(rows: int, dim: int) -> int:
    row = dim * _FLOAT_BYTES
    return _BATCH_COPIES * min(rows, BATCH_ROWS) * row + min(_STREAM_BYTES, 8 * rows * row)


def _assign_bytes(rows: int, nlist: int) -> int:
    return min(_ASSIGN_BYTES, rows * nlist * _FLOAT_BYTES)


def fill_seconds(kind: BuiltKind, rows: int, dim: int, parameters: Mapping[str, int], threads: int) -> float:
    """Seconds of a task that reads a shard's rows, adds them and writes the files; only adding uses all threads."""
    return check_seconds(rows, dim) + rows * _add_us(kind, rows, dim, parameters) / threads / 1e6


def check_seconds(rows: int, dim: int) -> float:
    """Seconds that one core takes to read the embeddings once and prove checksums, ids and vectors."""
    return rows * (3.0 + 0.012 * dim) / 1e6


def train_seconds(kind: BuiltKind, train_rows: int, dim: int, parameters: Mapping[str, int]) -> float:
    """Seconds that one core takes to train centroids and codebooks."""
    seconds = check_seconds(train_rows, dim)
    if kind.startswith("ivf"):
        seconds += _LIST_ROUNDS * train_rows * _product_us(parameters["nlist"], dim) / 1e6
    if kind == "ivf_pq":
        rows = min(train_rows, _TRAIN_ROWS_PER_CODE << parameters["nbits"])
        seconds += _CODE_ROUNDS * rows * _CODE_TRAINING * _codes_us(parameters) / 1e6
    return seconds


def query_ms(kind: BuiltKind, rows: int, dim: int, parameters: Mapping[str, int]) -> float:
    """Milliseconds that one core takes for one query on a shard at about 0.95 of the exact hits.

    The search parameter is a guess until recall is measured: efSearch 64, or 32 lists.
    """
    if kind == "flat":
        return rows * dim * _FLOAT_BYTES / _SCAN_BYTES_PER_MS
    if kind == "hnsw":
        return _EF_SEARCH * (0.8 + 0.0066 * dim) * _depth(rows) / 1e3
    nlist = parameters["nlist"]
    scanned = rows * min(_NPROBE / nlist, 1.0)
    to_lists = nlist * dim * _FLOAT_BYTES / _SCAN_BYTES_PER_MS
    return to_lists + scanned * _score_us(kind, dim, parameters) / 1e3


def _add_us(kind: BuiltKind, rows: int, dim: int, parameters: Mapping[str, int]) -> float:
    if kind == "flat":
        return 0.0
    if kind == "hnsw":
        return (75 + 0.45 * dim) * _depth(rows) * parameters["efConstruction"] / 100
    codes = _codes_us(parameters) if kind == "ivf_pq" else _CODE_US[kind] * dim
    return _product_us(parameters["nlist"], dim) + codes


def _product_us(nlist: int, dim: int) -> float:
    # Inner products of one row with all centroids, as a matrix product over a batch.
    return nlist * dim * 2 / 84e3


def _codes_us(parameters: Mapping[str, int]) -> float:
    # Every sub-vector against all of its centroids.
    return parameters["pq_m"] * (1 << parameters["nbits"]) * 0.3e-3


def _score_us(kind: BuiltKind, dim: int, parameters: Mapping[str, int]) -> float:
    if kind == "ivf_flat":
        return dim * _FLOAT_BYTES / 18e3
    if kind == "ivf_rabitq":
        return 0.01 + dim / 60e3
    return dim / 8.5e3 if kind == "ivf_sq8" else parameters["pq_m"] / 2e3


def _depth(rows: int) -> float:
    # A walk grows with the logarithm of the rows; the rates are those of 2^15 rows.
    return math.log2(max(rows, 2)) / 15
