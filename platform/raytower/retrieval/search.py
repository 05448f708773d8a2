"""`raytower search`: one question to an index, from the command line."""

from __future__ import annotations

from typing import Any

from raytower import escapes
from raytower.index.reader import Index, check_fingerprint
from raytower.index.versions import open_manifest
from raytower.retrieval.config import SearchConfig
from raytower.retrieval.load import load_engine, load_retriever
from raytower.retrieval.plans import plan_rows
from raytower.retrieval.retriever import index_recall

_SHOWN_CHARACTERS = 200


def search(config: SearchConfig) -> dict[str, Any]:
    """The best `k` documents: `index_version` and `results`, each with rank, id, score, recall_score and text.

    Fewer come back where fewer than `k` documents match.

    Raises:
        InputError: no such index or model, a filter that does not fit the columns, or an encoder that did not make
            the index.
    """
    index = Index.open(config.index)
    engine = load_engine(config.encoder or index.manifest.encoder, config)
    index.check_fingerprint(engine.fingerprint)
    retriever = load_retriever(engine, index, config, config.encoder or index.encoder)
    recall = index_recall(index, config.filter)
    found = retriever.search([config.query], k=config.k, recall_k=config.recall_k, recall=recall)
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
    return {"index_version": index.version, "results": results}


def plan_search(config: SearchConfig) -> dict[str, Any]:
    """The plan of a search: the memory that it needs, and the index version that it will ask."""
    manifest = open_manifest(config.index)
    depth = max(config.k, config.recall_k) if config.reranker else config.k
    encoder = config.encoder or manifest.encoder
    plan = plan_rows(1, config, encoder, rows_per_batch=1, candidates=depth, reranker=config.reranker)
    check_fingerprint(manifest, plan["fingerprint"])
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
