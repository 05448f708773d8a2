"""`raytower similarity`: the score of each pair of a file, and how well it tells similar from dissimilar.

A score is the cosine of an encoder's vectors, or what a reranker's directory makes of its logit, mostly a probability.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raytower.annotation.config import SimilarityConfig
from raytower.annotation.cosines import cosines
from raytower.annotation.rows_in import survey_rows
from raytower.annotation.rows_out import RowWriter, header_of
from raytower.data.pieces import Survey
from raytower.file_jobs.plan import choose_rows_per_share, shares_of
from raytower.file_jobs.run import FileJob, ShareWorker, Sink, content_of, join_bytes, run_shares, workers_for
from raytower.metrics import Floats, accuracy_f1, auc, best_threshold, spearman
from raytower.models.cross_encoder import CrossEncoder
from raytower.models.encoder import Encoder
from raytower.progress import log
from raytower.retrieval.load import load_engine, load_reranker, own_or
from raytower.retrieval.plans import plan_reranker_rows, plan_rows
from raytower.storage import Location, absolute_if_local

# By whether the input is labelled.
_COLUMNS = {True: ("query", "title", "label", "score"), False: ("query", "title", "score")}
_MAX_PAIRS_PER_SHARE = 8_192
_FREE_KEYS = {"workers", "output", "rows_per_batch", "tokens_per_batch", "on_error", "input", "threshold"}


def similarity(config: SimilarityConfig) -> dict[str, Any]:
    """Write `query title score` (with labels: `query title label score`) for each pair, and measure.

    Returns:
        rows, seconds, rejected_rows, output, and for labelled input what `measure_scores` gives.

    Raises:
        InputError: bad rows under on_error fail, no such model, a score that is no number, or, for a TSV, a text with a
            tab.
    """
    start = time.perf_counter()
    survey = _survey(config)
    job, default_threshold = _job(config, survey)
    workers = workers_for(
        config.workers, survey.num_rows, job.texts_per_row, len(job.shares), use_gpus=config.engine != "onnx"
    )
    head = header_of(config.file_type, _COLUMNS[config.labelled])
    figures, _ = run_shares(job, workers, partial(join_bytes, head=head))
    measured = {}
    if config.labelled:
        scores, labels = (
            np.array([value for part in figures for value in part[name]]) for name in ("scores", "labels")
        )
        threshold = default_threshold if config.threshold is None else config.threshold
        measured = measure_scores(scores, labels, threshold)
    return {
        "rows": survey.num_rows,
        **measured,
        "rejected_rows": survey.num_rejected,
        "seconds": round(time.perf_counter() - start, 3),
        "output": config.output,
    }


def plan_similarity(config: SimilarityConfig) -> dict[str, Any]:
    """Pairs, batches and predicted memory; surveys the input."""
    survey = _survey(config)
    if config.encoder is not None:
        plan = plan_rows(
            survey.num_rows, config, config.encoder, rows_per_batch=config.rows_per_batch, candidates=1
        )
    else:
        assert config.reranker is not None, "the config refused it otherwise"
        plan = plan_reranker_rows(
            survey.num_rows,
            config,
            config.reranker,
            rows_per_batch=config.rows_per_batch,
            max_length=config.rerank_max_length,
        )
    return {**plan, "rejected_rows": survey.num_rejected}


def measure_scores(scores: Floats, labels: Floats, threshold: float) -> dict[str, Any]:
    """How well scores [N] fit labels [N].

    Returns:
        Labels 0 and 1: `auc` and `average_precision`; `accuracy` and `f1` at `threshold`; and `best_threshold`, that of
        the highest accuracy, with `best_accuracy` and `best_f1`, which is chosen on these very pairs and so an upper
        bound. With one class alone `auc` is null, and without a 1 `average_precision` is. Graded labels: `spearman`
        alone.
    """
    classes = set(np.unique(labels).tolist())
    if not classes <= {0.0, 1.0}:
        return {"spearman": spearman(scores, labels) if len(scores) > 1 else None}
    if len(classes) < 2:
        log(f"every label is {min(classes):g}: there is no AUC, which compares two classes")
        area = None
    else:
        area = auc(scores, labels)
    accuracy, f1 = accuracy_f1(scores, labels, threshold)
    best = best_threshold(scores, labels)
    best_accuracy, best_f1 = accuracy_f1(scores, labels, best)
    return {
        "auc": area,
        "average_precision": average_precision(scores, labels) if 1.0 in classes else None,
        "accuracy": accuracy,
        "f1": f1,
        "threshold": threshold,
        "best_threshold": best,
        "best_accuracy": best_accuracy,
        "best_f1": best_f1,
    }


def average_precision(scores: Floats, labels: Floats) -> float:
    """The precision at each score, weighted by the recall that it adds, of scores [N] and labels 0 or 1 [N], one a 1.

    Pairs of one score count together, as in scikit-learn's `average_precision_score`.
    """
    order = np.argsort(-scores, kind="stable")
    ranked, relevant = scores[order], np.cumsum(labels[order])
    last = np.append(np.flatnonzero(np.diff(ranked)), len(ranked) - 1)  # of each score
    precision = relevant[last] / (last + 1)
    recall = relevant[last] / relevant[-1]
    return float((np.diff(recall, prepend=0.0) * precision).sum())


class PairJudge(Protocol):
    """Scores pairs of texts."""

    def __call__(self, queries: Sequence[str], documents: Sequence[str]) -> Floats:
        """A finite score for each pair, float64 [N]."""


class SimilarityWorker:
    """Scores the pairs of a share."""

    def __init__(self, config: SimilarityConfig) -> None:
        self._config = config
        self._judge = _cosine_judge(config) if config.encoder is not None else _reranker_judge(config)

    def __call__(self, table: pa.Table, sink: Sink) -> dict[str, Any]:
        """Write the rows of `table` (query, document and perhaps label); scores and labels are the figures."""
        config = self._config
        writer = RowWriter(sink, config.file_type, _COLUMNS[config.labelled], has_header=False)
        scores: list[float] = []
        for start in range(0, table.num_rows, config.rows_per_batch):
            rows = table.slice(start, config.rows_per_batch)
            found = self._judge(rows["query"].to_pylist(), rows["document"].to_pylist()).tolist()
            _write(writer, rows, found, config.labelled)
            scores += found if config.labelled else []
        return {"scores": scores, "labels": table["label"].to_pylist()} if config.labelled else {}


def open_worker(config: SimilarityConfig) -> ShareWorker:
    return SimilarityWorker(config)


def _cosine_judge(config: SimilarityConfig) -> PairJudge:
    assert config.encoder is not None
    name = config.encoder
    engine = load_engine(name, config)
    sides: tuple[tuple[Literal["query", "document"], str | None], ...] = (
        ("query", config.query_prefix),
        ("document", config.document_prefix),
    )
    prefixes = [own_or(prefix, engine.encoder, side, name) for side, prefix in sides]

    def judge(queries: Sequence[str], documents: Sequence[str]) -> Floats:
        left, right = (
            engine.encode(texts, prefix) for texts, prefix in zip((queries, documents), prefixes, strict=True)
        )
        return cosines(left, right)

    return judge


def _reranker_judge(config: SimilarityConfig) -> PairJudge:
    assert config.reranker is not None
    scorer = load_reranker(config.reranker, config)

    def judge(queries: Sequence[str], documents: Sequence[str]) -> NDArray[np.float64]:
        return scorer.activated(scorer.score(queries, documents))

    return judge


def _survey(config: SimilarityConfig) -> Survey:
    return survey_rows(
        config,
        "scored" if config.labelled else "pairs",
        *_COLUMNS.values(),
        rows_per_piece=choose_rows_per_share(_texts_per_row(config), _MAX_PAIRS_PER_SHARE),
    )


def _texts_per_row(config: SimilarityConfig) -> int:
    return 2 if config.encoder is not None else 1


def _job(config: SimilarityConfig, survey: Survey) -> tuple[FileJob, float]:
    """The job, and the threshold where none is given. Raises InputError for no such model, or one of another class."""
    content: dict[str, Any] = {
        "settings": config.model_dump(mode="json", exclude=_FREE_KEYS),
        "read_as": config.input.model_dump(mode="json", exclude={"path"}),
        "input": content_of(survey),
    }
    if config.encoder is not None:
        encoder = Encoder.load(config.encoder)
        threshold = 0.8
        sides: tuple[Literal["query", "document"], ...] = ("query", "document")
        content |= {
            "encoder": encoder.fingerprint,
            "prefixes": [encoder.prefix_for(side) for side in sides],
        }
    else:
        assert config.reranker is not None
        reranker = CrossEncoder.load(config.reranker)
        threshold = 0.5 if reranker.num_labels > 1 or reranker.activation == "sigmoid" else 0.0
        content |= {"reranker": reranker.fingerprint, "activation": reranker.activation}
    names = {key: getattr(config, key) for key in ("encoder", "reranker")}
    places = {key: absolute_if_local(name) for key, name in names.items() if name is not None}
    job = FileJob(
        output=Location.of(config.output),
        shares=shares_of(survey.pieces),
        open_worker=open_worker,
        arguments=(config.model_copy(update=places),),
        content=content,
        texts_per_row=_texts_per_row(config),
        verb="scored",
        unit="pairs",
    )
    return job, threshold


def _write(writer: RowWriter, table: pa.Table, scores: Sequence[float], labelled: bool) -> None:
    names = ("query", "document", "label") if labelled else ("query", "document")
    for *values, score in zip(*(table[name].to_pylist() for name in names), scores, strict=True):
        if labelled:
            # Labels come as floats; 1 is shown as it was given.
            values[2] = int(values[2]) if values[2].is_integer() else values[2]
        writer.write(*values, score)
