"""`raytower tune-fusion`: a weight tuned on dev queries: of rerank beside recall scores, or of words beside vectors."""

from __future__ import annotations

import time
from typing import Any

from raytower.data.queries import QuerySet, read_queries
from raytower.errors import RaytowerError
from raytower.evaluation.config import TuneFusionConfig
from raytower.evaluation.judgements import judge
from raytower.index.hybrid import DEFAULT_WAY, HybridFusion, check_mode
from raytower.index.manifest import HybridEntry
from raytower.index.reader import Index
from raytower.index.shard_build import digest_of
from raytower.index.versions import changing, following, open_manifest, publish
from raytower.retrieval.load import (
    load_engine,
    load_query_engine,
    load_reranker,
    open_index_manifest,
    own_or,
)
from raytower.retrieval.plans import plan_rows
from raytower.retrieval.retriever import Retriever
from raytower.retrieval.tune_fusion import WEIGHTS, check_stores_fusion, store_fusion, tune_on_queries
from raytower.retrieval.tune_hybrid import TunedHybrid, tune_hybrid_on_queries
from raytower.storage import Location


def tune_fusion_on_dev(config: TuneFusionConfig) -> dict[str, Any]:
    """`tune_reranker` where a reranker is given, else `tune_lexical_weight`."""
    return tune_lexical_weight(config) if config.reranker is None else tune_reranker(config, config.reranker)


def tune_reranker(config: TuneFusionConfig, reranker: str) -> dict[str, Any]:
    """Rerank the dev queries, find the weight with the best MRR@10, and store it in the reranker's directory.

    Search, evaluate and serve then use it in the mode that it was tuned in, until another weight is given. Of equal
    weights the smallest is taken, which trusts recall more.

    Returns:
        `weight`, `recall_mrr`, `rerank_mrr` and `fused_mrr` (MRR@10 of recall alone, of the reranker alone, and with
        that weight), `curve` (MRR@10 at each weight), `fusion` (as stored), `stored`, `queries`, `relevant_missing`
        (judged documents that the index does not hold), `queries_without_relevant`, `mode`, `index_version`,
        `reranker`, `seconds`.

    Raises:
        InputError: bad queries, an index that another encoder made or without the mode, or a reranker that cannot store
            a fusion.
    """
    start = time.perf_counter()
    queries = _read(config)
    index = Index.open(config.index)
    check_mode(index.manifest, config.mode)
    name = config.encoder or index.encoder
    engine = load_query_engine(name, config)
    if engine is not None:
        index.check_fingerprint(engine.fingerprint)
    judgements = judge(queries, index)
    retriever = Retriever(
        engine,
        index,
        load_reranker(reranker, config),
        query_prefix=own_or(config.query_prefix, engine.encoder, "query", name) if engine else "",
        mode=config.mode,
        hybrid=HybridFusion.of(index.manifest, config.hybrid),
    )
    tuned = tune_on_queries(
        retriever,
        judgements.texts,
        judgements.relevant,
        recall_k=config.recall_k,
        queries_at_once=config.rows_per_batch,
        own=judgements.own,
    )
    if config.store:
        store_fusion(reranker, tuned)
    return {
        "reranker": reranker,
        "mode": config.mode,
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


def tune_lexical_weight(config: TuneFusionConfig) -> dict[str, Any]:
    """Search the dev queries by vectors and by words, find the share of words with the best MRR@10, and store it.

    It is stored in a new version of the index, for it belongs to its encoder and its documents: mode hybrid uses it
    from then on, wherever the index is searched, until another weight is given or the tokens become others. Of equal
    weights the smallest is taken, which trusts vectors more.

    Returns:
        `weight`, `dense_mrr`, `lexical_mrr` and `fused_mrr` (MRR@10 by vectors, by words, and with that weight),
        `curve` (MRR@10 at each weight), `fusion` (way and weight, as stored), `stored`, `queries`, `relevant_missing`,
        `queries_without_relevant`, `queries_without_words` (they share no token with a document), `index_version` (the
        new one where it is stored), `seconds`.

    Raises:
        InputError: bad queries, an index that another encoder made or that has no lexical side. RaytowerError: another
            version with other tokens was published meanwhile.
    """
    start = time.perf_counter()
    queries = _read(config)
    index = Index.open(config.index)
    check_mode(index.manifest, "hybrid")
    name = config.encoder or index.encoder
    engine = load_engine(name, config)
    index.check_fingerprint(engine.fingerprint)
    judgements = judge(queries, index)
    tuned = tune_hybrid_on_queries(
        Retriever(engine, index, query_prefix=own_or(config.query_prefix, engine.encoder, "query", name)),
        judgements.texts,
        judgements.relevant,
        config.hybrid.fusion or DEFAULT_WAY,
        recall_k=config.recall_k,
        queries_at_once=config.rows_per_batch,
        own=judgements.own,
    )
    version = _stored(config.index, index, tuned, len(judgements.ids)) if config.store else index.version
    return {
        "reranker": None,
        "index_version": version,
        "queries": len(judgements.ids),
        "relevant_missing": judgements.num_missing,
        "queries_without_relevant": judgements.num_without_relevant,
        "queries_without_words": tuned.num_wordless,
        "weight": tuned.fusion.weight,
        "dense_mrr": tuned.dense_mrr,
        "lexical_mrr": tuned.lexical_mrr,
        "fused_mrr": tuned.fused_mrr,
        "curve": [
            {"weight": weight, "mrr@10": value} for weight, value in zip(WEIGHTS, tuned.curve, strict=True)
        ],
        "fusion": {"fusion": tuned.fusion.way, "weight": tuned.fusion.weight},
        "stored": config.store,
        "seconds": round(time.perf_counter() - start, 3),
    }


def _stored(uri: str, tuned_on: Index, tuned: TunedHybrid, num_queries: int) -> str:
    """Publish a version that differs in its weight alone; its name."""
    entry = HybridEntry(fusion=tuned.fusion.way, weight=tuned.fusion.weight, queries=num_queries)
    with changing(Location.of(uri), "tune-fusion") as writer:
        before, meant = writer.manifest.lexical, tuned_on.manifest.lexical
        if before is None or meant is None or before.tokens != meant.tokens:
            raise RaytowerError(
                f"version {writer.manifest.version} of {uri} was published meanwhile, and its texts have other tokens "
                f"than version {tuned_on.version}, on which the weight was tuned; run the command again"
            )
        lexical = before.model_copy(update={"hybrid": entry})
        identity = digest_of({"hybrid": [writer.manifest.version, entry.model_dump()]})
        draft = following(
            writer.manifest, "tune", identity, table_version=writer.table.version, lexical=lexical
        )
        writer.lease.check()
        publish(writer.index, draft, writer.table)
    return draft.version


def plan_tune_fusion(config: TuneFusionConfig) -> dict[str, Any]:
    """Queries, batches and predicted memory; reads the queries and loads the models to count their parameters."""
    queries = _read(config)
    # Without a reranker the queries are searched for by both, whatever the mode.
    mode = config.mode if config.reranker else "hybrid"
    encoder = None if mode == "lexical" else config.encoder or open_manifest(config.index).encoder
    plan = plan_rows(
        len(queries),
        config,
        encoder,
        rows_per_batch=config.rows_per_batch,
        candidates=config.recall_k,
        reranker=config.reranker,
    )
    manifest = open_index_manifest(config.index, plan["fingerprint"], mode)
    return {
        **plan,
        "pairs": len(queries) * config.recall_k if config.reranker else 0,
        "index_rows": manifest.rows,
        "stored": config.store,
    }


def _read(config: TuneFusionConfig) -> QuerySet:
    if config.store and config.reranker is not None:
        check_stores_fusion(config.reranker)
    return read_queries(config.queries.path, config.queries.format, config.queries.split)
