"""`raytower classify`: labels for the texts of a file, by retrieval or by a trained classifier, and their accuracy.

A label that is a path in a tree has its levels parted by `##`, in what is read and in what is written.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from raytower.annotation.config import ClassifyConfig
from raytower.annotation.labellers import ClassifierLabeller, IndexLabeller, Labeller
from raytower.annotation.labels import Prediction
from raytower.annotation.rows_in import row_batches, survey_rows
from raytower.annotation.rows_out import RowWriter, open_rows
from raytower.index.reader import Index
from raytower.metrics import ClassScores, bootstrap_interval
from raytower.progress import Progress
from raytower.retrieval.load import load_classifier, load_engine, open_index_manifest, own_or
from raytower.retrieval.plans import plan_classifier_rows, plan_rows
from raytower.storage import Location

HIT_CUTOFFS = (5, 10, 20)
_COLUMNS = ("text", "label", "score")


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
    survey = survey_rows(config, "labelled" if config.labelled else "lines", _COLUMNS)
    labeller = _load_labeller(config)
    tally = _Tally(config)
    progress = Progress("classified", "texts", survey.num_rows)
    with open_rows(Location.of(config.output), config.file_type, _COLUMNS) as writer:
        for table in row_batches(survey, config.rows_per_batch):
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
    survey = survey_rows(config, "labelled" if config.labelled else "lines", _COLUMNS)
    rejected = {"rejected_rows": survey.num_rejected}
    if config.mode == "classifier":
        assert config.classifier is not None  # the config refused it otherwise
        plan = plan_classifier_rows(
            survey.num_rows, config, config.classifier, rows_per_batch=config.rows_per_batch
        )
        return {**plan, **rejected}
    assert config.encoder is not None
    assert config.index is not None
    plan = plan_rows(
        survey.num_rows,
        config,
        config.encoder,
        rows_per_batch=config.rows_per_batch,
        candidates=_depth(config),
    )
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
                more["expected"] = label
                self.label_counts[label] = self.label_counts.get(label, 0) + 1
                order = [item.label for item in ranked]
                self._places.append(order.index(label) + 1 if label in order else 0)
                self._classes.add(best.label, label)
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
        return ClassifierLabeller(load_classifier(config.classifier, config), _depth(config))
    assert config.encoder is not None
    assert config.index is not None
    engine = load_engine(config.encoder, config)
    return IndexLabeller(
        engine,
        Index.open(config.index, encoder_fingerprint=engine.fingerprint),
        mode=config.mode,
        depth=_depth(config),
        label_field=config.label_field,
        temperature=config.temperature,
        prefix=own_or(config.query_prefix, engine.encoder, "query", config.encoder),
    )


def _depth(config: ClassifyConfig) -> int:
    # Only the neighbours vote; labels are ranked as deep as the deepest metric looks.
    return config.k if config.mode == "votes" else max(config.k, *HIT_CUTOFFS)
