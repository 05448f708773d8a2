"""`raytower classify`: labels for the texts of a file, by retrieval or by a trained classifier, and their accuracy.

A label is a path in a tree, its levels parted by `##`; results show it with commas, `A##B` as `A,B`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from raytower.config import Config, OnError
from raytower.data.pieces import Survey
from raytower.data.pieces import survey as survey_input
from raytower.data.sources import InputConfig, refuse_output_inside
from raytower.evaluation.labellers import ClassifierLabeller, IndexLabeller, Labeller, Prediction, shown
from raytower.evaluation.progress import Progress
from raytower.evaluation.rows_out import RowFormat, RowWriter, open_rows
from raytower.evaluation.settings import (
    ROWS_PER_PIECE,
    QueryCompute,
    load_classifier,
    load_engine,
    open_index_manifest,
    own_or,
    plan_classifier_rows,
    plan_rows,
    quarantine_place,
    row_batches,
)
from raytower.index.reader import Index
from raytower.metrics import ClassScores, bootstrap_interval
from raytower.storage import Location

HIT_CUTOFFS = (5, 10, 20)
_COLUMNS = ("text", "label", "score")
_OF_RETRIEVAL = ("encoder", "index", "label_field", "temperature", "query_prefix")


class ClassifyConfig(Config):
    """`raytower classify`. Modes labels and votes need `encoder` and `index`, mode classifier needs `classifier`.

    A document's label is its `label_field` where it has one; in mode labels else its text.
    """

    encoder: str | None = None
    index: str | None = None
    classifier: str | None = None
    """Mode classifier: a directory that train-classifier wrote, or any Hugging Face text classifier."""
    input: InputConfig
    output: str
    mode: Literal["labels", "votes", "classifier"] = "labels"
    labelled: bool = True
    """Whether the input holds labels to compare with (`text <tab> label`); false reads texts alone."""
    label_field: str = "label"
    k: int = Field(default=10, ge=1)
    """Modes labels and classifier: labels listed in JSON lines. Mode votes: neighbours that vote."""
    temperature: float = Field(default=0.05, gt=0)
    """Mode votes: a neighbour's vote weighs exp(score / temperature); small trusts the nearest, large counts heads."""
    format: RowFormat = "tsv"
    query_prefix: str | None = None
    seed: int = Field(default=0, ge=0)
    """Of the bootstrap."""
    on_error: OnError = "fail"
    compute: QueryCompute = QueryCompute()

    def model_post_init(self, context: Any) -> None:
        by_classifier = self.mode == "classifier"
        needed, unread = (
            (("classifier",), _OF_RETRIEVAL) if by_classifier else (("encoder", "index"), ("classifier",))
        )
        for key in needed:
            if getattr(self, key) is None:
                other = "labels or votes" if by_classifier else "classifier"
                raise ValueError(
                    f"mode {self.mode} needs {key}, which is not given; set it, or set mode to {other}"
                )
        for key in unread:
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(
                    f"{key} is {getattr(self, key)!r}, which mode {self.mode} does not read; leave it out, or set "
                    "another mode"
                )


def classify(config: ClassifyConfig) -> dict[str, Any]:
    """Write `text label score` for each text, and measure where labels are given.

    Returns:
        rows, seconds, mode, index_version (mode classifier: the classifier's fingerprint), rejected_rows, output, and
        for labelled input `accuracy` (= recall@1, the first label is right), `hit@5`, `hit@10`, `hit@20` (the right
        label is among the first k ranked ones), `intervals` of these, `precision_macro`, `recall_macro`, `f1_macro`
        (of the first label, over the classes expected or predicted) and `labels_missing` (rows whose label the index
        or the classifier does not hold; they count as wrong).

    Raises:
        InputError: bad rows under on_error fail, an index that another encoder made, documents without the label
            field in mode votes, or, for a TSV, a text with a tab.
    """
    start = time.perf_counter()
    survey = _survey(config)
    labeller = _load_labeller(config)
    tally = _Tally(config)
    progress = Progress("classified", "texts", survey.num_rows)
    with open_rows(Location.of(config.output), config.format, _COLUMNS) as writer:
        for table in row_batches(survey, config.compute.rows_per_batch):
            tally.add(table, labeller.label(table["text"].to_pylist()), writer)
            progress.advance(table.num_rows)
    result: dict[str, Any] = {
        "rows": survey.num_rows,
        "mode": config.mode,
        "rejected_rows": survey.num_rejected,
        **labeller.figures,
        "output": config.output,
    }
    if config.labelled:
        result |= tally.metrics()
        result["labels_missing"] = labeller.count_missing(tally.label_counts)
    return {**result, "seconds": round(time.perf_counter() - start, 3)}


def plan_classify(config: ClassifyConfig) -> dict[str, Any]:
    """Texts, batches and predicted memory; surveys the input."""
    survey = _survey(config)
    rejected = {"rejected_rows": survey.num_rejected}
    if config.mode == "classifier":
        assert config.classifier is not None  # the config refused it otherwise
        return {**plan_classifier_rows(survey.num_rows, config.compute, config.classifier), **rejected}
    assert config.encoder is not None
    assert config.index is not None
    plan = plan_rows(survey.num_rows, config.compute, config.encoder, _depth(config))
    manifest = open_index_manifest(config.index, plan["fingerprint"])
    return {**plan, **rejected, "index_rows": manifest.rows}


class _Tally:
    """Writes predictions and remembers at which place the right label stood."""

    def __init__(self, config: ClassifyConfig) -> None:
        self._config = config
        self._places: list[int] = []  # from 1; 0 where the right label was not ranked
        self._classes = ClassScores()
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
                self._classes.add(best.label, shown(label))
            writer.write(text, best.label, best.score, **more)

    def metrics(self) -> dict[str, Any]:
        places = np.array(self._places)
        values = {"accuracy": (places == 1)}
        values |= {f"hit@{k}": (places >= 1) & (places <= k) for k in HIT_CUTOFFS}
        seed = self._config.seed
        return {
            **{name: float(value.mean()) for name, value in values.items()},
            **self._classes.macro(),
            "intervals": {name: list(bootstrap_interval(value, seed=seed)) for name, value in values.items()},
        }


def _load_labeller(config: ClassifyConfig) -> Labeller:
    if config.mode == "classifier":
        assert config.classifier is not None  # the config refused it otherwise
        return ClassifierLabeller(load_classifier(config.classifier, config.compute), _depth(config))
    assert config.encoder is not None
    assert config.index is not None
    engine = load_engine(config.encoder, config.compute)
    return IndexLabeller(
        engine,
        Index.open(config.index, encoder_fingerprint=engine.fingerprint),
        mode=config.mode,
        depth=_depth(config),
        label_field=config.label_field,
        temperature=config.temperature,
        prefix=own_or(config.query_prefix, engine.encoder, "query"),
    )


def _depth(config: ClassifyConfig) -> int:
    # Only the neighbours vote; labels are ranked as deep as the deepest metric looks.
    return config.k if config.mode == "votes" else max(config.k, *HIT_CUTOFFS)


def _survey(config: ClassifyConfig) -> Survey:
    kind: Literal["labelled", "lines"] = "labelled" if config.labelled else "lines"
    refuse_output_inside(config.output, config.input.path)
    place = quarantine_place(config.output, config.on_error)
    return survey_input(config.input, kind, ROWS_PER_PIECE, config.on_error, place)
