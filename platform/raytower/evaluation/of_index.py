"""Metrics of an index on judged queries, with or without a reranker."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

from raytower.data.queries import QuerySet, read_queries
from raytower.evaluation.config import EvaluateConfig
from raytower.evaluation.in_shares import has_shares, measure_in_shares, plan_shares, put_together
from raytower.evaluation.judgements import absent_text, judge, judge_by_table
from raytower.evaluation.measured import Measured, report_of
from raytower.evaluation.measures import Measures
from raytower.evaluation.page import evaluation_plots
from raytower.evaluation.passes import depth_of, nothing_yet, search_batch
from raytower.evaluation.reports import RUN_NAME, check_outputs, open_run, write_drawings, write_reports
from raytower.evaluation.stages import OtherStages, loss_by_stage, recall_against_time
from raytower.index.reader import Index
from raytower.index.table import DocumentTable
from raytower.index.versions import open_manifest
from raytower.progress import Progress, log
from raytower.retrieval.load import load_query_engine, load_retriever, open_index_manifest
from raytower.retrieval.lookup import find_in_table
from raytower.retrieval.plans import plan_rows
from raytower.retrieval.retriever import Retriever
from raytower.storage import Location


def evaluate_index(config: EvaluateConfig) -> dict[str, Any]:
    """Search every query and measure.

    Returns:
        `queries`, each metric by its name (of the final order), `intervals` (95 %, by metric name: Wilson's where every
        value is 0 or 1, else a bootstrap), `unjudged` (documents among the first k of all lists that nobody judged, by
        k), `auc` (of the final order; see `ScoreSample.areas`), `relevant_missing` (judged documents that the index
        does not hold; they count as missed), `queries_without_relevant` (left out), `identical_ids` (documents left out
        because their id is the query's), `queries_in_corpus` (queries of pairs whose text the
        index holds, left out of their own answers), `reranked`, `recall_stage` (the metrics before reranking, null
        without a reranker), `mode`,
        `queries_without_words` (they share no token with a document; mode hybrid has for them what dense has, lexical
        nothing), `index_version`, `seconds`, `queries_per_second`, `output`; with `stages` `loss_by_stage` (see
        there) and `stages_seconds`.

    Raises:
        InputError: bad queries, an index that another encoder made, a fusion weight or a metric that cannot be used.
        MissingExtraError: a metric of ir-measures, which is not installed.
    """
    assert config.index is not None  # the config refused it otherwise
    start = time.perf_counter()
    check_outputs(config)
    measures = Measures(config.metrics, config.k)
    queries = _read(config)
    name = _encoder_name(config)
    if has_shares(config, len(queries)):
        return _evaluate_in_shares(config, queries, measures, name, start)
    engine = load_query_engine(name, config)
    index = Index.open(config.index, encoder_fingerprint=engine.fingerprint if engine else None)
    if on_gpu := index.use_gpu():
        log(f"{on_gpu} of {len(index.shards)} shards are searched on the GPU")
    judgements = judge(queries, index)
    retriever = load_retriever(engine, index, config, name)
    searching = time.perf_counter()
    depth = depth_of(config, measures)
    measured = nothing_yet(config, measures, judgements, depth)
    others = None
    if config.stages:
        others = OtherStages(index, config.mode, depth + measured.num_spare, measured)
    _measure(retriever, measured, config, others)
    now = time.perf_counter()
    stages_seconds = others.seconds if others is not None else 0.0
    result = {
        **measured.summary(),
        "mode": config.mode,
        "queries_without_words": measured.wordless,
        "index_version": index.version,
        "seconds": round(now - start, 3),
        "queries_per_second": round(len(judgements.ids) / (now - searching - stages_seconds), 1),
        "output": config.output,
    }
    curve: list[dict[str, Any]] = []
    if others is not None:
        result["loss_by_stage"] = loss_by_stage(measured.stages, config.k, config.seed)
        result["stages_seconds"] = round(stages_seconds, 3)
        curve = recall_against_time(index, others.sample, measured, depth + measured.num_spare)
    if config.output is not None or config.plots is not None:
        settings = {"encoder": name, **_settings_of(retriever, index, config)}
        _write(config, result, measured, settings, curve, index.table)
    return result


def _evaluate_in_shares(
    config: EvaluateConfig, queries: QuerySet, measures: Measures, encoder: str, start: float
) -> dict[str, Any]:
    """As `evaluate_index`, in shares of the queries."""
    assert config.index is not None
    together = put_together(config, open_manifest(config.index), encoder)
    table = DocumentTable.open(Location.of(config.index), together.manifest.table_version)
    judgements = judge_by_table(queries, table)
    searching = time.perf_counter()
    measured, num_done = measure_in_shares(config, together, judgements, measures)
    now = time.perf_counter()
    result = {
        **measured.summary(),
        "mode": config.mode,
        "queries_without_words": measured.wordless,
        "index_version": together.manifest.version,
        "seconds": round(now - start, 3),
        "queries_per_second": round(num_done / (now - searching), 1),
        "output": config.output,
    }
    _write(config, result, measured, {"encoder": encoder, **together.settings}, [], table)
    return result


def _settings_of(retriever: Retriever, index: Index, config: EvaluateConfig) -> dict[str, Any]:
    """What decided the figures beside the config: prefix, fusions, and which index it was."""
    return {
        "query_prefix": retriever.query_prefix,
        "fingerprint": index.fingerprint,
        "index_version": index.version,
        "index_rows": index.num_rows,
        "fusion": retriever.fusion.to_dict() if retriever.fusion else None,
        "hybrid": asdict(retriever.hybrid) if config.mode == "hybrid" and retriever.hybrid else None,
    }


def _write(
    config: EvaluateConfig,
    result: dict[str, Any],
    measured: Measured,
    settings: dict[str, Any],
    curve: list[dict[str, Any]],
    table: DocumentTable,
) -> None:
    """The report, and drawings where they are asked for. `curve` is recall against time, a record a point."""
    judgements = measured.judgements
    wanted = {
        doc_id
        for place in measured.worst_places
        for doc_id in judgements.relevant[place]
        if absent_text(doc_id) is None
    }
    texts = find_in_table(table, "id", wanted, "text")
    report = report_of(result, measured, {**config.model_dump(mode="json"), **settings}, texts)
    report["figures"]["recall_against_time"] = curve
    write_drawings(config, evaluation_plots(report))
    if config.output is not None:
        write_reports(Location.of(config.output), report, judgements, measured.values)


def plan_index(config: EvaluateConfig) -> dict[str, Any]:
    """Queries, batches, parts, workers (1: this process) and the predicted memory of each.

    Reads the queries and loads the models to count their parameters.
    """
    assert config.index is not None  # the config refused it otherwise
    check_outputs(config)
    depth = depth_of(config, Measures(config.metrics, config.k))
    queries = _read(config)
    plan = plan_rows(
        len(queries),
        config,
        None if config.mode == "lexical" else _encoder_name(config),
        rows_per_batch=config.rows_per_batch,
        candidates=depth,
        reranker=config.reranker,
    )
    manifest = open_index_manifest(config.index, plan["fingerprint"], config.mode)
    return {
        **plan,
        **plan_shares(config, len(queries)),
        "queries": len(queries),
        "reranked_pairs": len(queries) * min(config.recall_k, manifest.rows) if config.reranker else 0,
        "index_version": manifest.version,
        "index_rows": manifest.rows,
    }


def _read(config: EvaluateConfig) -> QuerySet:
    assert config.queries is not None  # the config refused it otherwise
    return read_queries(config.queries.path, config.queries.format, config.queries.split)


def _encoder_name(config: EvaluateConfig) -> str:
    assert config.index is not None
    return config.encoder or open_manifest(config.index).encoder


def _measure(
    retriever: Retriever, measured: Measured, config: EvaluateConfig, others: OtherStages | None
) -> Measured:
    """Search all queries in batches; where there is an output, run.trec is written on the way."""
    judgements = measured.judgements
    total = len(judgements.ids)
    progress = Progress("evaluated", "queries", total)
    with ExitStack() as stack:
        run = None
        if config.output is not None:
            run = stack.enter_context(open_run(Location.of(config.output) / RUN_NAME))
        for start in range(0, total, config.rows_per_batch):
            part = slice(start, min(start + config.rows_per_batch, total))
            ranked = search_batch(retriever, part, config, measured, others)
            if run is not None:
                for query_id, hits in zip(judgements.ids[part], ranked, strict=True):
                    run.write(query_id, [(hit.id, hit.score) for hit in hits])
            progress.advance(len(ranked))
    if others is not None:
        others.finish()
    return measured
