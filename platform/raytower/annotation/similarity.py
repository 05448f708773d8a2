"""`raytower similarity`: the cosine of each pair of a file, and how well it tells similar from dissimilar."""

from __future__ import annotations

import time
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from raytower.annotation.config import SimilarityConfig
from raytower.annotation.cosines import cosines
from raytower.annotation.rows_in import row_batches, survey_rows
from raytower.annotation.rows_out import RowWriter, open_rows
from raytower.metrics import Floats, accuracy_f1, auc, best_threshold, spearman
from raytower.models.forward import ForwardEngine
from raytower.progress import Progress, log
from raytower.retrieval.load import load_engine, own_or
from raytower.retrieval.plans import plan_rows
from raytower.storage import Location

# By whether the input is labelled.
_COLUMNS = {True: ("query", "title", "label", "score"), False: ("query", "title", "score")}


def similarity(config: SimilarityConfig) -> dict[str, Any]:
    """Write `query title score` (with labels: `query title label score`) for each pair, and measure.

    Returns:
        rows, seconds, rejected_rows, output, and for labelled input what `measure_scores` gives.

    Raises:
        InputError: bad rows under on_error fail, or, for a TSV, a text with a tab.
    """
    start = time.perf_counter()
    survey = survey_rows(config, "scored" if config.labelled else "pairs", *_COLUMNS.values())
    engine = load_engine(config.encoder, config)
    columns = _COLUMNS[config.labelled]
    scores: list[Floats] = []
    labels: list[Floats] = []
    progress = Progress("scored", "pairs", survey.num_rows)
    with open_rows(Location.of(config.output), config.file_type, columns) as writer:
        for table in row_batches(survey, config.rows_per_batch):
            scores.append(_score(engine, table, config))
            if config.labelled:
                labels.append(table["label"].to_numpy())
            _write(writer, table, scores[-1], config.labelled)
            progress.advance(table.num_rows)
    measured = (
        measure_scores(np.concatenate(scores), np.concatenate(labels), config.threshold) if labels else {}
    )
    return {
        "rows": survey.num_rows,
        **measured,
        "rejected_rows": survey.num_rejected,
        "seconds": round(time.perf_counter() - start, 3),
        "output": config.output,
    }


def plan_similarity(config: SimilarityConfig) -> dict[str, Any]:
    """Pairs, batches and predicted memory; surveys the input."""
    survey = survey_rows(config, "scored" if config.labelled else "pairs", *_COLUMNS.values())
    plan = plan_rows(
        survey.num_rows, config, config.encoder, rows_per_batch=config.rows_per_batch, candidates=1
    )
    return {**plan, "rejected_rows": survey.num_rejected}


def measure_scores(scores: Floats, labels: Floats, threshold: float) -> dict[str, Any]:
    """How well scores [N] fit labels [N].

    Returns:
        Labels 0 and 1: `auc`, `accuracy` and `f1` at `threshold`, and `best_threshold` with `best_accuracy`, which
        is chosen on these very pairs and so an upper bound. With one class alone `auc` is null. Graded labels:
        `spearman` alone.
    """
    classes = set(np.unique(labels).tolist())
    if not classes <= {0.0, 1.0}:
        return {"spearman": spearman(scores, labels) if len(scores) > 1 else None}
    if len(classes) < 2:
        log(f"every label is {classes.pop():g}: there is no AUC, which compares two classes")
        area = None
    else:
        area = auc(scores, labels)
    accuracy, f1 = accuracy_f1(scores, labels, threshold)
    best = best_threshold(scores, labels)
    return {
        "auc": area,
        "accuracy": accuracy,
        "f1": f1,
        "threshold": threshold,
        "best_threshold": best,
        "best_accuracy": accuracy_f1(scores, labels, best)[0],
    }


def _score(engine: ForwardEngine, table: pa.Table, config: SimilarityConfig) -> Floats:
    sides: tuple[tuple[Literal["query", "document"], str | None], ...] = (
        ("query", config.query_prefix),
        ("document", config.document_prefix),
    )
    left, right = (
        engine.encode(table[side].to_pylist(), own_or(prefix, engine.encoder, side, config.encoder))
        for side, prefix in sides
    )
    return cosines(left, right)


def _write(writer: RowWriter, table: pa.Table, scores: Floats, labelled: bool) -> None:
    names = ("query", "document", "label") if labelled else ("query", "document")
    for *values, score in zip(*(table[name].to_pylist() for name in names), scores.tolist(), strict=True):
        if labelled:
            # Labels come as floats; 1 is shown as it was given.
            values[2] = int(values[2]) if values[2].is_integer() else values[2]
        writer.write(*values, score)
