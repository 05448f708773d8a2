"""Libraries that search learned sparse vectors, beside a product of scipy's; none is carried (docs/results/sparse.md).

    OMP_NUM_THREADS=1 python benchmarks/bench_sparse.py bm25|seismic|qdrant DIR [documents]

seismic wants the package pyseismic-lsr, qdrant the package qdrant-edge-py; neither is one of ours.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

V, Q, K = 30_000, 200, 10
Ints = NDArray[np.int64]
Search = Callable[..., Ints]


def sparse_rows(draws: Ints, seed: int) -> sp.csr_array:
    """Rows (len(draws), V): half of a row's terms by Zipf from rank 50 on, half from the 400 terms of a topic."""
    rng, count = np.random.default_rng(seed), len(draws)
    topics, owner = np.random.default_rng(0).integers(0, V, (500, 400)), np.repeat(np.arange(count), draws)
    zipf = np.clip(50 * (V / 50 + 1) ** rng.random(len(owner)) - 50, 0, V - 1).astype(int)
    place = np.repeat(rng.integers(0, 500, count), draws), (400 * rng.random(len(owner)) ** 2).astype(int)
    topical, own = topics[place], rng.random(len(owner)) < 0.5
    weight = (rng.gamma(2, 0.35, len(owner)) * np.where(own, 1.5, 0.75)).astype(np.float32)
    cell, first = np.unique(owner * V + np.where(own, topical, zipf), return_index=True)
    return sp.csr_array((weight[first], (owner[first], cell % V)), shape=(count, V))


def row(matrix: sp.csr_array, at: int) -> tuple[Ints, Any]:
    part = slice(matrix.indptr[at], matrix.indptr[at + 1])
    return matrix.indices[part].astype(np.int64), matrix.data[part]


def brute(columns: sp.csc_array, allowed: Any, k: int, terms: Ints, values: Any) -> Ints:
    return np.argpartition(-np.where(allowed, columns[:, terms] @ values, 0), k)[:k].astype(np.int64)


def measured(name: str, queries: sp.csr_array, search: Search, truth: list[Ints] | None = None) -> list[Ints]:
    start = time.process_time()
    found = [search(*row(queries, at)) for at in range(Q)]
    took = 1000 * (time.process_time() - start) / Q
    recall = np.mean([len(np.intersect1d(a, b)) / K for a, b in zip(truth or found, found, strict=True)])
    print(f"{name}: {took:.2f} ms CPU a query, {recall:.3f} of the exact {K}", flush=True)
    return found


def bm25(docs: sp.csr_array, queries: sp.csr_array, truths: list[list[Ints]], _: Path) -> None:
    docs.data = np.rint(docs.data)
    lengths, held = docs.sum(1), np.bincount(docs.indices[docs.data > 0], minlength=V)
    idf = np.log1p((docs.shape[0] - held + 0.5) / (held + 0.5))
    docs.data /= docs.data + np.repeat(0.3 + 0.9 * lengths / lengths.mean(), np.diff(docs.indptr))
    for k in (10, 100):
        search = partial(brute, docs.tocsc(), True, k)
        measured(f"best {k}", queries, lambda t, v, s=search: s(t, np.rint(4 * v) * idf[t]), truths[0])


def seismic(docs: sp.csr_array, queries: sp.csr_array, truths: list[list[Ints]], folder: Path) -> None:
    from seismic import SeismicDataset, SeismicIndex, get_seismic_string

    start, data, ids = time.process_time(), SeismicDataset(), [str(at) for at in range(docs.shape[0])]
    data.add_documents_by_id(ids, docs.indices.astype(np.int64), docs.data, docs.indptr.astype(np.int64))
    index = SeismicIndex.build_from_dataset(data, n_postings=200, centroid_fraction=0.02, num_threads=1)
    print(f"built in {time.process_time() - start:.1f} s CPU")
    index.save(str(folder / "index"))
    index = SeismicIndex.load(str(folder / "index.index.seismic"))

    def search(k: int, cut: int, factor: float, group: int | None, terms: Ints, values: Any) -> Ints:
        hits = index.search("q", terms.astype(get_seismic_string()), values, k, cut, factor)
        found = np.array([int(hit[2]) for hit in hits])
        return found if group is None else found[found % 100 == group][:K]

    measured("10 terms, heap_factor 0.9", queries, partial(search, K, 10, 0.9, None), truths[0])
    measured("all terms, heap_factor 0.7", queries, partial(search, K, V, 0.7, None), truths[0])
    for k in (100, 1000, 5000):
        measured(f"1 %, what passes of {k} hits", queries, partial(search, k, V, 0.7, 7), truths[1])


def qdrant(docs: sp.csr_array, queries: sp.csr_array, truths: list[list[Ints]], folder: Path) -> None:
    import qdrant_edge as q

    def put(numbers: Any) -> None:
        vectors = ((at, q.SparseVector(*(part.tolist() for part in row(docs, at)))) for at in numbers)
        points = [q.Point(at, {"s": vector}, {"group": at % 100}) for at, vector in vectors]
        shard.update(q.UpdateOperation.upsert_points(points))

    def search(terms: Ints, values: Any, only: Any = ()) -> Ints:
        query = q.Query.Nearest(q.SparseVector(terms.tolist(), values.tolist()), "s")
        hits = shard.query(q.QueryRequest(K, query=query, filter=q.Filter(must=list(only))))
        return np.array([hit.id for hit in hits])

    start, config = time.process_time(), q.EdgeConfig(sparse_vectors={"s": q.EdgeSparseVectorParams()})
    shard = q.EdgeShard.create(str(folder), config)
    for first in range(0, docs.shape[0], 5000):
        put(range(first, min(first + 5000, docs.shape[0])))
    shard.update(q.UpdateOperation.create_field_index("group", q.PayloadSchemaType.Integer))
    shard.optimize()
    shard.close()
    print(f"built in {time.process_time() - start:.1f} s CPU")
    shard = q.EdgeShard.load(str(folder))
    field, best = q.FieldCondition("group", q.MatchValue(7)), sorted({int(hits[0]) for hits in truths[0]})
    measured("no filter", queries, search, truths[0])
    measured("1 % by a field", queries, partial(search, only=[field]), truths[1])
    for step in (100, 2):
        ids, truth = q.HasIdCondition(set(range(7 % step, docs.shape[0], step))), {100: truths[1]}.get(step)
        measured(f"one in {step} by ids", queries, partial(search, only=[ids]), truth)
    shard.update(q.UpdateOperation.delete_points(best))
    print("found though deleted:", np.isin(measured("best hits deleted", queries, search), best).sum())
    put(best)
    measured("put again", queries, search, truths[0])


if __name__ == "__main__":
    place, count = Path(sys.argv[2]), int((sys.argv[3:] or ["200000"])[0])
    documents = sparse_rows(np.random.default_rng(1).integers(66, 132, count), 1)
    asked, csc, group = sparse_rows(np.full(Q, 32), 2), documents.tocsc(), np.arange(count) % 100 == 7
    exact = [measured("scipy", asked, partial(brute, csc, mask, K)) for mask in (True, group)]
    {"bm25": bm25, "seismic": seismic, "qdrant": qdrant}[sys.argv[1]](documents, asked, exact, place)
    print("MB on disk:", sum(file.stat().st_blocks * 512 for file in place.rglob("*")) / 1e6)
