"""Task: the steps of training in which a retriever, a reranker and a classifier differ."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Generic, Self, TypeVar

import torch
from torch import Tensor, nn

from raytower.data.pieces import Survey
from raytower.training.batches import Rows
from raytower.training.config import ALONE, DevConfig, TrainJobConfig
from raytower.training.mixing import SET
from raytower.training.sibling_labels import Siblings
from raytower.training.step import TrainingStep

_CPU = torch.device("cpu")
ConfigT = TypeVar("ConfigT", bound=TrainJobConfig)


@dataclass(frozen=True)
class RowSet(Generic[ConfigT]):
    """One of the sets of training rows, or the one that there is."""

    config: ConfigT
    """The job's config as it holds for these rows."""
    num_documents: int | None = None
    """Most documents of a candidate list; None for other rows."""
    distinct_columns: tuple[str, ...] = ()
    """Columns whose values no two rows of a batch should share."""
    name: str = ALONE
    """Of several sets, which."""
    siblings: Siblings = field(default_factory=dict)
    """Of each label those of the same parent, where they are hard negatives."""


class Task(ABC, Generic[ConfigT]):
    """One kind of model under training. Made on the driver and sent to every worker; holds no weights until `build`."""

    distinct_columns: tuple[str, ...] = ()
    """Columns whose values no two rows of a batch should share."""

    num_documents: int | None = None
    """Most documents of a candidate list; None for other rows."""

    siblings: Siblings = MappingProxyType({})
    """Of each label those of the same parent, where they are hard negatives."""

    def __init__(self, config: ConfigT, start: str) -> None:
        """`start` is config.start; a local directory must be absolute, because workers run in folders of their own."""
        self.config = config
        self.start = start
        self.sets: Mapping[str, RowSet[ConfigT]] = {}
        """Several sets of rows by name; where there is one, it is as the task itself says."""

    def set_of(self, rows: Rows) -> RowSet[ConfigT]:
        """The set that the rows of a batch are of."""
        if SET in rows:
            return self.sets[rows[SET][0]]
        return RowSet(self.config, self.num_documents, self.distinct_columns, siblings=self.siblings)

    @staticmethod
    def observe_set(step: TrainingStep, own: RowSet[ConfigT], loss: Tensor) -> None:
        """Note the loss, a scalar, of the set that a batch is of, where there are several."""
        if own.name != ALONE:
            step.observe(f"loss/{own.name}", loss)

    @classmethod
    @abstractmethod
    def survey(cls, config: ConfigT) -> Survey:
        """Survey the training rows as the kind that the objective trains from.

        Raises:
            InputError: bad rows under on_error fail, or rows of another kind.
        """

    @classmethod
    @abstractmethod
    def prepare(cls, config: ConfigT, surveyed: Survey) -> Self:
        """The task, once model, rows and objective are known to fit together.

        Raises:
            InputError: they do not fit together, or there is no such model.
        """

    @property
    def keeps_weights_apart(self) -> bool:
        """Whether weights train that a checkpoint's model directory lacks, such as unmerged adapters."""
        return self.config.lora is not None

    @property
    def dev(self) -> DevConfig | None:
        """When to measure, and what chooses the best checkpoint; None without a dev set."""
        return self.config.dev

    @property
    def told_metrics(self) -> list[str]:
        """The dev metrics that a line of the log has; the last one chooses the best checkpoint."""
        return [] if self.dev is None else [self.dev.metric]

    @abstractmethod
    def build(self, start_from: Path | None, device: torch.device = _CPU) -> nn.Module:
        """The model in fp32, from the config's start or from a checkpoint's model directory.

        `device` is where the caller will put it and train it.
        """

    @abstractmethod
    def load_batch(self, step: TrainingStep, rows: Rows) -> Any:
        """What `propagate` takes of this worker's rows: tokenised, cut into chunks, on the model's device.

        It is called in a thread of its own while `step` computes the batch before: it draws nothing by chance, computes
        nothing with the model, and exchanges nothing with other workers.
        """

    @abstractmethod
    def propagate(self, step: TrainingStep, batch: Any) -> Tensor:
        """Add the gradient of the mean loss over the rows of `load_batch`, by `step.propagate`; returns the loss, a
        scalar."""

    def backward(self, step: TrainingStep, rows: Rows) -> Tensor:
        """Both of it for rows that nothing was done with ahead."""
        return self.propagate(step, self.load_batch(step, rows))

    @abstractmethod
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Dev metrics of the unwrapped model; every worker calls it together and gets the same answer."""

    @abstractmethod
    def save(self, model: nn.Module, folder: Path, info: Mapping[str, Any]) -> None:
        """Write the unwrapped model's directory, adapters merged."""
