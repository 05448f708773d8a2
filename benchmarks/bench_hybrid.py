"""Hybrid search beside dense and lexical search, zero-shot: recall with paired intervals, and time for a query.

    python benchmarks/bench_hybrid.py --work DIR [--queries 600] [--corpus 3400] [--threads 1] [--first]
    python benchmarks/bench_hybrid.py --work DIR --timed-rows 406955

Dev queries of zh_questions, drawn from all or the first ones, against a corpus sample that holds every relevant text,
by exact search. Vectors are kept in DIR. `--timed-rows` measures time alone, over so many texts of the corpus with
vectors drawn by chance, in lists of codes that are scored again. "Tuned" weights are of the other half of the queries,
so that no query is judged by what it was tuned on. The rows "fixed constants" standardise by means and deviations of
all queries, as models.fusion.Fusion does for rerankers.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from questions import DEFAULT_DATA, DEFAULT_MODEL, MAX_LENGTH, PREFIX, DevSample, dev_sample, read_lines
from synthetic import blocks_of, clustered, write_embeddings

from raytower.index.build import build_index
from raytower.index.config import IndexBuildConfig
from raytower.index.hybrid import Candidates, HybridFusion, best_of, search_hybrid, unite
from raytower.index.reader import Index
from raytower.index.tasks import Run
from raytower.metrics import bootstrap_interval, ranking_metrics
from raytower.models.encoder import Encoder
from raytower.models.forward import ForwardEngine
from raytower.models.fusion import Fusion
from raytower.retrieval.tune_hybrid import tune_hybrid

_KS = (1, 10, 50)
_DEPTH = 50
_WEIGHTS = (0.1, 0.2, 0.3, 0.4, 0.5)
Rows = list[list[int]]
Floats = NDArray[np.float64]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA)
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL)
    parser.add_argument("--queries", type=int, default=600)
    parser.add_argument("--corpus", type=int, default=3_400)
    parser.add_argument("--timed", type=int, default=200, help="queries that are timed, one after the other")
    parser.add_argument("--first", action="store_true", help="the first dev queries in place of drawn ones")
    parser.add_argument("--timed-rows", type=int)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    drawn = not arguments.first
    dev = dev_sample(arguments.data, arguments.corpus, arguments.queries, drawn_queries=drawn)
    engine = ForwardEngine(Encoder.load(arguments.model), max_length=MAX_LENGTH)
    if arguments.timed_rows is not None:
        texts = read_lines(arguments.data / "zh_questions" / "recall" / "corpus.tsv")[: arguments.timed_rows]
        index = built(arguments.work, texts, clustered(len(texts), engine.dim), "ivf_sq8")
        timing(index, engine, dev.queries[: arguments.timed])
        in_batches(index, engine, dev.queries[: arguments.timed])
        return
    queries, documents = encoded(arguments.work, engine, dev)
    index = built(arguments.work, dev.corpus, documents)
    quality(index, dev, queries)
    timing(index, engine, dev.queries[: arguments.timed])
    in_batches(index, engine, dev.queries[: arguments.timed])


def encoded(
    work: Path, engine: ForwardEngine, dev: DevSample
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    work.mkdir(parents=True, exist_ok=True)
    kept = work / f"vectors-{len(dev.queries)}-{len(dev.corpus)}.npz"
    if not kept.is_file():
        started = time.perf_counter()
        queries, documents = engine.encode(dev.queries, PREFIX), engine.encode(dev.corpus, PREFIX)
        rate = (len(queries) + len(documents)) / (time.perf_counter() - started)
        print(f"encoded {rate:.0f} texts/s", flush=True)
        np.savez(kept, queries=queries, documents=documents)
    with np.load(kept) as found:
        return found["queries"], found["documents"]


def built(work: Path, corpus: Sequence[str], documents: NDArray[np.float32], kind: str = "flat") -> Index:
    for name in ("embeddings", "index"):
        shutil.rmtree(work / name, ignore_errors=True)
    table = pa.table({"id": [str(row) for row in range(len(corpus))], "text": list(corpus)})
    write_embeddings(work / "embeddings", blocks_of(documents), documents.shape[1], table)
    config = {"embeddings": str(work / "embeddings"), "output": str(work / "index"), "kind": kind}
    build_index(IndexBuildConfig.model_validate(config), run=Run())
    return Index.open(str(work / "index"))


def quality(index: Index, dev: DevSample, queries: NDArray[np.float32]) -> None:
    dense, lexical = index.search(queries, _DEPTH), index.search_lexical(dev.queries, _DEPTH)
    candidates = unite(index, dev.queries, queries, dense, lexical)
    relevance = [np.isin(each.rows, places) for each, places in zip(candidates, dev.relevant, strict=True)]
    base = recalls([row[row >= 0].tolist() for row in dense.rows], dev)
    print(f"{len(dev.queries)} queries, {len(dev.corpus)} texts; less dense alone, paired")
    show("dense", base, None)
    show("lexical", recalls([row[row >= 0].tolist() for row in lexical.rows], dev), base)
    for way in ("standardised", "reciprocal_ranks"):
        for weight in _WEIGHTS:
            fusion = HybridFusion(way=way, weight=weight)
            show(f"{way} {weight}", recalls(ranked(candidates, fusion), dev), base)
        halves = [np.arange(len(candidates)) % 2 == half for half in (0, 1)]
        lists: Rows = [[] for _ in candidates]
        weights = []
        for mine, other in (halves, halves[::-1]):
            tuned = tune_hybrid(*(_where(values, other) for values in (candidates, relevance)), way)
            weights.append(tuned.fusion.weight)
            for place, rows in zip(
                np.flatnonzero(mine), ranked(_where(candidates, mine), tuned.fusion), strict=True
            ):
                lists[place] = rows
        show(f"{way}, tuned {weights}", recalls(lists, dev), base)
    for weight in _WEIGHTS:
        show(f"fixed constants {weight}", recalls(by_fixed_constants(candidates, weight), dev), base)


def by_fixed_constants(candidates: Sequence[Candidates], weight: float) -> Rows:
    dense = np.concatenate([each.dense for each in candidates])
    lexical = np.concatenate([each.lexical for each in candidates])
    fusion = Fusion(
        weight=weight,
        recall_mean=float(dense.mean()),
        recall_std=float(dense.std()),
        rerank_mean=float(lexical.mean()),
        rerank_std=float(lexical.std()),
    )
    return [
        each.rows[np.argsort(-fusion.fuse(each.dense, each.lexical), kind="stable")].tolist()
        for each in candidates
    ]


def ranked(candidates: Sequence[Candidates], fusion: HybridFusion) -> Rows:
    return [row[row >= 0].tolist() for row in best_of(candidates, fusion, max(_KS)).rows]


def recalls(lists: Rows, dev: DevSample) -> dict[str, Floats]:
    ids = [[str(row) for row in rows] for rows in lists]
    judged = [{str(place): 1.0 for place in places} for places in dev.relevant]
    values = ranking_metrics(ids, judged, _KS)
    return {f"recall@{k}": values[f"recall@{k}"] for k in _KS}


def show(name: str, values: dict[str, Floats], base: dict[str, Floats] | None) -> None:
    cells = []
    for metric, found in values.items():
        cell = f"{found.mean():.3f}"
        if base is not None:
            low, high = bootstrap_interval(found - base[metric])
            cell += f" ({(found - base[metric]).mean():+.3f} [{low:+.3f}, {high:+.3f}])"
        cells.append(cell)
    print(f"| {name} | {' | '.join(cells)} |", flush=True)


def timing(index: Index, engine: ForwardEngine, queries: Sequence[str]) -> None:
    """Milliseconds of processor time and by the clock, one query after the other, in turns."""
    fusion = HybridFusion()

    def dense(query: str) -> None:
        index.search(engine.encode([query], PREFIX), 10)

    def lexical(query: str) -> None:
        index.search_lexical([query], 10)

    def hybrid(query: str) -> None:
        search_hybrid(index, [query], engine.encode([query], PREFIX), 10, fusion)

    ways: dict[str, Callable[[str], None]] = {"dense": dense, "lexical": lexical, "hybrid": hybrid}
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for query in queries:
        for name, way in ways.items():
            cpu, clock = time.process_time(), time.perf_counter()
            way(query)
            taken[name].append((time.process_time() - cpu, time.perf_counter() - clock))
    for name, times in taken.items():
        cpu, clock = np.median(np.array(times[5:]), axis=0) * 1000
        print(f"{name}: {cpu:.1f} ms of processor time, {clock:.1f} ms (medians of {len(times) - 5} queries)")


def in_batches(index: Index, engine: ForwardEngine, queries: list[str]) -> None:
    """Milliseconds of processor time and by the clock for each of 64 queries at a time, as files are searched."""
    fusion, batches = HybridFusion(), [queries[start : start + 64] for start in range(0, len(queries), 64)]
    for name in ("dense", "hybrid"):
        cpu, clock = time.process_time(), time.perf_counter()
        for batch in batches:
            vectors = engine.encode(batch, PREFIX)
            if name == "dense":
                index.search(vectors, 10)
            else:
                search_hybrid(index, batch, vectors, 10, fusion)
        took = (time.process_time() - cpu) * 1000, (time.perf_counter() - clock) * 1000
        print(
            f"{name}, 64 at a time: {took[0] / len(queries):.1f} ms of processor time, {took[1] / len(queries):.1f} ms"
        )


def _where(values: Sequence, chosen: NDArray[np.bool_]) -> list:
    return [value for value, taken in zip(values, chosen, strict=True) if taken]


if __name__ == "__main__":
    main()
