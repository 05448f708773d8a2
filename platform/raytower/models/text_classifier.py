"""The text classifier: one text in, one logit for each label out; its probabilities are their softmax.

Directories are plain Hugging Face sequence classifiers with the labels in config.json:
`transformers.pipeline("text-classification", model=DIR)` gives the same labels and probabilities.
Shape legend: B texts of one forward call, N texts in all, L tokens, C labels, K of them listed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from transformers import PretrainedConfig

from raytower.data.plain_labels import plain_label
from raytower.errors import FormatError, InputError
from raytower.models.class_ranks import rank_classes, softmax
from raytower.models.directory import load_tokenizer, read_info, transformer_folder
from raytower.models.logits_engine import LogitsEngine
from raytower.models.model_class import ModelClass, refuse_other_class
from raytower.models.sequence_classifier import (
    SequenceClassifier,
    finished_config,
    load_classifier,
    pad_apart,
    recorded_max_length,
    resolve_transformer,
)

# What transformers calls a classifier whose labels exclude each other.
_PROBLEM_TYPE = "single_label_classification"


class TextClassifier(SequenceClassifier):
    """A sequence classifier over single texts whose labels exclude each other."""

    model_class: ClassVar[ModelClass] = "classifier"

    @classmethod
    def load(cls, name: str | Path) -> TextClassifier:
        """Load a finished classifier directory or hub id.

        Raises:
            FormatError: it is an encoder or a reranker, weights are missing, or it is a
                regression, or a classifier of which several labels may hold at once.
        """
        path = resolve_transformer(str(name))
        refuse_other_class(path, "classifier")
        model, missing = load_classifier(path)
        if missing:
            raise FormatError(
                f"{str(path)!r} has no trained classification head ({missing[0]!r} is missing): it is no classifier; "
                "train one with `raytower train-classifier`"
            )
        labels, kind = _labels_of(model.config), model.config.problem_type
        if len(labels) < 2 or kind not in (None, _PROBLEM_TYPE):
            raise FormatError(
                f"{str(path)!r} has {len(labels)} label(s) and problem_type {kind!r}; a text classifier has at least "
                f"2 labels and the problem_type {_PROBLEM_TYPE!r}"
            )
        return cls(
            model, load_tokenizer(path, model.config), recorded_max_length(path, model), read_info(path)
        ).eval()

    @classmethod
    def start_from(cls, name: str | Path, labels: Sequence[str]) -> TextClassifier:
        """A classifier to train: on top of any encoder, with a fresh head (seed torch before), or a finished one.

        Raises:
            InputError: fewer than 2 labels, or a blank or repeated one; or `name` is a finished classifier of other
                labels, so its head cannot go on. It keeps the order of its own.
        """
        _check_labels(labels)
        path = transformer_folder(resolve_transformer(str(name)))
        finished = finished_config(path)
        if finished is None:
            numbers = dict(enumerate(labels))
            names = {label: number for number, label in numbers.items()}
            model, _ = load_classifier(path, id2label=numbers, label2id=names, problem_type=_PROBLEM_TYPE)
            tokenizer = load_tokenizer(path, model.config)
            pad_apart(model, tokenizer)
            return cls(model, tokenizer, recorded_max_length(path, model))
        own = tuple(map(plain_label, _labels_of(finished)))
        if sorted(own) != sorted(labels):
            raise InputError(
                f"{str(path)!r} is a finished classifier and {_difference(own, labels)}; train from "
                "an encoder, or give this classifier's own labels (id2label in config.json)"
            )
        other = cls.load(path)
        # Its metric history belongs to the weights before this training.
        return cls(other.model, other.tokenizer, other.max_length)

    def forward(self, **inputs: Tensor) -> Tensor:
        """Tokenised texts (B, L) → logits (B, C), in the order of `labels`."""
        return self.logits(**inputs)

    @property
    def labels(self) -> tuple[str, ...]:
        """The C labels, in the order of the logits."""
        return _labels_of(self.model.config)

    def compute_fingerprint(self) -> str:
        """Hash over weights, tokenizer and labels."""
        digest = self.digest_model()
        for label in self.labels:
            digest.update(f"{len(label)}:{label}".encode())
        return str(digest.hexdigest())


class ClassifierEngine(LogitsEngine[TextClassifier]):
    """Classifies texts with one classifier at one precision on one device."""

    @property
    def labels(self) -> tuple[str, ...]:
        """The C labels, in the order of the logits."""
        return self.model.labels

    def probabilities(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Probabilities, float32 (N, C), in the order of `labels`; each row sums to 1."""
        return softmax(self.logits(texts))

    def classify(
        self, texts: Sequence[str], top_k: int | None = None
    ) -> tuple[list[list[str]], NDArray[np.float32]]:
        """The labels of each text by falling probability, and those probabilities; see `rank_classes`."""
        return rank_classes(self.labels, self.logits(texts), top_k)


def _labels_of(config: PretrainedConfig) -> tuple[str, ...]:
    return tuple(name for _, name in sorted(cast("dict[int, str]", config.id2label).items()))


def _check_labels(labels: Sequence[str]) -> None:
    if len(labels) < 2:
        raise InputError(f"labels are {list(labels)}; a classifier needs at least 2")
    seen: set[str] = set()
    for label in labels:
        if not label.strip() or label in seen:
            raise InputError(f"label {label!r} is {'repeated' if label in seen else 'blank'}; give each once")
        seen.add(label)


def _difference(have: Sequence[str], want: Sequence[str]) -> str:
    extra = [label for label in want if label not in set(have)]
    if extra:
        return f"does not know {extra[0]!r}, one of {len(extra)} new labels"
    gone = [label for label in have if label not in set(want)]
    if gone:
        return f"knows {gone[0]!r}, one of {len(gone)} labels that are not asked for"
    return "has one label twice"
