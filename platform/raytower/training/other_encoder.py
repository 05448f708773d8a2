"""Another encoder beside the one that is trained: a teacher whose vectors it follows, or a guide. Imports no Ray.

Shape legend: B rows of this worker, R texts, T the other encoder's dimension.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from raytower.models.encoder import Encoder
from raytower.models.forward import ForwardEngine
from raytower.objectives.config import EmbeddingDistillation
from raytower.training.columns import TextColumns
from raytower.training.config import TrainRetrieverConfig
from raytower.training.shares import evaluation_dtype


def other_encoder_name(config: TrainRetrieverConfig) -> str | None:
    """The encoder that training asks for vectors: the guide, or the teacher of embedding_distillation."""
    if config.guide is not None:
        return config.guide.encoder
    follows = any(isinstance(objective, EmbeddingDistillation) for objective in config.objectives)
    return config.teacher if follows else None


class OtherEncoder:
    """Gives vectors and is not trained. It has prefixes of its own, and reads as many tokens as the trained one."""

    def __init__(self, name: str, config: TrainRetrieverConfig, device: torch.device) -> None:
        """Raises InputError, or FormatError, where `name` is no encoder."""
        encoder = Encoder.load(name)
        self._engine = ForwardEngine(
            encoder,
            dtype=evaluation_dtype(config.dtype, device),
            device=device,
            max_length=min(config.max_length, encoder.max_length),
        )

    @property
    def dim(self) -> int:
        """T."""
        return self._engine.dim

    def vectors_of(self, columns: TextColumns) -> tuple[Tensor, ...]:
        """Vectors (B, T) of each column, queries first, of unit length; 0 where a row has no document."""
        encoder = self._engine.encoder
        query_BT = self._encode(columns.queries, encoder.prefix_for("query"))
        document_RT = self._encode(columns.present_documents, encoder.prefix_for("document"))
        return (query_BT, *columns.place(document_RT))

    def _encode(self, texts: Sequence[str], prefix: str) -> Tensor:
        return nn.functional.normalize(torch.from_numpy(self._engine.encode(texts, prefix)), dim=-1)
