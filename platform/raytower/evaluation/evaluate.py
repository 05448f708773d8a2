"""`raytower evaluate`: recall, MRR and nDCG of an index on judged queries, with or without a reranker."""

from __future__ import annotations

import heapq
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from raytower.data.queries import read_queries
from raytower.evaluation.config import EvaluateConfig
from raytower.evaluation.judgements import Judgements, absent_text, judge
from raytower.evaluation.reports import RUN_NAME, check_reports_output, open_run, write_reports
from raytower.index.reader import Index
from raytower.index.versions import open_manifest
from raytower.metrics import MRR_DEPTH, NDCG_DEPTH, Floats, bootstrap_interval, ranking_metrics
from raytower.progress import Progress, log
from raytower.retrieval.load import load_query_engine, load_retriever, open_index_manifest
from raytower.retrieval.lookup import find_documents
from raytower.retrieval.plans import plan_rows
from raytower.retrieval.retriever import Hit, Retriever, count_wordless, recall_order
from raytower.storage import Location

_WORST_QUERIES = 20
_SHOWN_HITS = 5
_RANKING_METRIC = f"mrr@{MRR_DEPTH}"  # what the worst queries are chosen by


@dataclass(frozen=True)
class _WorstQuery:
    value: float
    place: int
    hits: Sequence[Hit] = field(compare=False)

    def __lt__(self, other: _WorstQuery) -> bool:
        # For a heap whose first item is the least bad one: the highest value, of equals the latest query.
        return (self.value, self.place) > (other.value, other.place)


@dataclass
class _Measured:
    """What was measured so far: per-query values by metric, of the final order and of recall alone."""

    final: list[dict[str, Floats]] = field(default_factory=list)
    recall: list[dict[str, Floats]] = field(default_factory=list)
    worst: list[_WorstQuery] = field(default_factory=list)
    wordless: int = 0
    milliseconds: dict[str, float] = field(
        default_factory=lambda: {"encode": 0.0, "recall": 0.0, "rerank": 0.0}
    )


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Search every query and measure.

    Returns:
        `queries`, each metric by its name (of the final order), `intervals` (95 % bootstrap, by metric name),
        `relevant_missing` (judged documents that the index does not hold; they count as missed),
        `queries_without_relevant` (left out), `reranked`, `recall_stage` (the metrics before reranking, null without
        a reranker), `mode`, `queries_without_words` (they share no token with a document; mode hybrid has for them what
        dense has, lexical nothing), `index_version`, `seconds`, `queries_per_second`, `output`.

    Raises:
        InputError: bad queries, an index that another encoder made, a fusion weight that cannot be used.
    """
    start = time.perf_counter()
    if config.output is not None:
        check_reports_output(config.output)
    queries = read_queries(config.queries.path, config.queries.format, config.queries.split)
    name = _encoder_name(config)
    engine = load_query_engine(name, config)
    index = Index.open(config.index, encoder_fingerprint=engine.fingerprint if engine else None)
    if on_gpu := index.use_gpu():
        log(f"{on_gpu} of {len(index.shards)} shards are searched on the GPU")
    judgements = judge(queries, index)
    if judgements.num_missing:
        log(f"{judgements.num_missing:,} relevant documents are not in the index; they count as missed")
    retriever = load_retriever(engine, index, config, name)
    searching = time.perf_counter()
    measured = _measure(retriever, judgements, config)
    now = time.perf_counter()
    result = {
        **_summary(measured, judgements, config),
        "mode": config.mode,
        "queries_without_words": measured.wordless,
        "index_version": index.version,
        "seconds": round(now - start, 3),
        "queries_per_second": round(len(judgements.ids) / (now - searching), 1),
        "output": config.output,
    }
    if config.output is not None:
        worst = _describe_worst(measured, judgements, index)
        settings = {
            **config.model_dump(mode="json"),
            "encoder": name,
            "query_prefix": retriever.query_prefix,
            "fingerprint": index.fingerprint,
            "index_version": index.version,
            "index_rows": index.num_rows,
            "fusion": retriever.fusion.to_dict() if retriever.fusion else None,
            "hybrid": asdict(retriever.hybrid) if config.mode == "hybrid" and retriever.hybrid else None,
        }
        write_reports(Location.of(config.output), _report(result, measured, settings, worst))
    return result


def plan_evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Queries, batches and predicted memory; reads the queries and loads the models to count their parameters."""
    if config.output is not None:
        check_reports_output(config.output)
    queries = read_queries(config.queries.path, config.queries.format, config.queries.split)
    plan = plan_rows(
        len(queries),
        config,
        None if config.mode == "lexical" else _encoder_name(config),
        rows_per_batch=config.rows_per_batch,
        candidates=_depth(config),
        reranker=config.reranker,
    )
    manifest = open_index_manifest(config.index, plan["fingerprint"], config.mode)
    return {
        **plan,
        "queries": len(queries),
        "reranked_pairs": len(queries) * min(config.recall_k, manifest.rows) if config.reranker else 0,
        "index_version": manifest.version,
        "index_rows": manifest.rows,
    }


def _encoder_name(config: EvaluateConfig) -> str:
    return config.encoder or open_manifest(config.index).encoder


def _measure(retriever: Retriever, judgements: Judgements, config: EvaluateConfig) -> _Measured:
    """Search all queries in batches; where there is an output, run.trec is written on the way."""
    measured = _Measured()
    total = len(judgements.ids)
    progress = Progress("evaluated", "queries", total)
    with ExitStack() as stack:
        run = None
        if config.output is not None:
            run = stack.enter_context(open_run(Location.of(config.output) / RUN_NAME))
        for start in range(0, total, config.rows_per_batch):
            part = slice(start, start + config.rows_per_batch)
            ranked = _search(retriever, judgements, part, config, measured)
            for place, hits in enumerate(ranked, start=start):
                if run is not None:
                    run.write(judgements.ids[place], [(hit.id, hit.score) for hit in hits])
                value = float(measured.final[-1][_RANKING_METRIC][place - start])
                _keep_worst(measured.worst, _WorstQuery(value, place, hits[:_SHOWN_HITS]))
            progress.advance(len(ranked))
    return measured


def _search(
    retriever: Retriever, judgements: Judgements, part: slice, config: EvaluateConfig, measured: _Measured
) -> list[list[Hit]]:
    """Search one batch of queries, add its metrics and times to `measured`, and return its final order."""
    texts, relevant = judgements.texts[part], judgements.relevant[part]
    times = [time.perf_counter()]
    vectors = retriever.encode(texts)
    times.append(time.perf_counter())
    candidates = retriever.recall(vectors, _depth(config))
    measured.wordless += count_wordless(candidates, config.mode)
    times.append(time.perf_counter())
    by_recall = [recall_order(items) for items in candidates]
    final = by_recall
    if retriever.scorer is not None:
        final = retriever.rerank(texts, candidates, config.recall_k)
        measured.recall.append(_metrics(by_recall, relevant, config.k, judgements))
    times.append(time.perf_counter())
    measured.final.append(_metrics(final, relevant, config.k, judgements))
    for name, seconds in zip(("encode", "recall", "rerank"), np.diff(times), strict=True):
        measured.milliseconds[name] += float(seconds) * 1000
    return final


def _metrics(
    ranked: Sequence[Sequence[Hit]],
    relevant: Sequence[Mapping[str, float]],
    ks: Sequence[int],
    judgements: Judgements,
) -> dict[str, Floats]:
    counted = [
        judgements.counted_once([hit.id for hit in hits], judged)
        for hits, judged in zip(ranked, relevant, strict=True)
    ]
    return ranking_metrics([ids for ids, _ in counted], [judged for _, judged in counted], ks)


def _depth(config: EvaluateConfig) -> int:
    deepest = max(*config.k, MRR_DEPTH, NDCG_DEPTH)
    return max(deepest, config.recall_k) if config.reranker else deepest


def _keep_worst(heap: list[_WorstQuery], item: _WorstQuery) -> None:
    if item.value >= 1:
        return
    if len(heap) < _WORST_QUERIES:
        heapq.heappush(heap, item)
    else:
        heapq.heappushpop(heap, item)


def _summary(measured: _Measured, judgements: Judgements, config: EvaluateConfig) -> dict[str, Any]:
    final = _with_intervals(measured.final, config.seed)
    return {
        "queries": len(judgements.ids),
        **{name: metric["value"] for name, metric in final.items()},
        "intervals": {name: [metric["low"], metric["high"]] for name, metric in final.items()},
        "relevant_missing": judgements.num_missing,
        "queries_without_relevant": judgements.num_without_relevant,
        "reranked": bool(measured.recall),
        "recall_stage": {
            name: metric["value"] for name, metric in _with_intervals(measured.recall, config.seed).items()
        }
        or None,
    }


def _with_intervals(parts: Sequence[dict[str, Floats]], seed: int) -> dict[str, dict[str, float]]:
    result = {}
    for name in parts[0] if parts else ():
        values = np.concatenate([part[name] for part in parts])
        low, high = bootstrap_interval(values, seed=seed)
        result[name] = {"value": float(values.mean()), "low": low, "high": high}
    return result


def _describe_worst(measured: _Measured, judgements: Judgements, index: Index) -> list[dict[str, Any]]:
    items = sorted(measured.worst, key=lambda item: (item.value, item.place))
    wanted = {
        doc_id for item in items for doc_id in judgements.relevant[item.place] if absent_text(doc_id) is None
    }
    texts = find_documents(index, "id", wanted, "text")
    described = []
    for item in items:
        relevant = judgements.relevant[item.place]
        described.append(
            {
                "query_id": judgements.ids[item.place],
                "query": judgements.texts[item.place],
                _RANKING_METRIC: item.value,
                "relevant": [_describe_relevant(doc_id, texts) for doc_id in list(relevant)[:_SHOWN_HITS]],
                "hits": [
                    {**asdict(hit), "metadata": {}, "relevant": relevant.get(hit.id, 0) > 0}
                    for hit in item.hits
                ],
            }
        )
    return described


def _describe_relevant(doc_id: str, texts: Mapping[str, list[str]]) -> str:
    text = absent_text(doc_id)
    if text is not None:
        return f"{text} (not in the index)"
    return f"{doc_id}: {texts[doc_id][0]}" if doc_id in texts else f"{doc_id} (not in the index)"


def _report(
    result: Mapping[str, Any], measured: _Measured, settings: Mapping[str, Any], worst: list[dict[str, Any]]
) -> dict[str, Any]:
    seed = int(settings["seed"])
    reranked = bool(measured.recall)
    stages = [
        {
            "title": "recall, then rerank" if reranked else "recall",
            "metrics": _with_intervals(measured.final, seed),
        }
    ]
    if reranked:
        stages.insert(0, {"title": "recall alone", "metrics": _with_intervals(measured.recall, seed)})
    counts = ("queries", "queries_without_relevant", "relevant_missing", "seconds", "queries_per_second")
    return {
        **result,
        "counts": {name: result[name] for name in counts},
        "stages": stages,
        "milliseconds": {name: round(value, 1) for name, value in measured.milliseconds.items()},
        "settings": dict(settings),
        "worst_queries": worst,
    }
