"""Planning an index: numbers in, plan out. No I/O, no FAISS."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from raytower.errors import InputError
from raytower.index.config import IndexKind

_FLAT_ROWS = 20_000
_ROWS_PER_SHARD = 5_000_000
_HNSW_M = 32
_HNSW_EF_CONSTRUCTION = 100
_MIN_ROWS_PER_LIST = 39
_TRAIN_ROWS_PER_LIST = 64
_MAX_TRAIN_ROWS = 1_000_000
_MAX_NLIST = 65_536
_ID_BYTES = 8
_BATCH_ROWS = 65_536


@dataclass(frozen=True, kw_only=True)
class IndexPlan:
    """What a build will do. `ranges` are half-open row ranges over the embeddings' rows in file order."""

    kind: IndexKind
    reason: str
    rows: int
    dim: int
    ranges: tuple[tuple[int, int], ...]
    parameters: dict[str, int]
    train_rows: int
    predicted_build_memory_bytes_per_task: int
    predicted_disk_bytes: int
    predicted_search_memory_bytes: int

    @property
    def shards(self) -> int:
        return len(self.ranges)


def plan_index(
    *,
    rows: int,
    dim: int,
    kind: IndexKind,
    shards: int | str,
    memory_bytes: int,
    num_workers: int,
    text_bytes: int = 0,
) -> IndexPlan:
    """Choose kind, shards and parameters, and predict memory and disk.

    `memory_bytes` is what all shards together may take when searched.

    Raises:
        InputError: no rows, more shards than rows, or a kind that does not fit the memory (naming one that would).
    """
    if rows < 1:
        raise InputError("the embeddings hold no rows; there is nothing to index")
    num_shards = _choose_shards(rows, shards, num_workers)
    chosen, reason = _choose_kind(rows, dim, kind, memory_bytes, num_shards)
    ranges = split_rows(rows, num_shards)
    shard_rows = max(end - start for start, end in ranges)
    parameters = _parameters(chosen, dim, rows, num_shards)
    per_row = row_bytes(chosen, dim, parameters)
    total = rows * per_row + num_shards * _centroid_bytes(parameters, dim)
    return IndexPlan(
        kind=chosen,
        reason=reason,
        rows=rows,
        dim=dim,
        ranges=ranges,
        parameters=parameters,
        train_rows=_train_rows(parameters, rows),
        predicted_build_memory_bytes_per_task=shard_rows * per_row + _BATCH_ROWS * dim * 4 * 2,
        predicted_disk_bytes=total + text_bytes,
        predicted_search_memory_bytes=total,
    )


def split_rows(rows: int, shards: int) -> tuple[tuple[int, int], ...]:
    """Contiguous ranges, none empty, sizes differing by at most one."""
    bounds = [rows * number // shards for number in range(shards + 1)]
    return tuple(pairwise(bounds))


def row_bytes(kind: IndexKind, dim: int, parameters: dict[str, int]) -> int:
    """Bytes of one row in an index file of this kind."""
    if kind == "flat":
        return dim * 4
    if kind == "hnsw":
        # Level 0 has 2·M links; upper levels add about M links for one row in M.
        return dim * 4 + (2 * parameters["M"] + 1) * 4 + 8 + 4
    if kind == "ivf_pq":
        return parameters["pq_m"] * parameters["nbits"] // 8 + _ID_BYTES
    return (dim if kind == "ivf_sq8" else dim * 4) + _ID_BYTES


def _choose_shards(rows: int, shards: int | str, num_workers: int) -> int:
    if shards == "auto":
        by_size = -(-rows // _ROWS_PER_SHARD)
        return max(by_size, 1 if rows <= _FLAT_ROWS * 5 else min(num_workers, rows))
    if not isinstance(shards, int) or shards < 1:
        raise InputError(f"shards is {shards!r}; it must be 'auto' or a number of 1 or more")
    if shards > rows:
        raise InputError(f"shards is {shards}, more than the {rows} rows; a shard holds at least one row")
    return shards


def _choose_kind(rows: int, dim: int, kind: IndexKind, memory: int, num_shards: int) -> tuple[IndexKind, str]:
    sizes = {name: rows * row_bytes(name, dim, _parameters(name, dim, rows, num_shards)) for name in _LADDER}
    if kind != "auto":
        if sizes[kind] > memory:
            fitting = [name for name in _LADDER if sizes[name] <= memory]
            remedy = f"kind {fitting[0]} would fit" if fitting else "raise target.memory"
            raise InputError(
                f"kind {kind} over {rows} rows of {dim} takes {sizes[kind]:,} bytes when searched, more than "
                f"target.memory {memory:,}; {remedy}"
            )
        return kind, f"kind {kind} was asked for"
    if rows <= _FLAT_ROWS and sizes["flat"] <= memory:
        return "flat", f"{rows} rows are few enough to search exactly"
    for name in ("hnsw", "ivf_sq8", "ivf_pq"):
        if sizes[name] <= memory:
            return (
                name,
                f"{name} takes {sizes[name]:,} bytes, the fastest kind within target.memory {memory:,}",
            )
    raise InputError(
        f"{rows} rows of {dim} take {sizes['ivf_pq']:,} bytes even as ivf_pq, more than target.memory {memory:,}; "
        "raise target.memory or reduce the dimension"
    )


_LADDER: tuple[IndexKind, ...] = ("flat", "hnsw", "ivf_flat", "ivf_sq8", "ivf_pq")


def _parameters(kind: IndexKind, dim: int, rows: int, num_shards: int) -> dict[str, int]:
    if kind == "flat":
        return {}
    if kind == "hnsw":
        return {"M": _HNSW_M, "efConstruction": _HNSW_EF_CONSTRUCTION}
    per_shard = max(rows // num_shards, 1)
    nlist = max(min(int(4 * per_shard**0.5), per_shard // _MIN_ROWS_PER_LIST, _MAX_NLIST), 1)
    if kind != "ivf_pq":
        return {"nlist": nlist}
    pq_m = next(size for size in (dim // 4, dim // 8, dim // 2, 1) if size >= 1 and dim % size == 0)
    return {"nlist": nlist, "pq_m": pq_m, "nbits": 8 if rows >= 10_000 else 4}


def _train_rows(parameters: dict[str, int], rows: int) -> int:
    if "nlist" not in parameters:
        return 0
    return min(rows, max(parameters["nlist"] * _TRAIN_ROWS_PER_LIST, 10_000), _MAX_TRAIN_ROWS)


def _centroid_bytes(parameters: dict[str, int], dim: int) -> int:
    return parameters.get("nlist", 0) * dim * 4
