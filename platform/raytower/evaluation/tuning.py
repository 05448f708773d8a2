"""`raytower tune-fusion`: the weight between recall score and rerank logit, tuned on dev queries, for a reranker."""

from __future__ import annotations

import time
from typing import Any

from raytower.data.queries import QuerySet, read_queries
from raytower.evaluation.config import TuneFusionConfig
from raytower.evaluation.judgements import judge
from raytower.index.reader import Index
from raytower.index.versions import open_manifest
from raytower.progress import log
from raytower.retrieval.load import load_engine, load_reranker, open_index_manifest, own_or
from raytower.retrieval.plans import plan_rows
from raytower.retrieval.retriever import Retriever
from raytower.retrieval.tune_fusion import WEIGHTS, check_stores_fusion, store_fusion, tune_on_queries


def tune_fusion_on_dev(config: TuneFusionConfig) -> dict[str, Any]:
    """Rerank the dev queries, find the weight with the best MRR@10, and store it in the reranker's directory.

    Search, evaluate and serve then use it, until another weight is given. Of equal weights the smallest is taken,
    which trusts recall more.

    Returns:
        `weight`, `recall_mrr`, `rerank_mrr` and `fused_mrr` (MRR@10 of recall alone, of the reranker alone, and with
        that weight), `curve` (MRR@10 at each weight), `fusion` (as stored), `stored`, `queries`, `relevant_missing`
        (judged documents that the index does not hold), `queries_without_relevant`, `index_version`, `reranker`,
        `seconds`.

    Raises:
        InputError: bad queries, an index that another encoder made, or a reranker that cannot store a fusion.
    """
    start = time.perf_counter()
    queries = _read(config)
    index = Index.open(config.index)
    engine = load_engine(config.encoder or index.encoder, config)
    index.check_fingerprint(engine.fingerprint)
    judgements = judge(queries, index)
    if judgements.num_missing:
        log(f"{judgements.num_missing:,} relevant documents are not in the index; they count as missed")
    prefix = own_or(config.query_prefix, engine.encoder, "query", config.encoder or index.encoder)
    scorer = load_reranker(config.reranker, config)
    tuned = tune_on_queries(
        Retriever(engine, index, scorer, query_prefix=prefix),
        judgements.texts,
        judgements.relevant,
        recall_k=config.recall_k,
        queries_at_once=config.rows_per_batch,
    )
    if config.store:
        store_fusion(config.reranker, tuned)
    return {
        "reranker": config.reranker,
        "index_version": index.version,
        "queries": len(judgements.ids),
        "relevant_missing": judgements.num_missing,
        "queries_without_relevant": judgements.num_without_relevant,
        "weight": tuned.fusion.weight,
        "recall_mrr": tuned.recall_mrr,
        "rerank_mrr": tuned.rerank_mrr,
        "fused_mrr": tuned.fused_mrr,
        "curve": [
            {"weight": weight, "mrr@10": value} for weight, value in zip(WEIGHTS, tuned.curve, strict=True)
        ],
        "fusion": tuned.fusion.to_dict(),
        "stored": config.store,
        "seconds": round(time.perf_counter() - start, 3),
    }


def plan_tune_fusion(config: TuneFusionConfig) -> dict[str, Any]:
    """Queries, batches and predicted memory; reads the queries and loads the models to count their parameters."""
    queries = _read(config)
    encoder = config.encoder or open_manifest(config.index).encoder
    plan = plan_rows(
        len(queries),
        config,
        encoder,
        rows_per_batch=config.rows_per_batch,
        candidates=config.recall_k,
        reranker=config.reranker,
    )
    manifest = open_index_manifest(config.index, plan["fingerprint"])
    return {
        **plan,
        "pairs": len(queries) * config.recall_k,
        "index_rows": manifest.rows,
        "stored": config.store,
    }


def _read(config: TuneFusionConfig) -> QuerySet:
    if config.store:
        check_stores_fusion(config.reranker)
    return read_queries(config.queries.path, config.queries.format, config.queries.split)
