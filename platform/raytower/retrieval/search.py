"""`raytower search`: one question to an index, from the command line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from raytower import escapes
from raytower.index.reader import Index
from raytower.index.versions import open_manifest
from raytower.progress import log
from raytower.retrieval.config import SearchConfig
from raytower.retrieval.load import load_query_engine, load_retriever, open_index_manifest
from raytower.retrieval.plans import plan_rows
from raytower.retrieval.retriever import SearchResult, recall_by

_SHOWN_CHARACTERS = 200


def search(config: SearchConfig) -> dict[str, Any]:
    """The best `k` documents: `index_version`, `mode` and `results`, each with rank, id, score, recall_score and text.

    Fewer come back where fewer than `k` documents match. `score` is what the order goes by: the recall score, or with a
    reranker its logit or what was fused of both. The recall score is the cosine or inner product in mode dense, BM25 in
    mode lexical, and in mode hybrid a sum that compares the documents of this query only.

    Raises:
        InputError: no such index or model, a filter that does not fit the columns, or an encoder that did not make
            the index.
    """
    assert config.query is not None, "many queries are raytower.ranked's"
    index = Index.open(config.index)
    found = open_search(config, index)([config.query])
    if found.num_wordless and config.mode == "hybrid":
        log("the query shares no token with a document, so mode hybrid has what mode dense finds")
    results = [
        {
            "rank": hit.rank,
            "id": hit.id,
            "score": hit.score,
            "recall_score": hit.recall_score,
            "rerank_score": hit.rerank_score,
            "text": hit.text,
            "metadata": hit.metadata,
        }
        for hit in found.hits[0]
    ]
    return {"index_version": index.version, "mode": config.mode, "results": results}


def open_search(config: SearchConfig, index: Index) -> Callable[[Sequence[str]], SearchResult]:
    """The search of a config over an opened index: queries to hits. One query and many go by it.

    Raises:
        InputError: no such model, a filter that does not fit the columns, an encoder that did not make the index, or a
            mode that the index does not have.
    """
    name = config.encoder or index.encoder
    engine = load_query_engine(name, config)
    if engine is not None:
        index.check_fingerprint(engine.fingerprint)
    retriever = load_retriever(engine, index, config, name)
    recall = recall_by(index, config.mode, retriever.hybrid, config.filter)

    def search(queries: Sequence[str]) -> SearchResult:
        return retriever.search(queries, k=config.k, recall_k=config.recall_k, recall=recall)

    return search


def plan_search(config: SearchConfig, num_queries: int = 1, rows_per_batch: int = 1) -> dict[str, Any]:
    """The plan of a search: the memory that it needs, and the index version that it will ask."""
    depth = max(config.k, config.recall_k) if config.reranker else config.k
    encoder = None if config.mode == "lexical" else config.encoder or open_manifest(config.index).encoder
    plan = plan_rows(
        num_queries,
        config,
        encoder,
        rows_per_batch=rows_per_batch,
        candidates=depth,
        reranker=config.reranker,
    )
    manifest = open_index_manifest(config.index, plan["fingerprint"], config.mode)
    return {**plan, "index_version": manifest.version, "index_rows": manifest.rows}


def render_search(result: dict[str, Any]) -> str:
    """Results for people, one a line."""
    if not result["results"]:
        return f"nothing found in version {result['index_version']}"
    lines = []
    for item in result["results"]:
        text = escapes.one_cell(" ".join(item["text"].split()))
        shown = text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + " …"
        lines.append(f"{item['rank']:>3}  {item['score']:8.4f}  {escapes.one_cell(item['id'])}  {shown}")
    return "\n".join(lines)
