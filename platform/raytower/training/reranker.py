"""`raytower train-reranker`: a cross-encoder from scored pairs or triples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from raytower.data.pieces import Survey, read_piece
from raytower.data.pieces import survey as survey_input
from raytower.data.sources import InputConfig
from raytower.metrics import auc
from raytower.models.cross_encoder import CrossEncoder
from raytower.models.forward import check_max_length
from raytower.objectives.gather import gather_constants, rank, world_size
from raytower.objectives.pointwise import PointwiseCrossEntropy
from raytower.storage import Location, absolute_if_local
from raytower.training.config import RerankerDevConfig, TrainRerankerConfig
from raytower.training.inputs import ROWS_PER_PIECE, detect_kind, quarantine_place
from raytower.training.row_stream import Rows
from raytower.training.runner import describe_plan, fit

_EVALUATION_ROWS = 32
ScoredRows = tuple[list[str], list[str], list[float]]


@dataclass(frozen=True)
class RerankerTask:
    """Pointwise training of one cross-encoder; see training.task.Task."""

    config: TrainRerankerConfig
    dev: ScoredRows | None
    start: str
    """config.model, absolute where it is a directory here."""

    @property
    def metric(self) -> str | None:
        return self.config.dev.metric if self.config.dev else None

    @property
    def every_steps(self) -> int:
        return self.config.dev.every_steps if self.config.dev else 0

    @property
    def patience(self) -> int:
        return self.config.dev.patience if self.config.dev else 0

    def build(self, start_from: Path | None) -> nn.Module:
        model = CrossEncoder.load(start_from) if start_from else CrossEncoder.start_from(self.start)
        model.max_length = check_max_length(self.config.max_length, model.max_positions)
        return model

    def loss(self, model: nn.Module, rows: Rows) -> Tensor:
        queries, documents, labels = _expand(rows)
        logits_B = model(**self._inputs(model, queries, documents))
        labels_B = torch.tensor(labels, dtype=torch.float32, device=logits_B.device)
        objective = PointwiseCrossEntropy(positive_weight=self.config.objective.positive_weight)
        with torch.autocast(logits_B.device.type, enabled=False):
            return objective(logits_B.float(), labels_B)

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        assert self.dev is not None
        queries, documents, labels = self.dev
        share = range(rank(), len(labels), world_size())
        # Padded to equal shares with a score that is cut off again below.
        scores = torch.zeros(-(-len(labels) // world_size()))
        device = next(model.parameters()).device.type
        with torch.autocast(device, dtype=torch.bfloat16, enabled=self.config.dtype == "bfloat16"):
            for start in range(0, len(share), _EVALUATION_ROWS):
                block = share[start : start + _EVALUATION_ROWS]
                inputs = self._inputs(model, [queries[i] for i in block], [documents[i] for i in block])
                scores[start : start + len(block)] = model(**inputs).float().cpu()
        together = gather_constants(scores).reshape(world_size(), -1).T.reshape(-1)[: len(labels)]
        return {"auc": auc(together.numpy(), np.asarray(labels))}

    def save(self, model: nn.Module, folder: Path, info: dict[str, Any]) -> None:
        cast(CrossEncoder, model).save(folder, info)

    def _inputs(
        self, model: nn.Module, queries: Sequence[str], documents: Sequence[str]
    ) -> dict[str, Tensor]:
        inner = cast(CrossEncoder, getattr(model, "module", model))
        encoded = inner.tokenizer(
            list(queries),
            list(documents),
            truncation="longest_first",
            max_length=self.config.max_length,
            padding=True,
            return_tensors="pt",
        )
        return dict(encoded.to(next(inner.parameters()).device))


def train_reranker(config: TrainRerankerConfig) -> dict[str, Any]:
    """Train and publish the reranker directory; returns steps, seconds, best, output.

    Raises:
        InputError: bad rows, fewer rows than a batch, an output made by another config, an unknown model.
    """

    def make_task() -> RerankerTask:
        dev = _load_dev(config.dev) if config.dev else None
        return RerankerTask(config, dev, absolute_if_local(config.model))

    return fit(config, _survey(config), make_task)


def plan_train_reranker(config: TrainRerankerConfig) -> dict[str, Any]:
    """The plan for --dry-run; reads the rows once and the model's weights, trains nothing."""
    model = CrossEncoder.start_from(config.model)
    check_max_length(config.max_length, model.max_positions)
    return describe_plan(config, _survey(config), sum(parameter.numel() for parameter in model.parameters()))


def _survey(config: TrainRerankerConfig) -> Survey:
    kind = config.train.format
    source = InputConfig(path=config.train.path)
    return survey_input(
        source,
        detect_kind(source, ("scored", "triples")) if kind == "auto" else kind,
        rows_per_piece=ROWS_PER_PIECE,
        on_error=config.on_error,
        quarantine=quarantine_place(Location.of(config.output)) if config.on_error == "quarantine" else None,
    )


def _load_dev(config: RerankerDevConfig) -> ScoredRows:
    surveyed = survey_input(InputConfig(path=config.path), "scored", rows_per_piece=ROWS_PER_PIECE)
    queries: list[str] = []
    documents: list[str] = []
    labels: list[float] = []
    for piece in surveyed.pieces:
        table = read_piece(piece)
        queries += table["query"].to_pylist()
        documents += table["document"].to_pylist()
        labels += table["label"].to_pylist()
    return queries, documents, labels


def _expand(rows: Rows) -> ScoredRows:
    """Scored rows as they are; a triple as one relevant and one irrelevant pair."""
    if "negative" not in rows:
        return rows["query"], rows["document"], rows["label"]
    size = len(rows["query"])
    return rows["query"] * 2, rows["document"] + rows["negative"], [1.0] * size + [0.0] * size
