"""`raytower classify`: labels for texts by retrieval, from the nearest label texts or by votes of labelled texts.

A label is a path in a tree, its levels parted by `##`; results show it with commas, `A##B` as `A,B`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from raytower.config import Config, OnError
from raytower.data.pieces import Survey
from raytower.data.pieces import survey as survey_input
from raytower.data.sources import InputConfig
from raytower.errors import InputError
from raytower.evaluation.judgements import document_tables, find_documents
from raytower.evaluation.progress import Progress
from raytower.evaluation.recall import Candidate, index_recall
from raytower.evaluation.rows_out import RowFormat, RowWriter, open_rows
from raytower.evaluation.settings import (
    ROWS_PER_PIECE,
    QueryCompute,
    load_engine,
    open_index_manifest,
    own_or,
    plan_rows,
    quarantine_place,
    row_batches,
)
from raytower.index.reader import Index
from raytower.metrics import bootstrap_interval
from raytower.storage import Location

HIT_CUTOFFS = (5, 10, 20)
_COLUMNS = ("text", "label", "score")


class ClassifyConfig(Config):
    """`raytower classify`. A document's label is its `label_field` where it has one; in mode labels else its text."""

    encoder: str
    index: str
    input: InputConfig
    output: str
    mode: Literal["labels", "votes"] = "labels"
    labelled: bool = True
    """Whether the input holds labels to compare with (`text <tab> label`); false reads texts alone."""
    label_field: str = "label"
    k: int = Field(default=10, ge=1)
    """Mode labels: labels listed in JSON lines. Mode votes: neighbours that vote."""
    temperature: float = Field(default=0.05, gt=0)
    """Mode votes: a neighbour's vote weighs exp(score / temperature); small trusts the nearest, large counts heads."""
    format: RowFormat = "tsv"
    query_prefix: str | None = None
    seed: int = Field(default=0, ge=0)
    """Of the bootstrap."""
    on_error: OnError = "fail"
    compute: QueryCompute = QueryCompute()


@dataclass(frozen=True, slots=True)
class Prediction:
    """A label as shown, with its score: the cosine of the nearest label text, or its share of the votes."""

    label: str
    score: float


def shown(label: str) -> str:
    """A label path as people read it: `A##B` is `A,B`."""
    return label.replace("##", ",")


def rank_labels(neighbours: Sequence[tuple[str, float]]) -> list[Prediction]:
    """Labels by their nearest text; a label with several texts (descriptions) counts once, by its best one.

    Args:
        neighbours: label and score of each recalled document, best first.
    """
    best: dict[str, float] = {}
    for label, score in neighbours:
        best.setdefault(label, score)
    return [Prediction(label, score) for label, score in best.items()]


def count_votes(neighbours: Sequence[tuple[str, float]], temperature: float) -> list[Prediction]:
    """Labels by their share of the votes, which sum to 1; of equal shares the label with the nearest text leads.

    Args:
        neighbours: label and score of each recalled document, best first.
        temperature: a vote weighs exp(score / temperature).
    """
    if not neighbours:
        return []
    scores = np.array([score for _, score in neighbours], dtype=np.float64)
    weights = np.exp((scores - scores.max()) / temperature)
    shares: dict[str, float] = {}
    for (label, _), weight in zip(neighbours, (weights / weights.sum()).tolist(), strict=True):
        shares[label] = shares.get(label, 0.0) + weight
    # sorted() is stable and the labels stand in the order of their nearest text.
    return [Prediction(label, share) for label, share in sorted(shares.items(), key=lambda item: -item[1])]


def classify(config: ClassifyConfig) -> dict[str, Any]:
    """Write `text label score` for each text, and measure where labels are given.

    Returns:
        rows, seconds, index_version, rejected_rows, output, and for labelled input `accuracy` (= recall@1, the first
        label is right), `hit@5`, `hit@10`, `hit@20` (the right label is among the first k ranked ones), `intervals`
        and `labels_missing` (rows whose label the index does not hold; they count as wrong).

    Raises:
        InputError: bad rows under on_error fail, an index that another encoder made, documents without the label
            field in mode votes, or, for a TSV, a text with a tab.
    """
    start = time.perf_counter()
    survey = _survey(config)
    engine = load_engine(config.encoder, config.compute)
    index = Index.open(config.index, encoder_fingerprint=engine.fingerprint)
    prefix = own_or(config.query_prefix, engine.encoder, "query")
    recall = index_recall(index)
    tally = _Tally(config)
    progress = Progress("classified", "texts", survey.num_rows)
    with open_rows(Location.of(config.output), config.format, _COLUMNS) as writer:
        for table in row_batches(survey, config.compute.rows_per_batch):
            texts = table["text"].to_pylist()
            recalled = recall(engine.encode(texts, prefix), _depth(config))
            predictions = [_predict(items, config) for items in recalled]
            tally.add(table, predictions, writer)
            progress.advance(len(texts))
    result: dict[str, Any] = {
        "rows": survey.num_rows,
        "mode": config.mode,
        "rejected_rows": survey.num_rejected,
        "index_version": index.version,
        "output": config.output,
    }
    if config.labelled:
        result |= tally.metrics()
        result["labels_missing"] = _count_missing(index, tally.label_counts, config)
    return {**result, "seconds": round(time.perf_counter() - start, 3)}


def plan_classify(config: ClassifyConfig) -> dict[str, Any]:
    """Texts, batches and predicted memory; surveys the input."""
    survey = _survey(config)
    plan = plan_rows(survey.num_rows, config.compute, config.encoder, _depth(config))
    manifest = open_index_manifest(config.index, plan["fingerprint"])
    return {**plan, "rejected_rows": survey.num_rejected, "index_rows": manifest.rows}


class _Tally:
    """Writes predictions and remembers at which place the right label stood."""

    def __init__(self, config: ClassifyConfig) -> None:
        self._config = config
        self._places: list[int] = []  # from 1; 0 where the right label was not ranked
        self.label_counts: dict[str, int] = {}

    def add(self, table: pa.Table, predictions: Sequence[Sequence[Prediction]], writer: RowWriter) -> None:
        expected = table["label"].to_pylist() if self._config.labelled else [None] * table.num_rows
        texts = table["text"].to_pylist()
        for text, label, ranked in zip(texts, expected, predictions, strict=True):
            best = ranked[0]
            more: dict[str, Any] = {"labels": [[item.label, item.score] for item in ranked[: self._config.k]]}
            if label is not None:
                more["expected"] = shown(label)
                self.label_counts[label] = self.label_counts.get(label, 0) + 1
                order = [item.label for item in ranked]
                self._places.append(order.index(shown(label)) + 1 if shown(label) in order else 0)
            writer.write(text, best.label, best.score, **more)

    def metrics(self) -> dict[str, Any]:
        places = np.array(self._places)
        values = {"accuracy": (places == 1)}
        values |= {f"hit@{k}": (places >= 1) & (places <= k) for k in HIT_CUTOFFS}
        seed = self._config.seed
        return {
            **{name: float(value.mean()) for name, value in values.items()},
            "intervals": {name: list(bootstrap_interval(value, seed=seed)) for name, value in values.items()},
        }


def _predict(candidates: Sequence[Candidate], config: ClassifyConfig) -> list[Prediction]:
    neighbours = [(shown(_label_of(item, config)), item.score) for item in candidates]
    return rank_labels(neighbours) if config.mode == "labels" else count_votes(neighbours, config.temperature)


def _label_of(item: Candidate, config: ClassifyConfig) -> str:
    label = item.metadata.get(config.label_field)
    if label is not None:
        return str(label)
    if config.mode == "labels":
        return item.text
    raise InputError(
        f"document {item.id!r} of index {config.index!r} has no {config.label_field!r}, so it cannot vote; encode a "
        f"corpus with a column {config.label_field!r}, name another label_field, or set mode to labels"
    )


def _depth(config: ClassifyConfig) -> int:
    # Only the neighbours vote; label texts are recalled as deep as the deepest metric looks.
    return config.k if config.mode == "votes" else max(config.k, *HIT_CUTOFFS)


def _count_missing(index: Index, label_counts: dict[str, int], config: ClassifyConfig) -> int:
    # Either side may write a path with ## or as it is shown.
    wanted = {form for label in label_counts for form in (label, shown(label), label.replace(",", "##"))}
    present: set[str] = set()
    for table in document_tables(index):
        column = config.label_field if config.label_field in table.column_names else "text"
        present.update(shown(label) for label in find_documents([table], column, wanted, "id"))
    return sum(count for label, count in label_counts.items() if shown(label) not in present)


def _survey(config: ClassifyConfig) -> Survey:
    kind: Literal["labelled", "lines"] = "labelled" if config.labelled else "lines"
    place = quarantine_place(config.output, config.on_error)
    return survey_input(config.input, kind, ROWS_PER_PIECE, config.on_error, place)
