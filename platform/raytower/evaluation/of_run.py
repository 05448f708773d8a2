"""`raytower evaluate --run`: metrics of a run file, by whatever system it was made, without index and models."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from raytower.data.config import QueriesConfig
from raytower.data.queries import QuerySet, read_queries
from raytower.errors import InputError
from raytower.evaluation.config import EvaluateConfig, RunFileConfig
from raytower.evaluation.figures import ScoreSample, curve_ks
from raytower.evaluation.judgements import judge_run
from raytower.evaluation.measured import SHOWN_HITS, Measured, report_of
from raytower.evaluation.measures import Measures
from raytower.evaluation.page import evaluation_plots
from raytower.evaluation.reports import (
    RUN_NAME,
    RunWriter,
    check_outputs,
    open_run,
    write_drawings,
    write_reports,
)
from raytower.evaluation.runs import RankedList, Run, batches, read_run
from raytower.progress import log
from raytower.retrieval.retriever import Hit
from raytower.storage import Location


@dataclass(frozen=True)
class JudgedRun:
    """A run file beside its judgements."""

    queries: QuerySet
    keys: list[str]
    """By what the run tells each of the queries: its id, or its text where relevance goes by text."""
    run: Run

    @property
    def num_unanswered(self) -> int:
        """Judged queries of which the run has no hit."""
        return sum(key not in self.run.lists for key in self.keys)

    @property
    def num_unjudged_queries(self) -> int:
        """Queries of the run to which the judgements know nothing relevant."""
        return len(self.run.lists.keys() - set(self.keys))


def evaluate_run(config: EvaluateConfig) -> dict[str, Any]:
    """Measure the ranked lists of a file.

    Returns:
        As `evaluate_index`, with `relevant_missing` and `index_version` null, and besides `queries_without_hits`
        (judged, and not in the run: 0 for each metric), `queries_not_judged` (in the run, and left out), `tied` (hits
        with the score of the hit before, which stay as written), `wrong_ranks` (hits whose rank is not their place by
        score; the score counts) and `repeated_rows` (left out).

    Raises:
        InputError: bad queries, a bad run file, a run without any of the queries, or a metric that cannot be used.
        MissingExtraError: a metric of ir-measures, which is not installed.
    """
    start = time.perf_counter()
    assert config.run is not None  # the config refused it otherwise
    assert config.queries is not None
    check_outputs(config)
    Measures(config.metrics, config.k)  # a wrong name is found before any file is read
    judged = read_judged_run(config.queries, config.run)
    measuring = time.perf_counter()
    with ExitStack() as stack:
        writer = None
        if config.output is not None:
            writer = stack.enter_context(open_run(Location.of(config.output) / RUN_NAME))
        measured = measure_run(judged, config, writer)
    now = time.perf_counter()
    result = {
        **measured.summary(),
        "queries_without_hits": judged.num_unanswered,
        "queries_not_judged": judged.num_unjudged_queries,
        "tied": judged.run.num_tied,
        "wrong_ranks": judged.run.num_wrong_ranks,
        "repeated_rows": judged.run.num_repeated,
        "index_version": None,
        "seconds": round(now - start, 3),
        "queries_per_second": round(len(judged.keys) / (now - measuring), 1),
        "output": config.output,
    }
    if config.output is not None or config.plots is not None:
        report = report_of(result, measured, config.model_dump(mode="json"), {})
        write_drawings(config, evaluation_plots(report))
        if config.output is not None:
            write_reports(Location.of(config.output), report, measured.judgements, measured.values)
    return result


def plan_run(config: EvaluateConfig) -> dict[str, Any]:
    """Queries and lists; reads the queries and the run file."""
    assert config.run is not None
    assert config.queries is not None
    check_outputs(config)
    Measures(config.metrics, config.k)
    judged = read_judged_run(config.queries, config.run)
    return {
        "queries": len(judged.keys),
        "queries_without_hits": judged.num_unanswered,
        "queries_not_judged": judged.num_unjudged_queries,
        "hits": sum(len(each.documents) for each in judged.run.lists.values()),
    }


def measure_run(judged: JudgedRun, config: EvaluateConfig, writer: RunWriter | None = None) -> Measured:
    """Values of each judged query, by the config's metrics; where there is a writer, it gets the lists too.

    Raises:
        InputError: a metric that cannot be used.
    """
    measures = Measures(config.metrics, config.k)
    measured = Measured(
        measures,
        judge_run(judged.queries, judged.run.lists),
        config.k,
        config.seed,
        ignores_identical=config.ignore_identical_ids,
    )
    if config.run is not None:
        depth = max((len(each.documents) for each in judged.run.lists.values()), default=1)
        measured.scores = ScoreSample(len(judged.keys), depth)
        if config.output is not None or config.plots is not None:
            measured.curve_ks = curve_ks(config.k, max(depth, *config.k))
    for part, lists in batches(judged.run, judged.keys, config.rows_per_batch):
        if measured.num_spare:
            lists = _without_own(lists, measured, part)
        documents = [each.documents for each in lists]
        measured.add_stage("run", part, documents)
        measured.add(part, documents, [_first_hits(each) for each in lists])
        measured.add_scores(part, documents, [each.scores for each in lists])
        if writer is not None:
            for query_id, each in zip(judged.queries.ids[part], lists, strict=True):
                writer.write(query_id, zip(each.documents, each.scores, strict=True))
    return measured


def read_judged_run(queries: QueriesConfig, run: RunFileConfig) -> JudgedRun:
    """Read a run file and its judgements, and say what of the run is odd.

    Raises:
        InputError: bad queries, a bad run file, or one that holds none of the queries.
    """
    query_set = read_queries(queries.path, queries.format, queries.split, need_texts=False)
    by_text = query_set.relevant is None
    found = read_run(run.path, run.format, "text" if by_text else "id")
    judged = JudgedRun(query_set, query_set.texts if by_text else query_set.ids, found)
    if judged.num_unanswered == len(judged.keys):
        known, there = (repr(next(iter(names))[:80]) for names in (judged.keys, found.lists))
        raise InputError(
            f"{run.path}: it holds none of the {len(judged.keys):,} queries of {queries.path}, such as {known}; its "
            f"own are such as {there}; give the judgements of this run"
        )
    for count, what in (
        (judged.num_unanswered, "judged queries have no hit in the run; each of their metrics is 0"),
        (judged.num_unjudged_queries, "queries of the run have nothing relevant to them; they are left out"),
        (found.num_tied, "hits have the score of the hit before; they stay in the order of the file"),
        (found.num_wrong_ranks, "hits have a rank that is not their place by score; the score counts"),
        (found.num_repeated, "rows repeat a document of their list, or a whole query; they are left out"),
    ):
        if count:
            log(f"{run.path}: {count:,} {what}")
    return judged


def _without_own(lists: Sequence[RankedList], measured: Measured, part: slice) -> list[RankedList]:
    """The lists without the documents that are the query's own text or have its id."""
    kept = []
    ids = measured.judgements.ids[part]
    for query_id, out, each in zip(ids, measured.left_out(part), lists, strict=True):
        pairs = [pair for pair in zip(each.documents, each.scores, strict=True) if pair[0] not in out]
        measured.identical_ids += measured.ignores_identical and query_id in each.documents
        kept.append(RankedList([document for document, _ in pairs], [score for _, score in pairs]))
    return kept


def _first_hits(ranked: RankedList) -> list[Hit]:
    """The hits that a page may show; their texts are not known."""
    return [
        Hit(document, "", {}, score, None, score, rank)
        for rank, (document, score) in enumerate(
            zip(ranked.documents[:SHOWN_HITS], ranked.scores[:SHOWN_HITS], strict=True), start=1
        )
    ]
