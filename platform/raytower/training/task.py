"""What the training loop asks of a task: a retriever and a reranker differ in these steps only."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from raytower.training.row_stream import Rows


class Task(Protocol):
    """One kind of model under training. Made on the driver, sent to every worker; holds no weights itself."""

    @property
    def metric(self) -> str | None:
        """The dev metric that chooses the best checkpoint; None without a dev set."""

    @property
    def every_steps(self) -> int:
        """Steps between evaluations."""

    @property
    def patience(self) -> int:
        """Evaluations without a better value before training stops."""

    def build(self, start_from: Path | None) -> nn.Module:
        """The model in fp32, from the config's start or from a checkpoint's model directory."""

    def loss(self, model: nn.Module, rows: Rows) -> Tensor:
        """Mean loss over this worker's rows, through `model` (perhaps wrapped for data parallelism)."""

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Dev metrics of the unwrapped model; every worker calls it together and gets the same answer."""

    def save(self, model: nn.Module, folder: Path, info: dict[str, Any]) -> None:
        """Write the unwrapped model's directory."""
