"""What each index kind is in FAISS: how it is made, trained and filled. Every kind scores by inner product.

`hnsw` walks its graph over 8-bit codes and scores what it finds with the full vectors beside them: the walk reads a
quarter of the memory, which more than pays for searching several smaller graphs, and scores stay exact.

Rows with equal codes are one node of that graph. A graph over many equal vectors falls apart: the links of each copy
are taken up by other copies, and whole regions are reached from nowhere, whatever efSearch is. So the first row with a
code is linked and the others, its copies, stand at the end of the graph without a link:

    IndexRefine
      base_index    IndexIDMap   numbers of rows, by node; left out where no two codes are equal
        index       IndexHNSWSQ  the linked nodes, then the copies in the order of the rows that they copy
      refine_index               whole vectors of all rows, by row

The links of copies have room that no walk reads. It holds the row that each of them copies, and how many there are.

Shape legend: B rows of a batch, D dimension, C copies.
"""

from __future__ import annotations

import logging
import threading
from array import array
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raytower.index.config import BuiltKind
from raytower.index.faiss_import import import_faiss

_logger = logging.getLogger(__name__)

Vectors = NDArray[np.float32]
# The lists that FAISS fills on a GPU; codes of ivf_rabitq and graphs it does not hold there.
GPU_LISTS: frozenset[BuiltKind] = frozenset({"ivf_flat", "ivf_sq8", "ivf_pq"})
_LIST_CODES: dict[BuiltKind, str] = {"ivf_flat": "Flat", "ivf_sq8": "SQ8", "ivf_rabitq": "RaBitQ"}
# FAISS selects no more hits and no more lists than that on a GPU.
_GPU_DEPTH = 2048
_COPIED_AT_ONCE = 65_536


def new_index(kind: BuiltKind, dim: int, parameters: Mapping[str, int]) -> Any:
    """An empty FAISS index, untrained where its kind trains. `parameters` are those of an `IndexPlan`."""
    faiss = import_faiss()
    if kind == "flat":
        return faiss.IndexFlatIP(dim)
    if kind == "hnsw":
        whole = "Refine(SQfp16)" if parameters.get("float_bits") == 16 else "RFlat"
        index = faiss.index_factory(dim, f"HNSW{parameters['M']}_SQ8,{whole}", faiss.METRIC_INNER_PRODUCT)
        graph_of(index).hnsw.efConstruction = parameters["efConstruction"]
        return index
    # "np": without it the factory anneals the codebooks' numbering for a search by Hamming distance, which is not used
    # here and takes twenty times as long as the training itself.
    code = f"PQ{parameters['pq_m']}x{parameters['nbits']}np" if kind == "ivf_pq" else _LIST_CODES[kind]
    return faiss.index_factory(dim, f"IVF{parameters['nlist']},{code}", faiss.METRIC_INNER_PRODUCT)


def train(kind: BuiltKind, index: Any, vectors: Vectors) -> None:
    """Train centroids, codebooks and value ranges from a sample of the rows, (sample, dim).

    Where FAISS sees GPUs, k-means assigns rows to centroids there, which is nearly all of the work.
    """
    with _assigning_on_gpus(kind, index):
        index.train(vectors)


def fill(
    kind: BuiltKind,
    index: Any,
    batches: Iterable[Vectors],
    rows: int,
    *,
    num_threads: int = 1,
    num_gpus: float = 0,
) -> Any:
    """The trained index with all batches (n, dim) added, `rows` in all; rows are numbered 0, 1, … as they come.

    With more than one thread a batch is added while the next one is read. Where the task holds a GPU that FAISS sees,
    lists are filled there. The index given is not to be used afterwards.
    """
    filler = _Graph(index) if kind == "hnsw" else _Plain(kind, index, gpu=num_gpus > 0)
    reserve(kind, index, rows)
    if num_threads == 1:  # a task of one core keeps to its core
        for vectors in batches:
            filler.add(vectors)
        return filler.finish()
    # The number of threads that OpenMP takes is set thread by thread.
    with ThreadPoolExecutor(1, "index-add", import_faiss().omp_set_num_threads, (num_threads,)) as thread:
        running = None
        for vectors in batches:
            if running is not None:
                running.result()
            running = thread.submit(filler.add, vectors)
        if running is not None:
            running.result()
        return thread.submit(filler.finish).result()


def reserve(kind: BuiltKind, index: Any, rows: int) -> None:
    """Make room in an empty index for so many rows, where its arrays would otherwise grow by doubling.

    A growing array exists twice while it is copied, which can be three times what the shard needs in the end. The lists
    of IVF kinds are many and small; what they need is known only once rows are assigned.
    """
    faiss = import_faiss()
    if kind == "flat":
        _reserve(index.codes, rows * index.code_size)
    elif kind == "hnsw":
        graph = graph_of(index)
        refined = faiss.downcast_index(index.refine_index)
        codes = faiss.downcast_index(graph.storage)
        _reserve(codes.codes, rows * codes.code_size)
        _reserve(refined.codes, rows * refined.code_size)
        links = graph.hnsw.nb_neighbors(1)
        # One row in M is on the next level too, by chance: six standard deviations are room enough.
        above = rows / (links - 1) + 6 * rows**0.5 + 64
        _reserve(graph.hnsw.neighbors, rows * graph.hnsw.nb_neighbors(0) + int(above) * links)


def _reserve(array: Any, size: int) -> None:
    # The bindings have no reserve; an array keeps its room when it is made shorter.
    array.resize(size)
    array.resize(0)


@dataclass
class _Plain:
    """Filling an index of any kind but a graph."""

    kind: BuiltKind
    index: Any
    gpu: bool
    _filled: Any = None

    def add(self, vectors: Vectors) -> None:
        if self._filled is None:
            copy = _gpu_copy(self.kind, self.index) if self.gpu and self.kind != "flat" else None
            self._filled = self.index if copy is None else copy
        self._filled.add(vectors)

    def finish(self) -> Any:
        on_gpu = self._filled is not None and self._filled is not self.index
        return import_faiss().index_gpu_to_cpu(self._filled) if on_gpu else self.index


# GPUs


class GpuIndex:
    """A copy of an index of lists or vectors on a GPU, to be searched without a filter. Safe for concurrent calls."""

    def __init__(self, index: Any) -> None:
        self._index = index
        self._lock = threading.Lock()  # FAISS wants one call at a time

    @classmethod
    def of(cls, kind: BuiltKind, index: Any) -> GpuIndex | None:
        """None where FAISS sees no GPU, or the GPU cannot hold an index of that kind or size."""
        copy = _gpu_copy(kind, index)
        return None if copy is None else cls(copy)

    def reaches(self, depth: int, probes: int = 1) -> bool:
        """Whether it answers with so many hits from so many lists."""
        return max(depth, probes) <= _GPU_DEPTH

    def search(self, queries: Vectors, depth: int, params: Any = None) -> Any:
        """Scores and rows (Q, depth) for queries (Q, D), as from the index that it copies."""
        with self._lock:
            return self._index.search(queries, depth, params=params)


def _gpu_copy(kind: BuiltKind, index: Any) -> Any | None:
    faiss = import_faiss()
    if kind not in GPU_LISTS | {"flat"} or not _num_gpus():
        return None
    try:
        return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index)
    except RuntimeError as error:  # out of its memory, or product codes that it has no kernel for
        _logger.warning("an index of kind %s stays off the GPU: %s", kind, error)
        return None


def _num_gpus() -> int:
    get_num_gpus = getattr(import_faiss(), "get_num_gpus", None)  # a build for CPUs only may lack it
    return 0 if get_num_gpus is None else int(get_num_gpus())


@contextmanager
def _assigning_on_gpus(kind: BuiltKind, index: Any) -> Iterator[None]:
    if not kind.startswith("ivf") or not _num_gpus():
        yield
        return
    faiss = import_faiss()
    # FAISS holds bare pointers to these, so they live here until training is through.
    centroids = faiss.index_cpu_to_all_gpus(faiss.IndexFlatIP(index.d))
    index.clustering_index = centroids
    codes = faiss.index_cpu_to_all_gpus(faiss.IndexFlatL2(index.pq.dsub)) if kind == "ivf_pq" else None
    if codes is not None:
        index.pq.assign_index = codes
    try:
        yield
    finally:
        index.clustering_index = None
        if codes is not None:
            index.pq.assign_index = None


# Graphs


@dataclass(frozen=True)
class Copies:
    """Rows with the code of an earlier row, both (C,): the rows that they copy, rising, and their own."""

    originals: NDArray[np.int32]
    rows: NDArray[np.int64]

    def expanded(self, ranking: NDArray[np.int64], num: int) -> NDArray[np.int64]:
        """The first `num` rows (Q, num) of a ranking (Q, R) in which each row is followed by its copies.

        Padded with -1 where there are fewer; so may the ranking be.
        """
        first = np.searchsorted(self.originals, ranking, "left")
        sizes = np.searchsorted(self.originals, ranking, "right") - first + 1
        sizes[ranking < 0] = 0
        ends = np.cumsum(sizes, axis=1)
        starts = ends - sizes
        sizes = np.clip(num - starts, 0, sizes).ravel()
        places = np.repeat(np.arange(ranking.size), sizes)  # in the ranking, of each row that is given
        steps = np.arange(len(places)) - np.repeat(
            np.cumsum(sizes) - sizes, sizes
        )  # 0 for it, 1 … for its copies
        rows = ranking.ravel()[places]
        copied = steps > 0
        rows[copied] = self.rows[first.ravel()[places[copied]] + steps[copied] - 1]
        found = np.full((len(ranking), num), -1, np.int64)
        found[places // ranking.shape[1], starts.ravel()[places] + steps] = rows
        return found


def graph_of(index: Any) -> Any:
    """The graph in an index of kind hnsw."""
    faiss = import_faiss()
    base = faiss.downcast_index(index.base_index)
    return faiss.downcast_index(base.index) if isinstance(base, faiss.IndexIDMap) else base


def copies_of(index: Any) -> Copies | None:
    """The copies in an index of kind hnsw, where they lie: the index must outlive them. None where it has none."""
    faiss = import_faiss()
    base = faiss.downcast_index(index.base_index)
    if not isinstance(base, faiss.IndexIDMap):
        return None
    links = _links(faiss.downcast_index(base.index))
    count = int(links[-1])
    total = int(base.ntotal)
    room = links[-count * faiss.downcast_index(base.index).hnsw.nb_neighbors(0) :]
    return Copies(room[:count], faiss.rev_swig_ptr(base.id_map.data(), total)[total - count :])


def _links(graph: Any) -> NDArray[np.int32]:
    neighbors = graph.hnsw.neighbors
    links: NDArray[np.int32] = import_faiss().rev_swig_ptr(neighbors.data(), neighbors.size())
    return links


@dataclass
class _Graph:
    """Filling a graph: the first row with a code becomes a node, its copies are put at the end."""

    index: Any
    _first: dict[bytes, int] = field(default_factory=dict)  # by a digest of the code, its row
    _originals: array[int] = field(default_factory=lambda: array("q"))
    _copies: array[int] = field(default_factory=lambda: array("q"))
    _rows: int = 0

    def __post_init__(self) -> None:
        faiss = import_faiss()
        base = faiss.downcast_index(self.index.base_index)
        self._graph = graph_of(self.index)
        if isinstance(base, faiss.IndexIDMap):  # emptied, to be filled anew
            base.own_fields = False
            self.index.base_index = self._graph
            base.this.own(True)

    def add(self, vectors: Vectors) -> None:
        self.index.refine_index.add(vectors)
        codes = import_faiss().downcast_index(self._graph.storage).sa_encode(vectors)
        linked = np.ones(len(vectors), np.bool_)
        for place, code in enumerate(codes):
            row = self._rows + place
            first = self._first.setdefault(blake2b(code.data, digest_size=16).digest(), row)
            if first != row:
                linked[place] = False
                self._originals.append(first)
                self._copies.append(row)
        self._graph.add(vectors if linked.all() else vectors[linked])
        self._rows += len(vectors)

    def finish(self) -> Any:
        self._first.clear()
        if self._copies:
            originals, copies = np.array(self._originals, np.int32), np.array(self._copies, np.int64)
            order = np.argsort(originals, kind="stable")
            originals, copies = originals[order], copies[order]
            linked = np.ones(self._rows, np.bool_)
            linked[copies] = False
            numbers = np.concatenate([np.flatnonzero(linked), copies])
            self._append(originals, numbers)
            self._number(numbers)
        self.index.ntotal = self._rows
        return self.index

    def _append(self, originals: NDArray[np.int32], numbers: NDArray[np.int64]) -> None:
        """Codes and unlinked nodes of copies."""
        faiss = import_faiss()
        graph, storage = self._graph, faiss.downcast_index(self._graph.storage)
        nodes, width = int(graph.ntotal), storage.code_size
        places = np.searchsorted(numbers[:nodes], originals)
        for start in range(0, len(places), _COPIED_AT_ONCE):
            part = places[start : start + _COPIED_AT_ONCE]
            codes = faiss.rev_swig_ptr(storage.codes.data(), nodes * width).reshape(nodes, width)
            storage.add_sa_codes(codes[part])
        graph.hnsw.levels.resize(self._rows)
        faiss.rev_swig_ptr(graph.hnsw.levels.data(), self._rows)[nodes:] = 1  # the lowest level only
        graph.hnsw.prepare_level_tab(len(originals), True)
        graph.ntotal = self._rows
        links = _links(graph)
        room = links[-len(originals) * graph.hnsw.nb_neighbors(0) :]
        room[: len(originals)] = originals
        room[-1] = len(originals)

    def _number(self, numbers: NDArray[np.int64]) -> None:
        """Put the map from nodes to rows between the index and its graph."""
        faiss = import_faiss()
        numbered = faiss.IndexIDMap(faiss.IndexFlatIP(self.index.d))  # FAISS wants an empty index at first
        numbered.index = self._graph
        numbered.ntotal = self._rows
        faiss.copy_array_to_vector(numbers, numbered.id_map)
        numbered.own_fields = True
        numbered.this.disown()
        self.index.base_index = numbered
