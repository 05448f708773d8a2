"""Searching judged queries in an index and measuring what is found: a batch of them, and what is kept of it."""

from __future__ import annotations

import time

import numpy as np

from raytower.evaluation.config import EvaluateConfig
from raytower.evaluation.figures import ScoreSample, curve_ks
from raytower.evaluation.judgements import Judgements
from raytower.evaluation.measured import Measured
from raytower.evaluation.measures import Measures
from raytower.evaluation.stages import OtherStages
from raytower.metrics import MRR_DEPTH, NDCG_DEPTH
from raytower.models.search_mode import SearchMode
from raytower.retrieval.retriever import Candidate, Hit, Retriever, count_wordless, recall_order, without_own

# The stage that a mode's recall is.
_STAGE_OF: dict[SearchMode, str] = {"dense": "index", "lexical": "lexical", "hybrid": "fusion"}


def nothing_yet(config: EvaluateConfig, measures: Measures, judgements: Judgements, depth: int) -> Measured:
    """What queries are measured into; for stages and for pictures with more than the metrics need."""
    measured = Measured(
        measures, judgements, config.k, config.seed, ignores_identical=config.ignore_identical_ids
    )
    measured.scores = ScoreSample(len(judgements.ids), depth)
    if config.stages or config.output is not None or config.plots is not None:
        measured.curve_ks = curve_ks(config.k, depth)
    return measured


def search_batch(
    retriever: Retriever,
    part: slice,
    config: EvaluateConfig,
    measured: Measured,
    others: OtherStages | None,
) -> list[list[Hit]]:
    """Search one batch of queries, add its metrics and times to `measured`, and return its final order."""
    texts = measured.judgements.texts[part]
    depth = depth_of(config, measured.measures)
    times = [time.perf_counter()]
    encoded = retriever.encode(texts)
    times.append(time.perf_counter())
    # More where some may be left out.
    candidates = retriever.recall(encoded, depth + measured.num_spare)
    measured.wordless += count_wordless(candidates, config.mode)
    if measured.num_spare:
        candidates = _without_own(candidates, part, measured, depth)
    times.append(time.perf_counter())
    by_recall = [recall_order(items) for items in candidates]
    final = by_recall
    if retriever.scorer is not None:
        final = retriever.rerank(texts, candidates, config.recall_k)
        measured.add_recall(part, _ids(by_recall))
    times.append(time.perf_counter())
    if others is not None:
        others.add(part, encoded)
    measured.add_stage(_STAGE_OF[config.mode], part, _ids(by_recall))
    if retriever.scorer is not None:
        measured.add_stage("reranker", part, _ids(final))
    measured.add(part, _ids(final), final)
    measured.add_scores(part, _ids(final), [[hit.score for hit in hits] for hits in final])
    for name, seconds in zip(("encode", "recall", "rerank"), np.diff(times), strict=True):
        measured.milliseconds[name] += float(seconds) * 1000
    return final


def _ids(ranked: list[list[Hit]]) -> list[list[str]]:
    return [[hit.id for hit in hits] for hits in ranked]


def _without_own(
    candidates: list[list[Candidate]], part: slice, measured: Measured, depth: int
) -> list[list[Candidate]]:
    """At most `depth` candidates of each query, without those that are the query's own text or have its id."""
    if measured.ignores_identical:
        ids = measured.judgements.ids[part]
        measured.identical_ids += sum(
            item.id == query_id for query_id, items in zip(ids, candidates, strict=True) for item in items
        )
    return without_own(candidates, measured.left_out(part), depth)


def depth_of(config: EvaluateConfig, measures: Measures) -> int:
    deepest = max(*config.k, MRR_DEPTH, NDCG_DEPTH, measures.depth)
    return max(deepest, config.recall_k) if config.reranker else deepest
