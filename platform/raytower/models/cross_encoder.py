"""The cross-encoder (reranker): query and document in one sequence, one relevance logit out.

Directories load with `sentence_transformers.CrossEncoder` and score the same.
Shape legend: B pairs of one forward call, N in all, L tokens, C logits a pair (1, or 2 classes).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from transformers import PretrainedConfig

from raytower.errors import FormatError, InputError
from raytower.models.directory import (
    load_tokenizer,
    read_info,
    read_json_object,
    resolve_model,
    transformer_folder,
)
from raytower.models.fusion import Fusion
from raytower.models.logits_engine import LogitsEngine
from raytower.models.sequence_classifier import (
    SequenceClassifier,
    finished_config,
    load_classifier,
    pad_apart,
    recorded_max_length,
)

Activation = Literal["sigmoid", "identity"]
# The names under which the peer library keeps what it puts on the logit when it predicts.
_ACTIVATIONS: dict[Activation, str] = {
    "sigmoid": "torch.nn.modules.activation.Sigmoid",
    "identity": "torch.nn.modules.linear.Identity",
}


class CrossEncoder(SequenceClassifier):
    """A sequence classifier over (query, document) with one logit, or two read as their difference."""

    reads_pairs: ClassVar[bool] = True

    activation: Activation = "sigmoid"
    """What a reader puts on what `forward` gives; of two logits it is the sigmoid always."""

    @classmethod
    def load(cls, name: str | Path) -> CrossEncoder:
        """Load a finished reranker directory or hub id.

        Raises:
            FormatError: weights are missing (an encoder is no reranker yet), it has other than 1 or 2 labels, or its
                logit has an activation that is not known here.
        """
        path = resolve_model(str(name))
        model, missing = load_classifier(path)
        if missing:
            raise FormatError(
                f"{str(path)!r} has no trained classification head ({missing[0]!r} is missing): it is no reranker; "
                "train one with `raytower train-reranker`"
            )
        if model.config.num_labels not in (1, 2):
            raise FormatError(
                f"{str(path)!r} has {model.config.num_labels} labels; a reranker has 1 logit or 2 classes"
            )
        tokenizer, max_length = load_tokenizer(path, model.config), recorded_max_length(path, model)
        loaded = cls(model, tokenizer, max_length, read_info(path)).eval()
        loaded.activation = _read_activation(path, model.config)
        return loaded

    @classmethod
    def start_from(cls, name: str | Path, num_labels: int = 1) -> CrossEncoder:
        """A reranker to train: on top of any encoder, with a fresh head (seed torch before), or a finished one.

        Raises:
            InputError: `name` is a finished classifier with another number of logits, so its head cannot go on.
        """
        path = transformer_folder(resolve_model(str(name)))
        finished = finished_config(path)
        if finished is None:
            model, _ = load_classifier(path, num_labels=num_labels)
            tokenizer = load_tokenizer(path, model.config)
            pad_apart(model, tokenizer)
            return cls(model, tokenizer, recorded_max_length(path, model))
        if finished.num_labels != num_labels:
            raise InputError(
                f"{str(path)!r} is a finished classifier with num_labels {finished.num_labels}, and the objective "
                f"trains {num_labels}; choose an objective with as many, or start from an encoder"
            )
        other = cls.load(path)
        # Its metric history and its fusion belong to the weights before this training.
        started = cls(other.model, other.tokenizer, other.max_length)
        started.activation = other.activation
        return started

    def save(self, path: str | Path, info: Mapping[str, Any] | None = None) -> None:
        """Write the directory; `info` goes into raytower.json with the fingerprint."""
        if self.num_labels == 1:
            self.model.config.sentence_transformers = {"activation_fn": _ACTIVATIONS[self.activation]}
        super().save(path, info)

    def forward(self, **inputs: Tensor) -> Tensor:
        """Tokenised pairs (B, L) → relevance logits (B,)."""
        logits_BC = self.logits(**inputs)
        return logits_BC[:, 0] if self.num_labels == 1 else logits_BC[:, 1] - logits_BC[:, 0]

    @property
    def fusion(self) -> Fusion | None:
        """How to mix this reranker's logits with recall scores; None where it was never tuned."""
        values = self.info.get("fusion")
        return Fusion.from_dict(values) if values else None


class CrossScorer(LogitsEngine[CrossEncoder]):
    """Scores pairs with one cross-encoder at one precision on one device."""

    row_name = "pair"

    @property
    def fusion(self) -> Fusion | None:
        """How to mix its logits with recall scores; None where it was never tuned."""
        return self.model.fusion

    def score(self, queries: Sequence[str], documents: Sequence[str]) -> NDArray[np.float32]:
        """Raw relevance logits, float32 (N,), of the pairs (queries[i], documents[i]).

        Raises:
            InputError: the two lists differ in length, or a text is no valid Unicode; it is named.
            RaytowerError: one pair alone does not fit into memory.
        """
        if len(queries) != len(documents):
            raise InputError(
                f"{len(queries)} queries and {len(documents)} documents given; pairs need equally many"
            )
        logits_NC = self.logits(queries, documents)
        return logits_NC[:, 0] if logits_NC.shape[1] == 1 else logits_NC[:, 1] - logits_NC[:, 0]


def _read_activation(path: Path, config: PretrainedConfig) -> Activation:
    """What the peer library would put on the logit: it looks into its own file first, then into config.json."""
    stated = read_json_object(path / "config_sentence_transformers.json").get("activation_fn")
    stated = stated or (getattr(config, "sentence_transformers", None) or {}).get("activation_fn")
    stated = stated or getattr(config, "sbert_ce_default_activation_function", None)
    if stated is None or config.num_labels != 1:
        return "sigmoid"
    known = {full.rsplit(".", 1)[-1]: name for name, full in _ACTIVATIONS.items()}
    name = known.get(str(stated).rsplit(".", 1)[-1])
    if name is None:
        raise FormatError(
            f"{str(path)!r} puts the activation {stated!r} on its logit; known are {sorted(known)}"
        )
    return name
