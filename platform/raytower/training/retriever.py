"""`raytower train-retriever`: a two-tower encoder from pairs or triples."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from raytower.data.pieces import Survey
from raytower.data.pieces import survey as survey_input
from raytower.data.sources import InputConfig
from raytower.models.encoder import Encoder
from raytower.models.forward import check_max_length
from raytower.models.two_tower import TwoTower
from raytower.objectives.in_batch_negatives import BatchKeys, InBatchNegatives, text_keys
from raytower.storage import Location, absolute_if_local
from raytower.training.config import TrainRetrieverConfig
from raytower.training.dev_recall import DevSet, evaluate_encoder, load_dev_set
from raytower.training.inputs import ROWS_PER_PIECE, detect_kind, quarantine_place
from raytower.training.row_stream import Rows
from raytower.training.runner import describe_plan, fit

_CPU_TOKENS_PER_BATCH = 1024
_GPU_TOKENS_PER_BATCH = 65536


@dataclass(frozen=True)
class RetrieverTask:
    """In-batch-negative training of one encoder; see training.task.Task."""

    config: TrainRetrieverConfig
    dev: DevSet | None
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
        encoder = Encoder.load(start_from or self.start)
        if self.config.query_prefix is not None:
            encoder.prompts["query"] = self.config.query_prefix
        if self.config.document_prefix is not None:
            encoder.prompts["document"] = self.config.document_prefix
        check_max_length(self.config.max_length, encoder.max_positions)
        tokens = _GPU_TOKENS_PER_BATCH if torch.cuda.is_available() else _CPU_TOKENS_PER_BATCH
        return TwoTower(encoder, self.config.max_length, tokens)

    def loss(self, model: nn.Module, rows: Rows) -> Tensor:
        tower = cast(TwoTower, getattr(model, "module", model))
        query_prefix, document_prefix = _prefixes(tower.encoder)
        documents = [rows["document"], *([rows["negative"]] if "negative" in rows else [])]
        columns = [tower.tokenise(rows["query"], query_prefix)]
        columns += [tower.tokenise(texts, document_prefix) for texts in documents]
        query_BD, *document_columns = model(columns)
        keys = BatchKeys(
            query=text_keys(rows["query"], rows.get("query_id")),
            documents=tuple(
                text_keys(texts, rows.get("document_id") if number == 0 else None)
                for number, texts in enumerate(documents)
            ),
        )
        objective = InBatchNegatives(scale=self.config.objective.scale, margin=self.config.objective.margin)
        with torch.autocast(query_BD.device.type, enabled=False):
            return objective(query_BD, document_columns, keys)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        encoder = cast(TwoTower, model).encoder
        assert self.dev is not None
        assert self.metric is not None
        return evaluate_encoder(
            encoder,
            self.dev,
            metric=self.metric,
            prefixes=_prefixes(encoder),
            max_length=self.config.max_length,
            dtype=self.config.dtype,
        )

    def save(self, model: nn.Module, folder: Path, info: dict[str, Any]) -> None:
        cast(TwoTower, model).encoder.save(folder, info)


def train_retriever(config: TrainRetrieverConfig) -> dict[str, Any]:
    """Train and publish the encoder directory; returns steps, seconds, best, output.

    Raises:
        InputError: bad rows, fewer rows than a batch, an output made by another config, an unknown model.
    """

    def make_task() -> RetrieverTask:
        dev = load_dev_set(config.dev) if config.dev else None
        return RetrieverTask(config, dev, absolute_if_local(config.model))

    return fit(config, _survey(config), make_task)


def plan_train_retriever(config: TrainRetrieverConfig) -> dict[str, Any]:
    """The plan for --dry-run; reads the rows once and the model's weights, trains nothing."""
    encoder = Encoder.load(config.model)
    check_max_length(config.max_length, encoder.max_positions)
    parameters = sum(parameter.numel() for parameter in encoder.parameters())
    return describe_plan(config, _survey(config), parameters)


def _survey(config: TrainRetrieverConfig) -> Survey:
    kind = config.train.format
    source = InputConfig(path=config.train.path)
    return survey_input(
        source,
        detect_kind(source, ("pairs", "triples")) if kind == "auto" else kind,
        rows_per_piece=ROWS_PER_PIECE,
        on_error=config.on_error,
        quarantine=quarantine_place(Location.of(config.output)) if config.on_error == "quarantine" else None,
    )


def _prefixes(encoder: Encoder) -> tuple[str, str]:
    return encoder.prefix_for("query"), encoder.prefix_for("document")
