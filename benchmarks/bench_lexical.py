"""Lexical search of an index: seconds and bytes of its making, queries a second, and its hits beside bm25s's.

    python benchmarks/bench_lexical.py --work DIR --texts corpus.tsv --queries dev.tsv [--num-queries 1000]

The index has one-dimensional vectors, so that all that it costs is its lexical side. Times are CPU seconds of all
threads, and by the clock; hits are compared for the first 100 queries.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import bm25s
import numpy as np
import pyarrow as pa

from raytower.index.config import TokensConfig
from raytower.index.lexical import LexicalSide, first_entry
from raytower.index.manifest import TABLE_NAME
from raytower.index.table import (
    commit_fragments,
    table_batch,
    table_schema,
    write_fragments,
)
from raytower.index.tokens import tokens
from raytower.storage import Location

_COMPARED = 100
_ALONE = 200
_BATCH_ROWS = 4_096


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--texts", type=Path, required=True, help="a text a line")
    parser.add_argument("--queries", type=Path, required=True, help="a query a line, before a tab or alone")
    parser.add_argument("--rows", type=int, default=406_955)
    parser.add_argument("--num-queries", type=int, default=1_000)
    parser.add_argument("--k", type=int, default=10)
    arguments = parser.parse_args()
    texts = arguments.texts.read_text(encoding="utf-8").splitlines()[: arguments.rows]
    lines = arguments.queries.read_text(encoding="utf-8").splitlines()[: arguments.num_queries]
    queries = [line.split("\t")[0] for line in lines]
    shutil.rmtree(arguments.work, ignore_errors=True)
    arguments.work.mkdir(parents=True)
    index = Location.of(arguments.work)
    figures: dict[str, Any] = {"rows": len(texts), "text_bytes": sum(len(text.encode()) for text in texts)}
    side = made(index, texts, figures)
    searched(side, queries, arguments.k, figures)
    print(json.dumps(figures, indent=1), flush=True)
    compared(side, texts, queries[:_COMPARED], arguments.k, figures)
    print(json.dumps(figures, indent=1))


def made(index: Location, texts: Sequence[str], figures: dict[str, Any]) -> LexicalSide:
    settings = TokensConfig()
    documents = pa.schema([("id", pa.string()), ("text", pa.string())])
    sizes = {}
    for name, has_tokens in (("without", False), ("with", True)):
        schema = table_schema(documents, 1, "float32", has_tokens=has_tokens)

        def batches(schema: pa.Schema = schema) -> Any:
            for start in range(0, len(texts), _BATCH_ROWS):
                part = texts[start : start + _BATCH_ROWS]
                ids = [str(start + number) for number in range(len(part))]
                rows = pa.table({"id": ids, "text": part})
                yield table_batch(rows, np.ones((len(part), 1)), start, schema, settings)

        (index / TABLE_NAME).delete()
        table = clock(
            f"write_{name}_tokens",
            figures,
            lambda batches=batches, schema=schema: commit_fragments(
                index, write_fragments(index, batches(), schema), schema
            ),
        )
        sizes[name] = size_of(index)
    figures["token_bytes"] = sizes["with"] - sizes["without"]
    indexed = clock("inverted_index", figures, table.lexically_indexed)
    figures["inverted_bytes"] = size_of(index) - sizes["with"]
    entry = clock("count", figures, lambda: first_entry(index, indexed, settings))
    figures["count_bytes"] = entry.counts[0].bytes
    manifest: Any = argparse.Namespace(lexical=entry, rows=len(texts))
    return clock("open", figures, lambda: LexicalSide.open(index, manifest, indexed))


def searched(side: LexicalSide, queries: Sequence[str], k: int, figures: dict[str, Any]) -> None:
    side.search(queries[:20], k)
    clock("search", figures, lambda: side.search(queries, k))
    alone = queries[:_ALONE]
    clock("alone", figures, lambda: [side.search([query], k) for query in alone])
    figures["alone_ms_a_query"] = round(figures["alone_cpu_s"] / len(alone) * 1e3, 3)
    terms = clock("search_query_tokens", figures, lambda: [side._terms(query) for query in queries])
    rows = clock("search_candidates", figures, lambda: [side._candidates(one, 50, None) for one in terms])
    clock("search_scores", figures, lambda: side._scores(terms, rows))
    for name in [name for name in figures if name.startswith("search") and name.endswith("_cpu_s")]:
        figures[name.replace("_cpu_s", "_ms_a_query")] = round(figures[name] / len(queries) * 1e3, 3)
    figures["queries_a_cpu_second"] = round(len(queries) / figures["search_cpu_s"], 1)


def compared(
    side: LexicalSide, texts: Sequence[str], queries: Sequence[str], k: int, figures: dict[str, Any]
) -> None:
    settings = TokensConfig()
    model = bm25s.BM25(method="lucene", k1=1.2, b=0.75)
    corpus = [tokens(text, settings) for text in texts]
    clock("bm25s_index", figures, lambda: model.index(corpus, show_progress=False))
    hits = side.search(queries, k)
    wrong = 0
    for query, found in zip(queries, hits.scores, strict=True):
        words = [word for word in tokens(query, settings) if word in model.vocab_dict]
        scores = sum((model.get_scores([word]) for word in words), np.zeros(len(texts)))
        best = np.sort(scores)[::-1][: len(found)]
        wrong += not np.allclose(best, np.where(np.isfinite(found), found, 0), rtol=1e-5)
    figures["queries_unlike_bm25s"] = wrong


def clock(name: str, figures: dict[str, Any], work: Callable[[], Any]) -> Any:
    by_clock, cpu = time.perf_counter(), time.process_time()
    result = work()
    figures[f"{name}_s"] = round(time.perf_counter() - by_clock, 2)
    figures[f"{name}_cpu_s"] = round(time.process_time() - cpu, 2)
    return result


def size_of(index: Location) -> int:
    return sum(info.size or 0 for info in (index / TABLE_NAME).infos(recursive=True))


if __name__ == "__main__":
    main()
