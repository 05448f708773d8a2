"""One model on one device, at one precision, by PyTorch or ONNX Runtime: what the engines of all models share. No Ray.

Shape legend: B rows of one forward call, W values that the model gives for a row.
"""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import nn

from raytower.models.block_engine import BlockEngine
from raytower.models.compute import EngineChoice, EngineDtype, check_compute, check_max_length
from raytower.models.device import TORCH_DTYPES, choose_device
from raytower.models.engine_choice import Settled, narrowed, settle_engine
from raytower.models.onnx_export import Model, body_of

ModelT = TypeVar("ModelT", bound=Model)


class ModelEngine(BlockEngine, Generic[ModelT]):
    """Computes rows with one model; what goes in and what comes out is the subclass's."""

    def __init__(
        self,
        model: ModelT,
        *,
        engine: EngineChoice = "torch",
        dtype: EngineDtype = "float32",
        device: str | torch.device | None = None,
        tokens_per_batch: int | None = None,
        max_length: int | None = None,
        directory: Path | None = None,
    ) -> None:
        """Take the model over: its transformer is cast to `dtype` and moved to `device`, or replaced by an ONNX graph.

        Engine auto times both and takes the faster; `settled` says which. `directory` is where the model was loaded
        from, in case `raytower export` put a graph there. Without one the graph is exported once into this machine's
        cache.

        Raises:
            InputError: `max_length` is beyond the model's positions, there is no such device, the engine does not
                compute in `dtype` or on it, or a number is none.
            MissingExtraError: engine onnx without ONNX Runtime.
        """
        check_compute(engine, dtype)
        engine = narrowed(engine, dtype)
        super().__init__(
            choose_device(device, engine),
            model.padding,
            max_length=check_max_length(
                model.max_length if max_length is None else max_length, model.max_positions
            ),
            tokens_per_batch=tokens_per_batch,
        )
        self.fingerprint = model.fingerprint  # before the cast: it names the model, not the precision
        self.model: ModelT = model
        self.model.eval().to(self.device)
        self.settled: Settled = settle_engine(self.model, engine, dtype, self.device, directory, self._race)
        if self.settled.engine == "torch":
            # Of an encoder what follows the transformer stays in float32.
            nn.Module.to(self.transformer, dtype=TORCH_DTYPES[dtype])

    @property
    def transformer(self) -> nn.Module:
        """The transformer in the model, or the graph in its place."""
        return body_of(self.model)

    @abstractmethod
    def _race(self) -> None:
        """Compute a few texts, one by one and together; engine auto takes the time of it."""
