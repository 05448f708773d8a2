"""Planning an index: numbers in, plan out. No I/O, no FAISS."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from raytower.config import ByteSize
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
# What `auto` may take, best first.
_AUTO_KINDS: tuple[BuiltKind, ...] = ("flat", "hnsw", "ivf_rabitq", "ivf_sq8", "ivf_pq")
_CODE_KINDS: frozenset[BuiltKind] = frozenset({"ivf_rabitq", "ivf_sq8", "ivf_pq"})


@dataclass(frozen=True, kw_only=True)
class IndexPlan:
    """What a build will do. `ranges` are half-open row ranges over the embeddings' rows in file order.

    `parameters`: hnsw has M and efConstruction, and float_bits where whole vectors are shorter than 32; ivf kinds have
    nlist; ivf_pq also pq_m (sub-vectors) and nbits.

    Predicted are the memory that a build task adds to its worker process, which takes some 200 MiB itself; the bytes on
    disk, texts, stored vectors and the lexical side included, and those of the lexical side alone; the memory of a
    process that searches all shards once it has touched every page of their index files; the seconds of the build; and
    the milliseconds that one query takes on one core that searches all shards. The times are those of the machine that
    `costs` names.
    """

    kind: BuiltKind
    reason: str
    rows: int
    dim: int
    ranges: tuple[tuple[int, int], ...]
    parameters: dict[str, int]
    exact_dtype: ExactDtype | None
    train_rows: int
    tasks_at_once: int
    predicted_build_memory_bytes_per_task: int
    predicted_disk_bytes: int
    predicted_lexical_bytes: int
    predicted_search_memory_bytes: int
    predicted_build_seconds: float
    predicted_query_ms: float

    @property
    def shards(self) -> int:
        return len(self.ranges)


@dataclass(frozen=True, kw_only=True)
class IndexRequest:
    """An index to be planned.

    `memory_bytes` bounds the search of all shards in one process, and the build tasks that run at once. `latency_ms`
    bounds the predicted time of a query on one core; where no kind that fits the memory keeps it, the fastest is taken
    and the reason says so. `rescore` keeps whole vectors of `vector_dtype` beside codes; they are memory-mapped, so
    they count as disk. What `hnsw` and `ivf` set is taken in place of what would be planned.
    """

    rows: int
    dim: int
    kind: IndexKind = "auto"
    shards: Literal["auto"] | int = "auto"
    recall: float = 0.95
    memory_bytes: int = 8 * 2**30
    latency_ms: float | None = None
    num_workers: int = 2
    threads_per_task: int = 1
    text_bytes: int = 0
    lexical: bool = False
    rescore: bool | Literal["auto"] = "auto"
    vector_dtype: ExactDtype = "float32"
    hnsw: HnswConfig = field(default_factory=HnswConfig)
    ivf: IvfConfig = field(default_factory=IvfConfig)

    def plan(self) -> IndexPlan:
        """Choose kind, shards and parameters, and predict memory, disk and time.

        Raises:
            InputError: no rows, more shards than rows, a setting that the kind does not have or the rows do not allow,
                or what does not fit the memory, naming what would.
        """
        _check(self)
        chosen, reason = _choose(self)
        if chosen.needed_bytes > self.memory_bytes:
            raise InputError(_does_not_fit(chosen))
        exact_dtype, train_rows = chosen.exact_dtype, chosen.train_rows
        exact_bytes = self.rows * self.dim * _DTYPE_BYTES[exact_dtype] if exact_dtype else 0
        lexical_bytes = costs.lexical_bytes(self.text_bytes) if self.lexical else 0
        if train_rows < chosen.parameters.get("nlist", 0):
            raise InputError(
                f"ivf.nlist is {self.ivf.nlist}, but centroids are trained on {train_rows} rows, and each needs at "
                f"least one: set ivf.nlist to {train_rows} or fewer, or null"
            )
        at_once = min(self.num_workers, chosen.shards, self.memory_bytes // chosen.build_bytes)
        return IndexPlan(
            kind=chosen.kind,
            reason=reason,
            rows=self.rows,
            dim=self.dim,
            ranges=split_rows(self.rows, chosen.shards),
            parameters=chosen.parameters,
            exact_dtype=exact_dtype,
            train_rows=train_rows,
            tasks_at_once=at_once,
            predicted_build_memory_bytes_per_task=chosen.build_bytes,
            predicted_disk_bytes=chosen.search_bytes + exact_bytes + self.text_bytes + lexical_bytes,
            predicted_lexical_bytes=lexical_bytes,
            predicted_search_memory_bytes=chosen.search_bytes,
            predicted_build_seconds=chosen.build_seconds(at_once),
            predicted_query_ms=chosen.query_ms,
        )

    def __str__(self) -> str:
        return f"{self.rows:,} rows of {self.dim} dimensions"


@dataclass(frozen=True)
class _Candidate:
    """A kind in so many shards, and what it takes."""

    request: IndexRequest
    kind: BuiltKind
    shards: int

    @classmethod
    def of(cls, request: IndexRequest, kind: BuiltKind) -> _Candidate:
        """In the shards asked for; else one for small inputs, at least one a worker for large ones, and more until a
        build task fits the memory.
        """
        if request.shards != "auto":
            return cls(request, kind, request.shards)
        shards = -(-request.rows // _ROWS_PER_SHARD)
        if request.rows >= _MIN_ROWS_FOR_PARALLEL_SHARDS:
            shards = max(shards, request.num_workers)
        while shards < request.rows and cls(request, kind, shards).build_bytes > request.memory_bytes:
            shards += max(shards // 4, 1)
        return cls(request, kind, min(shards, request.rows))

    @property
    def _shape(self) -> tuple[BuiltKind, int, int, dict[str, int]]:
        """Of the largest shard, as `costs` takes it."""
        return self.kind, -(-self.request.rows // self.shards), self.request.dim, self.parameters

    @cached_property
    def parameters(self) -> dict[str, int]:
        request, dim = self.request, self.request.dim
        if self.kind == "flat":
            return {}
        if self.kind == "hnsw":
            ef_construction = request.hnsw.ef_construction or _HNSW_EF_CONSTRUCTION
            graph = {"M": request.hnsw.m or _HNSW_M, "efConstruction": ef_construction}
            return {**graph, "float_bits": 16} if request.vector_dtype == "float16" else graph
        per_shard = max(request.rows // self.shards, 1)
        planned = max(min(int(4 * per_shard**0.5), per_shard // _MIN_ROWS_PER_CENTROID, _MAX_NLIST), 1)
        nlist = request.ivf.nlist or planned
        if self.kind != "ivf_pq":
            return {"nlist": nlist}
        # About four dimensions a code, and a divisor of the dimension, as product quantisation needs.
        pq_m = request.ivf.pq_m or next(size for size in range(max(dim // 4, 1), 0, -1) if dim % size == 0)
        nbits = min(max((request.rows // _MIN_ROWS_PER_CENTROID).bit_length() - 1, 1), 8)
        return {"nlist": nlist, "pq_m": pq_m, "nbits": nbits}

    @property
    def train_rows(self) -> int:
        if self.kind == "flat":
            return 0
        request = self.request
        centroids = max(self.parameters.get("nlist", 0), 1 << self.parameters.get("nbits", 0))
        scalar = _SCALAR_TRAIN_ROWS if self.kind in ("hnsw", "ivf_sq8") else 0
        affordable = request.memory_bytes // _TRAIN_MEMORY_SHARE // (request.dim * 4)
        most = max(_MAX_TRAIN_ROWS, centroids * _MIN_ROWS_PER_CENTROID)
        wanted = max(centroids * _TRAIN_ROWS_PER_CENTROID, scalar)
        return min(request.rows, wanted, most, max(affordable, _MIN_ROWS_PER_CENTROID))

    @property
    def exact_dtype(self) -> ExactDtype | None:
        request = self.request
        if request.rescore is True and self.kind not in _CODE_KINDS:
            raise InputError(
                f"rescore is true, but kind {self.kind} scores with whole vectors already; set rescore to auto or false"
            )
        if self.kind == "ivf_rabitq" and not request.rescore:
            raise InputError(
                "rescore is false, but one bit a dimension ranks too coarsely without whole vectors beside it; set "
                "rescore to auto, or take kind ivf_sq8 or ivf_pq"
            )
        return request.vector_dtype if self.kind in _CODE_KINDS and request.rescore else None

    @property
    def search_bytes(self) -> int:
        rows, dim = self.request.rows, self.request.dim
        tables = costs.shard_bytes(self.kind, 0, dim, self.parameters)
        return costs.shard_bytes(self.kind, rows, dim, self.parameters) + (self.shards - 1) * tables

    @property
    def build_bytes(self) -> int:
        """Of the larger of the two tasks: filling the largest shard, or training on the sample."""
        train = costs.train_bytes(self.kind, self.train_rows, self.request.dim, self.parameters)
        return max(costs.fill_bytes(*self._shape), train)

    @property
    def needed_bytes(self) -> int:
        """Of one build task or of the search of all shards, whichever is more."""
        return max(self.build_bytes, self.search_bytes)

    @property
    def query_ms(self) -> float:
        return self.shards * costs.query_ms(*self._shape)

    def build_seconds(self, at_once: int) -> float:
        """Checking the embeddings, training by one task, filling shards in waves; measuring recall reads them again."""
        request, threads = self.request, self.request.threads_per_task
        reading = 2 * costs.check_seconds(request.rows, request.dim) / min(request.num_workers, self.shards)
        training = costs.train_seconds(self.kind, self.train_rows, request.dim, self.parameters) / threads
        return reading + training + -(-self.shards // at_once) * costs.fill_seconds(*self._shape, threads)


def split_rows(rows: int, shards: int) -> tuple[tuple[int, int], ...]:
    """Contiguous ranges, none empty, sizes differing by at most one."""
    bounds = [rows * number // shards for number in range(shards + 1)]
    return tuple(itertools.pairwise(bounds))


def human_bytes(count: int) -> str:
    """`8589934592` as `8.0 GiB`."""
    return ByteSize(count).human_readable(separator=" ")


def _check(request: IndexRequest) -> None:
    """Raises InputError for no rows, shards that there cannot be, or a setting that the kind asked for does not have
    or the dimension does not allow.
    """
    rows, kind, shards, pq_m = request.rows, request.kind, request.shards, request.ivf.pq_m
    if rows < 1:
        raise InputError("the embeddings hold no rows; there is nothing to index")
    known = {"flat": (), "hnsw": ("hnsw.",), "ivf_pq": ("ivf.",), "auto": ("hnsw.", "ivf.")}
    for family, values in (("hnsw", request.hnsw), ("ivf", request.ivf)):
        for name, value in values:
            if value is not None and not f"{family}.{name}".startswith(known.get(kind, ("ivf.nlist",))):
                raise InputError(
                    f"{family}.{name} is set, but an index of kind {kind} has no such setting; set it to null"
                )
    if pq_m is not None and request.dim % pq_m:
        divisors = [size for size in range(1, request.dim + 1) if request.dim % size == 0]
        near = sorted(sorted(divisors, key=lambda size: abs(size - pq_m))[:2])
        raise InputError(
            f"ivf.pq_m is {pq_m}, which does not divide the dimension {request.dim}; take "
            f"{' or '.join(map(str, near))}"
        )
    if shards != "auto" and (not isinstance(shards, int) or shards < 1):
        raise InputError(f"shards is {shards!r}; it must be 'auto' or a number of 1 or more")
    if shards != "auto" and shards > rows:
        raise InputError(
            f"shards is {shards}, more than the {rows} rows; a shard holds at least one row, so set shards to {rows} "
            "or fewer, or to 'auto'"
        )


def _choose(request: IndexRequest) -> tuple[_Candidate, str]:
    memory, have = request.memory_bytes, human_bytes(request.memory_bytes)
    least_shards = 1 if request.shards == "auto" else request.shards
    sizes = {kind: _Candidate(request, kind, least_shards).search_bytes for kind in _KINDS}
    if request.kind != "auto":
        size = sizes[request.kind]
        if size > memory:
            fitting = [
                f"kind {kind} ({human_bytes(sizes[kind])})" for kind in _KINDS if sizes[kind] <= memory
            ]
            raise InputError(
                f"kind {request.kind} over {request} takes {human_bytes(size)} to search, more than target.memory "
                f"{have}; {f'{fitting[0]} would fit' if fitting else 'no kind fits'}, or raise target.memory to at "
                f"least {size} bytes"
            )
        return _Candidate.of(request, request.kind), f"kind {request.kind} was asked for"
    few = request.rows <= _FLAT_ROWS
    known = [kind for kind in _AUTO_KINDS if request.rescore or kind != "ivf_rabitq"]
    fitting_kinds = [kind for kind in known if sizes[kind] <= memory and (few or kind != "flat")]
    if not fitting_kinds:
        least = min(known, key=sizes.__getitem__)
        raise InputError(
            f"{request} take {human_bytes(sizes[least])} even as {least}, more than target.memory {have}; raise "
            f"target.memory to at least {sizes[least]} bytes or use an encoder of a smaller dimension"
        )
    candidates = [_Candidate.of(request, kind) for kind in fitting_kinds]
    # A kind that fits in one shard may not fit in as many as it is built in, and may need more to be built. Where that
    # holds for all, the caller says so of one.
    sizes |= {found.kind: found.needed_bytes for found in candidates if found.needed_bytes > memory}
    candidates = [found for found in candidates if sizes[found.kind] <= memory] or candidates
    times = {found.kind: found.query_ms for found in candidates}
    kept = [
        found for found in candidates if request.latency_ms is None or found.query_ms <= request.latency_ms
    ]
    chosen = kept[0] if kept else min(candidates, key=lambda found: times[found.kind])
    return chosen, _reason(request, chosen.kind, sizes, times)


def _reason(
    request: IndexRequest, kind: BuiltKind, sizes: Mapping[BuiltKind, int], times: Mapping[BuiltKind, float]
) -> str:
    """Why `auto` took this kind: what it takes, what the kinds before it would have taken, what may be missed."""
    have = human_bytes(request.memory_bytes)
    if kind == "flat":
        reason = f"{request} are few enough to search exactly"
    elif kind == "hnsw":
        reason = f"{request} take {human_bytes(sizes['hnsw'])} as hnsw, the fastest kind, within {have}"
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


def _does_not_fit(chosen: _Candidate) -> str:
    memory = chosen.request.memory_bytes
    needed, doing, each = chosen.search_bytes, "searching", ""
    if chosen.build_bytes > memory:
        needed, doing, each = chosen.build_bytes, "building", " a task"
    wanted = _Candidate.of(dataclasses.replace(chosen.request, shards="auto"), chosen.kind)
    remedy = f"shards: {wanted.shards} would fit, or " if wanted.needed_bytes <= memory else ""
    return (
        f"{doing} kind {chosen.kind} in {chosen.shards} shards takes {human_bytes(needed)}{each}, more than "
        f"target.memory {human_bytes(memory)}; {remedy}raise target.memory to at least {needed} bytes"
    )
