"""`raytower train-classifier`: the fine-tuned baseline, one label a text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from raytower.config import OnError
from raytower.data.config import NamedInput
from raytower.data.layouts import Source
from raytower.data.pieces import Piece, Survey, read_piece
from raytower.data.pieces import survey as survey_input
from raytower.data.plain_labels import alike, are_numbers, are_scores, in_order, missing_value, plain_label
from raytower.data.rejects import quarantine_of
from raytower.data.sources import refuse_output_inside
from raytower.errors import InputError
from raytower.metrics import accuracy, macro_f1
from raytower.models.chunks import Chunk
from raytower.models.compute import check_max_length
from raytower.models.device import send
from raytower.models.logits_model import LogitsModel
from raytower.models.text_classifier import TextClassifier
from raytower.objectives.classification import weights_of
from raytower.progress import log
from raytower.storage import Location, absolute_if_local
from raytower.training.backbone import (
    PROBE,
    freeze_unreached,
    merged_copy,
    prepare_backbone,
)
from raytower.training.batches import Rows
from raytower.training.config import ClassifierDevConfig, ClassifierTrainInput, TrainClassifierConfig
from raytower.training.contradictions import say_contradictions
from raytower.training.cut_texts import cut_shares, say_cut_shares, spaced_rows
from raytower.training.dev_overlap import say_overlap
from raytower.training.dev_split import set_dev_aside
from raytower.training.inputs import dev_tables, survey_training, tables
from raytower.training.labelled_files import survey_by_label, survey_paths
from raytower.training.live_engine import LiveEngine
from raytower.training.runner import fit, plan_training
from raytower.training.shares import gather_rows_in_order, own_rows
from raytower.training.step import TrainingStep
from raytower.training.task import Task

_CPU = torch.device("cpu")
# Different texts are counted up to some more than so many.
_TEXTS_COUNTED = 10_000
_MANY_ROWS = 8


@dataclass(frozen=True)
class LoadedLabelled:
    """A batch for the step: the class of each text (B,) and chunks of their tokens, both on the device."""

    classes_B: Tensor  # noqa: N815 - carries its shape
    chunks: list[Chunk]


class ClassifierTask(Task[TrainClassifierConfig]):
    """Training of one text classifier; see training.task.Task."""

    def __init__(
        self,
        config: TrainClassifierConfig,
        start: str,
        labels: Sequence[str],
        counts: Mapping[str, int],
        set_aside: Sequence[Piece] = (),
    ) -> None:
        """`labels` in the order of the classes, `counts` of them among the training rows, `set_aside` dev rows."""
        super().__init__(config, start)
        self.labels = tuple(labels)
        self.classes = {label: number for number, label in enumerate(labels)}
        self.weights_C = weights_of(config.objective, self.labels, [counts[label] for label in self.labels])
        self.dev_texts: list[str] = []
        self.dev_labels: list[str] = []
        if config.dev is not None:
            self.dev_texts, self.dev_labels = _load_dev(config.dev, self.classes, set_aside)

    @classmethod
    def survey(cls, config: TrainClassifierConfig) -> Survey:
        train = config.train
        if train.path is not None and train.label_by is None:
            return survey_training(
                config, train.path, "labelled", config.objective.formats, config.objective.name
            )
        for place in train.places:
            refuse_output_inside(config.output, place, is_folder=True)
        surveyed = _survey_labels(train, config.on_error, quarantine_of(config.output), "train")
        share = config.dev.share if config.dev else None
        return surveyed if share is None else set_dev_aside(surveyed, share, config.seed)

    @classmethod
    def prepare(cls, config: TrainClassifierConfig, surveyed: Survey) -> Self:
        labels, counts = _labels(config, surveyed)
        model = _load_start(config, config.start, labels)
        labels = _in_order_of(model, labels, config)
        say_contradictions(surveyed)
        texts = spaced_rows(surveyed)["text"]
        shares = cut_shares(model.tokenise, {"text": [texts]}, config.max_length)
        say_cut_shares(shares, config.max_length, len(texts))
        task = cls(config, absolute_if_local(config.start), labels, counts, surveyed.set_aside)
        say_overlap(surveyed, config.dev, [task.dev_texts])
        return task

    def build(self, start_from: Path | None, device: torch.device = _CPU) -> nn.Module:
        model = _load_start(self.config, str(start_from or self.start), self.labels)
        prepare_backbone(cast(PreTrainedModel, model.model.base_model), self.config)
        whole = LogitsModel(model.eval())
        freeze_unreached(
            whole, lambda: whole(whole.plan_chunks(model.tokenise([[PROBE]], self.config.max_length)))
        )
        return whole

    def load_batch(self, step: TrainingStep, rows: Rows) -> LoadedLabelled:
        model = cast(LogitsModel, step.model)
        block = model.inner.tokenise([rows["text"]], self.config.max_length)
        chunks = model.plan_chunks(block, step.shares(np.arange(len(block)), len(block)))
        classes_B = torch.tensor([self.classes[label] for label in rows["label"]])
        return LoadedLabelled(send(classes_B, step.device), chunks)

    def propagate(self, step: TrainingStep, batch: LoadedLabelled) -> Tensor:
        def compute_loss() -> Tensor:
            with step.autocast():
                logits_BC = step.parallel(step.seeded(batch.chunks))
            step.observe("accuracy", (logits_BC.argmax(1) == batch.classes_B).float().mean())
            weights_C = None if self.weights_C is None else send(self.weights_C, step.device)
            return self.config.objective(logits_BC, batch.classes_B, weights_C)

        return step.propagate(compute_loss)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        inner = cast(TextClassifier, cast(LogitsModel, model).inner)
        engine = LiveEngine(inner, dtype=self.config.dtype, max_length=self.config.max_length)
        rows = own_rows(len(self.dev_texts)).tolist()
        logits_NC = engine.logits([self.dev_texts[row] for row in rows])
        best = gather_rows_in_order(logits_NC.argmax(1), len(self.dev_texts))
        predicted = [self.labels[number] for number in best.tolist()]
        return {
            "accuracy": accuracy(predicted, self.dev_labels),
            "f1": macro_f1(predicted, self.dev_labels),
        }

    def save(self, model: nn.Module, folder: Path, info: Mapping[str, Any]) -> None:
        merged_copy(cast(LogitsModel, model).inner, self.config).save(folder, info)


def train_classifier(config: TrainClassifierConfig) -> dict[str, Any]:
    """Train and publish the classifier directory; returns steps, seconds, best, labels, output.

    Raises:
        InputError: bad rows, fewer rows than a batch, an output made by another config, an unknown model, fewer than
            two labels, or a label that is not in the list of labels.
    """
    return fit(ClassifierTask, config)


def plan_train_classifier(config: TrainClassifierConfig) -> dict[str, Any]:
    """The plan for --dry-run: makes every check that training would make, and trains nothing."""
    plan, task = plan_training(ClassifierTask, config)
    return {**plan, "labels": len(task.labels)}


def _load_start(config: TrainClassifierConfig, start: str, labels: Sequence[str]) -> TextClassifier:
    # The same seed on every worker: a fresh head must be the same everywhere.
    torch.manual_seed(config.seed)
    model = TextClassifier.start_from(start, labels)
    # What is published keeps its own length, which training on shorter rows does not lower.
    check_max_length(config.max_length, model.max_positions)
    return model


def _labels(config: TrainClassifierConfig, surveyed: Survey) -> tuple[list[str], Counter[str]]:
    """The labels in the order of the classes, and how many training rows have each."""
    counts: Counter[str] = Counter()
    texts: set[str] = set()
    for table in tables(surveyed):
        counts.update(table["label"].to_pylist())
        if len(texts) < _TEXTS_COUNTED:
            texts.update(table["text"].to_pylist())
    labels = in_order(counts) if config.labels is None else _read_labels(config.labels)
    unknown = sorted(set(counts) - set(labels))
    if unknown:
        raise InputError(
            f"{config.train.origin}: label {unknown[0]!r} is not in labels {config.labels!r} ({len(unknown)} such "
            f"labels, {sum(counts[label] for label in unknown)} rows); add them there, or remove labels"
        )
    if len(counts) < 2:
        raise InputError(
            f"{config.train.origin}: the only label is {next(iter(counts))!r}; a classifier needs rows of at least two"
        )
    if config.labels is None:
        _name_likely_header(surveyed, counts)
        _refuse_doubtful(config.train.origin, counts, len(texts))
    return labels, counts


def _in_order_of(model: TextClassifier, labels: Sequence[str], config: TrainClassifierConfig) -> list[str]:
    """The labels in the order of the model's logits: a finished classifier keeps that of its own.

    Raises:
        InputError: a list of labels asks for another order.
    """
    own = list(map(plain_label, model.labels))
    if config.labels is not None and own != list(labels):
        raise InputError(
            f"{config.start!r} is a finished classifier that has the labels of {config.labels!r} in another "
            "order; give them in its order (id2label in config.json), or leave labels out"
        )
    return own


def _refuse_doubtful(origin: str, counts: Counter[str], num_texts: int) -> None:
    """What makes classes that nobody means; a list of labels in `labels` says that they are meant.

    Args:
        origin: the input, for messages.
        counts: rows of each label.
        num_texts: distinct texts, counted up to some number.

    Raises:
        InputError: two labels that differ in case or width alone, a missing value that is written out, more labels
            than texts, or numbers that are scores.
    """
    meant = "; where they are meant, list all labels in a file and name it by labels"
    if pair := alike(counts):
        first, second = pair
        raise InputError(
            f"{origin}: labels {first!r} ({counts[first]:,} rows) and {second!r} ({counts[second]:,}) differ in case "
            f"or width alone, and would be two classes; write one of them{meant}"
        )
    if missing := missing_value(counts):
        raise InputError(
            f"{origin}: {counts[missing]:,} rows have the label {missing!r}, as tools write a missing value; leave "
            f"such rows out, or give them a label{meant}"
        )
    if num_texts < min(len(counts), _TEXTS_COUNTED):
        raise InputError(
            f"{origin}: {len(counts):,} labels for {num_texts:,} different texts; columns are text, then label: swap "
            f"them{meant}"
        )
    if are_scores(counts):
        raise InputError(
            f"{origin}: labels are numbers such as {min(counts)!r}, {len(counts):,} of them in {counts.total():,} "
            f"rows: scores rather than classes; write classes, or train on pairs and scores by train-reranker{meant}"
        )
    if counts.total() >= _MANY_ROWS and 2 * len(counts) > counts.total():
        log(
            f"{origin}: {len(counts):,} labels in {counts.total():,} rows: most classes have one row, and no other row "
            "to learn them from"
        )


def _name_likely_header(surveyed: Survey, counts: Counter[str]) -> None:
    """Say so where the first row looks like the header of other columns: two words, the second a label of its own.

    Raises:
        InputError: all other labels are numbers.
    """
    source, first = surveyed.pieces[0].source, read_piece(surveyed.pieces[0]).slice(0, 1).to_pylist()[0]
    if (
        not isinstance(source, Source)
        or source.layout.format not in ("tsv", "csv")
        or source.layout.first_line > 1
    ):
        return
    others = [label for label in counts if label != first["label"]]
    if counts[first["label"]] == 1 and are_numbers(others) and not are_numbers([first["label"]]):
        raise InputError(
            f"{surveyed.files[0]}:1: {first['label']!r} is the only label that is no number, as in a header; name its "
            "columns text and label, or list all labels in a file and name it by labels"
        )
    are_words = first["text"].isidentifier() and first["label"].isidentifier()
    if are_words and counts[first["label"]] == 1:
        log(
            f"{surveyed.files[0]}:1: {first['text']!r} is the only text with the label {first['label']!r}; if this "
            "line is a header, name its columns text and label"
        )


def _read_labels(path: str) -> list[str]:
    surveyed = survey_input(NamedInput(path=path, format="lines"), "lines")
    labels = [plain_label(text) for table in tables(surveyed) for text in table["text"].to_pylist()]
    twice = [label for label, count in Counter(labels).items() if count > 1]
    if twice:
        raise InputError(f"labels {path!r}: {twice[0]!r} is in it more than once; write each label once")
    return labels


def _survey_labels(
    given: ClassifierTrainInput | ClassifierDevConfig,
    on_error: OnError | None,
    quarantine: Location | None,
    section: str,
) -> Survey:
    """Survey texts without labels of their own: of `paths`, or of `path` by `label_by`.

    Raises:
        InputError: as `survey_paths` and `survey_by_label`.
    """
    if given.paths is not None:
        return survey_paths(given.paths, on_error, quarantine, f"{section}.paths")
    assert given.path is not None
    assert given.label_by is not None
    return survey_by_label(given.path, given.label_by, on_error, quarantine, f"{section}.label_by")


def _load_dev(
    dev: ClassifierDevConfig, classes: Mapping[str, int], set_aside: Sequence[Piece]
) -> tuple[list[str], list[str]]:
    texts: list[str] = []
    labels: list[str] = []
    if dev.paths is not None or (dev.path is not None and dev.label_by is not None):
        rows = tables(_survey_labels(dev, None, None, "dev"))
    else:
        rows = dev_tables(dev, "labelled", set_aside)
    for table in rows:
        texts += table["text"].to_pylist()
        labels += table["label"].to_pylist()
    unknown = sorted(set(labels) - set(classes))
    if unknown:
        raise InputError(
            f"{dev.origin}: label {unknown[0]!r} is none of the {len(classes)} labels that are trained; the dev "
            "set can only hold labels of the training set or of `labels`"
        )
    return texts, labels
