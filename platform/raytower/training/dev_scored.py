"""Judged dev pairs: reading them, and the metrics of their scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from raytower.data.pieces import Piece
from raytower.data.records import INSTRUCTION
from raytower.errors import InputError
from raytower.metrics import accuracy_f1, auc, best_threshold, spearman
from raytower.training.columns import judged_pairs
from raytower.training.config import DevConfig
from raytower.training.inputs import dev_tables


@dataclass(frozen=True)
class ScoredPairs:
    """Pairs of texts with a label each; the labels of two classes are 0 and 1."""

    queries: list[str]
    documents: list[str]
    labels: list[float]
    instructions: list[str | None] | None = None
    """What each query is asked for, where rows say it and the caller reads them."""


def load_scored_pairs(
    dev: DevConfig, metric: str, set_aside: Sequence[Piece] = (), instructions: bool = False
) -> ScoredPairs:
    """Read scored pairs and check that `metric` can be computed of them, before any training; -1 counts as 0.

    Triples and candidates among the training rows that were set aside are pairs with the labels that train them.
    `instructions` reads those that rows say for their queries.

    Raises:
        InputError: bad rows, or labels that `metric` cannot use.
    """
    queries: list[str] = []
    documents: list[str] = []
    labels: list[float] = []
    said: list[str | None] = []
    for table in dev_tables(dev, "scored", set_aside, instructions=instructions):
        if "query" not in table.column_names:
            raise InputError(
                f"{dev.origin}: the training rows are single texts; dev.metric {metric} needs judged pairs, by dev.path"
            )
        # Row by row, for lists of candidates may differ in length.
        for row in table.to_pylist():
            pairs = judged_pairs({name: [value] for name, value in row.items()})
            queries += pairs.queries
            documents += pairs.documents
            labels += pairs.labels
            said += [row.get(INSTRUCTION.name)] * len(pairs.labels)
    found = sorted(set(labels))
    if metric == "spearman":
        if len(found) < 2:
            raise InputError(
                f"{dev.origin}: every label is {found[0]:g}; dev.metric spearman needs labels that differ"
            )
        return ScoredPairs(queries, documents, labels, said)
    wrong = [label for label in found if label not in (-1, 0, 1)]
    if wrong or found == [-1, 0, 1]:
        remedy = (
            f"use {dev.graded_metric} for graded labels"
            if dev.graded_metric
            else "auc, accuracy and f1 all do, and this job measures nothing else; name rows of two classes by dev.path"
        )
        raise InputError(
            f"{dev.origin} has the labels {[f'{label:g}' for label in found[:5]]}; dev.metric {metric} needs two "
            f"classes, 0 (or -1) and 1; {remedy}"
        )
    if len(found) < 2:
        raise InputError(
            f"{dev.origin}: all {len(labels)} labels are {found[0]:g}; dev.metric {metric} needs pairs of both "
            "classes, 0 and 1"
        )
    return ScoredPairs(queries, documents, [float(label == 1) for label in labels], said)


def scored_metrics(
    scores: ArrayLike, labels: ArrayLike, metric: str, threshold: float | None
) -> dict[str, float]:
    """auc, accuracy, f1 and the threshold used, or spearman alone where that is the metric.

    Args:
        scores: (N,), higher for pairs that match.
        labels: (N,), 0 or 1; graded for spearman.
        metric: the metric that chooses the best checkpoint.
        threshold: scores from here on count as a match; None takes the best one for these pairs, which flatters.
    """
    if metric == "spearman":
        return {"spearman": spearman(scores, labels)}
    chosen = best_threshold(scores, labels) if threshold is None else threshold
    accuracy, f1 = accuracy_f1(np.asarray(scores), labels, chosen)
    return {"auc": auc(scores, labels), "accuracy": accuracy, "f1": f1, "threshold": chosen}
