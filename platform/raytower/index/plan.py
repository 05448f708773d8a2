"""Planning an index: numbers in, plan out. No I/O, no FAISS."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from raytower.errors import InputError
from raytower.index import costs
from raytower.index.config import BuiltKind, ExactDtype, HnswConfig, IndexKind, IvfConfig

# A flat search of this many rows still takes well under a millisecond a query.
_FLAT_ROWS = 20_000
# Below this a second shard saves less building time than it costs at every search.
_MIN_ROWS_FOR_PARALLEL_SHARDS = 100_000
_ROWS_PER_SHARD = 5_000_000
_HNSW_M = 32
_HNSW_EF_CONSTRUCTION = 100
# FAISS asks for 39 training points a centroid and is content with more.
_MIN_ROWS_PER_CENTROID = 39
_TRAIN_ROWS_PER_CENTROID = 64
_MAX_NLIST = 16_384
_SCALAR_TRAIN_ROWS = 65_536
_MAX_TRAIN_ROWS = _MAX_NLIST * _TRAIN_ROWS_PER_CENTROID
_TRAIN_MEMORY_SHARE = 4
# Product codes alone seldom get past this against exact search.
_PQ_RECALL = 0.9
_DTYPE_BYTES = {"float16": 2, "float32": 4}
_KINDS: tuple[BuiltKind, ...] = ("flat", "hnsw", "ivf_flat", "ivf_rabitq", "ivf_sq8", "ivf_pq")
_PLANNED_HNSW, _PLANNED_IVF = HnswConfig(), IvfConfig()
# What `auto` may take, best first.
_AUTO_KINDS: tuple[BuiltKind, ...] = ("flat", "hnsw", "ivf_rabitq", "ivf_sq8", "ivf_pq")
_CODE_KINDS: frozenset[BuiltKind] = frozenset({"ivf_rabitq", "ivf_sq8", "ivf_pq"})


@dataclass(frozen=True, kw_only=True)
class _Request:
    rows: int
    dim: int
    kind: IndexKind
    shards: int | str
    recall: float
    memory_bytes: int
    latency_ms: float | None
    num_workers: int
    rescore: bool | Literal["auto"]
    vector_dtype: ExactDtype
    hnsw: HnswConfig
    ivf: IvfConfig


@dataclass(frozen=True, kw_only=True)
class IndexPlan:
    """What a build will do. `ranges` are half-open row ranges over the embeddings' rows in file order.

    `parameters`: hnsw has M and efConstruction, and float_bits where whole vectors are shorter than 32; ivf kinds have
    nlist; ivf_pq also pq_m (sub-vectors) and nbits.

    Predicted are the memory that a build task adds to its worker process, which takes some 200 MiB itself; the bytes on
    disk, texts and stored vectors included; the memory of a process that searches all shards once it has touched every
    page of their index files; the seconds of the build; and the milliseconds that one query takes on one core that
    searches all shards. The times are those of the machine that `costs` names.
    """

    kind: BuiltKind
    reason: str
    rows: int
    dim: int
    ranges: tuple[tuple[int, int], ...]
    parameters: dict[str, int] = field(default_factory=dict)
    exact_dtype: ExactDtype | None
    train_rows: int
    tasks_at_once: int
    predicted_build_memory_bytes_per_task: int
    predicted_disk_bytes: int
    predicted_search_memory_bytes: int
    predicted_build_seconds: float
    predicted_query_ms: float

    @property
    def shards(self) -> int:
        return len(self.ranges)


def plan_index(
    *,
    rows: int,
    dim: int,
    kind: IndexKind = "auto",
    shards: int | str = "auto",
    recall: float = 0.95,
    memory_bytes: int = 8 * 2**30,
    latency_ms: float | None = None,
    num_workers: int = 2,
    threads_per_task: int = 1,
    text_bytes: int = 0,
    rescore: bool | Literal["auto"] = "auto",
    vector_dtype: ExactDtype = "float32",
    hnsw: HnswConfig = _PLANNED_HNSW,
    ivf: IvfConfig = _PLANNED_IVF,
) -> IndexPlan:
    """Choose kind, shards and parameters, and predict memory, disk and time.

    `memory_bytes` bounds the search of all shards in one process, and the build tasks that run at once. `latency_ms`
    bounds the predicted time of a query on one core; where no kind that fits the memory keeps it, the fastest is taken
    and the reason says so. `rescore` keeps whole vectors of `vector_dtype` beside codes; they are memory-mapped, so
    they count as disk. What `hnsw` and `ivf` set is taken in place of what would be planned.

    Raises:
        InputError: no rows, more shards than rows, a setting that the kind does not have or the rows do not allow, or
            what does not fit the memory, naming what would.
    """
    request = _Request(
        rows=rows,
        dim=dim,
        kind=kind,
        shards=shards,
        recall=recall,
        memory_bytes=memory_bytes,
        latency_ms=latency_ms,
        num_workers=num_workers,
        rescore=rescore,
        vector_dtype=vector_dtype,
        hnsw=hnsw,
        ivf=ivf,
    )
    if rows < 1:
        raise InputError("the embeddings hold no rows; there is nothing to index")
    _check_settings(request)
    asked = _asked_shards(request)
    chosen, reason = _choose_kind(request, asked)
    num_shards = asked if asked is not None else _auto_shards(request, chosen)
    parameters = _parameters(request, chosen, num_shards)
    build_bytes = _build_bytes(request, chosen, num_shards)
    search_bytes = _search_bytes(request, chosen, num_shards)
    if max(build_bytes, search_bytes) > memory_bytes:
        raise InputError(_does_not_fit(request, chosen, num_shards, build_bytes, search_bytes))
    exact_dtype = _exact_dtype(request, chosen)
    exact_bytes = rows * dim * _DTYPE_BYTES[exact_dtype] if exact_dtype else 0
    train_rows = _train_rows(request, chosen, parameters)
    if train_rows < parameters.get("nlist", 0):
        raise InputError(
            f"ivf.nlist is {ivf.nlist}, but centroids are trained on {train_rows} rows, and each needs at least one: "
            f"set ivf.nlist to {train_rows} or fewer, or null"
        )
    at_once = min(num_workers, num_shards, memory_bytes // build_bytes)
    return IndexPlan(
        kind=chosen,
        reason=reason,
        rows=rows,
        dim=dim,
        ranges=split_rows(rows, num_shards),
        parameters=parameters,
        exact_dtype=exact_dtype,
        train_rows=train_rows,
        tasks_at_once=at_once,
        predicted_build_memory_bytes_per_task=build_bytes,
        predicted_disk_bytes=search_bytes + exact_bytes + text_bytes,
        predicted_search_memory_bytes=search_bytes,
        predicted_build_seconds=_build_seconds(
            request, chosen, num_shards, train_rows, at_once, threads_per_task
        ),
        predicted_query_ms=_query_ms(request, chosen, num_shards),
    )


def _exact_dtype(request: _Request, kind: BuiltKind) -> ExactDtype | None:
    if request.rescore is True and kind not in _CODE_KINDS:
        raise InputError(
            f"rescore is true, but kind {kind} scores with whole vectors already; set rescore to auto or false"
        )
    if kind == "ivf_rabitq" and not request.rescore:
        raise InputError(
            "rescore is false, but one bit a dimension ranks too coarsely without whole vectors beside it; set rescore "
            "to auto, or take kind ivf_sq8 or ivf_pq"
        )
    return request.vector_dtype if kind in _CODE_KINDS and request.rescore else None


def _check_settings(request: _Request) -> None:
    """Raises InputError for a setting that the kind asked for does not have, or the dimension does not allow."""
    kind, pq_m = request.kind, request.ivf.pq_m
    families = {"hnsw": request.hnsw, "ivf": request.ivf}
    given = [
        f"{family}.{name}"
        for family, values in families.items()
        for name, value in values
        if value is not None
    ]
    known = {"flat": (), "hnsw": ("hnsw.",), "ivf_pq": ("ivf.",), "auto": ("hnsw.", "ivf.")}.get(
        kind, ("ivf.nlist",)
    )
    for name in given:
        if not name.startswith(known):
            raise InputError(
                f"{name} is set, but an index of kind {kind} has no such setting; set it to null"
            )
    if pq_m is not None and request.dim % pq_m:
        divisors = [size for size in range(1, request.dim + 1) if request.dim % size == 0]
        near = sorted(divisors, key=lambda size: abs(size - pq_m))[:2]
        raise InputError(
            f"ivf.pq_m is {pq_m}, which does not divide the dimension {request.dim}; take "
            f"{' or '.join(map(str, sorted(near)))}"
        )


def split_rows(rows: int, shards: int) -> tuple[tuple[int, int], ...]:
    """Contiguous ranges, none empty, sizes differing by at most one."""
    bounds = [rows * number // shards for number in range(shards + 1)]
    return tuple(itertools.pairwise(bounds))


def human_bytes(count: int) -> str:
    """`8589934592` as `8.0 GiB`."""
    size, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:.0f} {units[0]}" if units[0] == "B" else f"{size:.1f} {units[0]}"


def _asked_shards(request: _Request) -> int | None:
    shards = request.shards
    if shards == "auto":
        return None
    if not isinstance(shards, int) or shards < 1:
        raise InputError(f"shards is {shards!r}; it must be 'auto' or a number of 1 or more")
    if shards > request.rows:
        raise InputError(
            f"shards is {shards}, more than the {request.rows} rows; a shard holds at least one row, so set shards "
            f"to {request.rows} or fewer, or to 'auto'"
        )
    return shards


def _auto_shards(request: _Request, kind: BuiltKind) -> int:
    """One for small inputs, at least one a worker for large ones, and more until a build task fits the memory."""
    shards = -(-request.rows // _ROWS_PER_SHARD)
    if request.rows >= _MIN_ROWS_FOR_PARALLEL_SHARDS:
        shards = max(shards, request.num_workers)
    while shards < request.rows and _build_bytes(request, kind, shards) > request.memory_bytes:
        shards += max(shards // 4, 1)
    return min(shards, request.rows)


def _choose_kind(request: _Request, asked: int | None) -> tuple[BuiltKind, str]:
    memory, have = request.memory_bytes, human_bytes(request.memory_bytes)
    sizes = {kind: _search_bytes(request, kind, asked or 1) for kind in _KINDS}
    over = f"{request.rows:,} rows of {request.dim} dimensions"
    if request.kind != "auto":
        if sizes[request.kind] > memory:
            fitting = [kind for kind in _KINDS if sizes[kind] <= memory]
            remedy = (
                f"kind {fitting[0]} ({human_bytes(sizes[fitting[0]])}) would fit"
                if fitting
                else "no kind fits"
            )
            raise InputError(
                f"kind {request.kind} over {over} takes {human_bytes(sizes[request.kind])} to search, more than "
                f"target.memory {have}; {remedy}, or raise target.memory to at least {sizes[request.kind]} bytes"
            )
        return request.kind, f"kind {request.kind} was asked for"
    few = request.rows <= _FLAT_ROWS
    known = [kind for kind in _AUTO_KINDS if request.rescore or kind != "ivf_rabitq"]
    fitting = [kind for kind in known if sizes[kind] <= memory and (few or kind != "flat")]
    if not fitting:
        least = min(known, key=sizes.__getitem__)
        raise InputError(
            f"{over} take {human_bytes(sizes[least])} even as {least}, more than target.memory {have}; raise "
            f"target.memory to at least {sizes[least]} bytes or use an encoder of a smaller dimension"
        )
    shards = {kind: asked or _auto_shards(request, kind) for kind in fitting}
    # A kind that fits in one shard may not fit in as many as it is built in, and may need more to be built. Where that
    # holds for all, the caller says so of one.
    needed = {kind: _needed_bytes(request, kind, shards[kind]) for kind in fitting}
    sizes |= {kind: size for kind, size in needed.items() if size > memory}
    fitting = [kind for kind in fitting if sizes[kind] <= memory] or fitting
    times = {kind: _query_ms(request, kind, shards[kind]) for kind in fitting}
    kept = [kind for kind in fitting if request.latency_ms is None or times[kind] <= request.latency_ms]
    kind = kept[0] if kept else min(fitting, key=times.__getitem__)
    return kind, _reason(request, kind, sizes, times)


def _reason(
    request: _Request, kind: BuiltKind, sizes: Mapping[BuiltKind, int], times: Mapping[BuiltKind, float]
) -> str:
    """Why `auto` took this kind: what it takes, what the kinds before it would have taken, what may be missed."""
    have = human_bytes(request.memory_bytes)
    over = f"{request.rows:,} rows of {request.dim} dimensions"
    if kind == "flat":
        reason = f"{over} are few enough to search exactly"
    elif kind == "hnsw":
        reason = f"{over} take {human_bytes(sizes['hnsw'])} as hnsw, the fastest kind, within {have}"
    else:
        before = [
            f"{name} would take {human_bytes(sizes[name])} of {have}"
            if name not in times
            else f"{name} about {times[name]:.2g} ms a query"
            for name in _AUTO_KINDS[1 : _AUTO_KINDS.index(kind)]
            if request.rescore or name != "ivf_rabitq"
        ]
        reason = "; ".join([*before, f"{kind} takes {human_bytes(sizes[kind])}"])
    if kind == "ivf_pq" and request.recall > _PQ_RECALL:
        reason += f", but its codes may not reach recall {request.recall}: see the measured recall"
    if request.latency_ms is not None:
        word = "within" if times[kind] <= request.latency_ms else "the fastest that fits, but over"
        reason += f"; about {times[kind]:.2g} ms a query on one core, {word} target.latency_ms {request.latency_ms:g}"
    return reason


def _does_not_fit(
    request: _Request, kind: BuiltKind, shards: int, build_bytes: int, search_bytes: int
) -> str:
    if build_bytes > request.memory_bytes:
        needed, doing, each = build_bytes, "building", " a task"
    else:
        needed, doing, each = search_bytes, "searching", ""
    start = (
        f"{doing} kind {kind} in {shards} shards takes {human_bytes(needed)}{each}, more than target.memory "
        f"{human_bytes(request.memory_bytes)}; "
    )
    wanted = _auto_shards(request, kind)
    if _needed_bytes(request, kind, wanted) <= request.memory_bytes:
        return f"{start}shards: {wanted} would fit, or raise target.memory to at least {needed} bytes"
    return f"{start}raise target.memory to at least {needed} bytes"


def _needed_bytes(request: _Request, kind: BuiltKind, shards: int) -> int:
    """Of one build task or of the search of all shards, whichever is more."""
    return max(_build_bytes(request, kind, shards), _search_bytes(request, kind, shards))


def _search_bytes(request: _Request, kind: BuiltKind, shards: int) -> int:
    parameters = _parameters(request, kind, shards)
    tables = costs.shard_bytes(kind, 0, request.dim, parameters)
    return costs.shard_bytes(kind, request.rows, request.dim, parameters) + (shards - 1) * tables


def _build_seconds(
    request: _Request, kind: BuiltKind, shards: int, train_rows: int, at_once: int, threads: int
) -> float:
    """Checking the embeddings, training by one task, filling shards in waves; measuring recall reads the rows again."""
    parameters = _parameters(request, kind, shards)
    reading = 2 * costs.check_seconds(request.rows, request.dim) / min(request.num_workers, shards)
    training = costs.train_seconds(kind, train_rows, request.dim, parameters) / threads
    waves = -(-shards // at_once)
    filling = waves * costs.fill_seconds(kind, -(-request.rows // shards), request.dim, parameters, threads)
    return reading + training + filling


def _query_ms(request: _Request, kind: BuiltKind, shards: int) -> float:
    parameters = _parameters(request, kind, shards)
    return shards * costs.query_ms(kind, -(-request.rows // shards), request.dim, parameters)


def _build_bytes(request: _Request, kind: BuiltKind, shards: int) -> int:
    """Of the larger of the two tasks: filling the largest shard, or training on the sample."""
    parameters = _parameters(request, kind, shards)
    fill = costs.fill_bytes(kind, -(-request.rows // shards), request.dim, parameters)
    train = costs.train_bytes(kind, _train_rows(request, kind, parameters), request.dim, parameters)
    return max(fill, train)


def _parameters(request: _Request, kind: BuiltKind, shards: int) -> dict[str, int]:
    if kind == "flat":
        return {}
    if kind == "hnsw":
        asked = request.hnsw
        graph = {"M": asked.m or _HNSW_M, "efConstruction": asked.ef_construction or _HNSW_EF_CONSTRUCTION}
        return {**graph, "float_bits": 16} if request.vector_dtype == "float16" else graph
    per_shard = max(request.rows // shards, 1)
    planned = max(min(int(4 * per_shard**0.5), per_shard // _MIN_ROWS_PER_CENTROID, _MAX_NLIST), 1)
    nlist = request.ivf.nlist or planned
    if kind != "ivf_pq":
        return {"nlist": nlist}
    dim = request.dim
    # About four dimensions a code, and a divisor of the dimension, as product quantisation needs.
    pq_m = request.ivf.pq_m or next(size for size in range(max(dim // 4, 1), 0, -1) if dim % size == 0)
    nbits = min(max((request.rows // _MIN_ROWS_PER_CENTROID).bit_length() - 1, 1), 8)
    return {"nlist": nlist, "pq_m": pq_m, "nbits": nbits}


def _train_rows(request: _Request, kind: BuiltKind, parameters: dict[str, int]) -> int:
    if kind == "flat":
        return 0
    centroids = max(parameters.get("nlist", 0), 1 << parameters.get("nbits", 0))
    scalar = _SCALAR_TRAIN_ROWS if kind in ("hnsw", "ivf_sq8") else 0
    affordable = max(request.memory_bytes // _TRAIN_MEMORY_SHARE // (request.dim * 4), _MIN_ROWS_PER_CENTROID)
    most = max(_MAX_TRAIN_ROWS, centroids * _MIN_ROWS_PER_CENTROID)
    return min(request.rows, max(centroids * _TRAIN_ROWS_PER_CENTROID, scalar), most, affordable)
