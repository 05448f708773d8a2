"""The engine of sequence classifiers: texts or pairs to logits in one process, by PyTorch or ONNX Runtime. No Ray.

Shape legend: B rows of one forward call, N rows in all, C logits a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from raytower.models.block_engine import BlockEngine
from raytower.models.compute import EngineChoice, EngineDtype, check_compute, check_max_length
from raytower.models.device import TORCH_DTYPES, choose_device
from raytower.models.engine_choice import RACE_TEXTS, Settled, narrowed, settle_engine
from raytower.models.onnx_export import body_of
from raytower.models.sequence_classifier import SequenceClassifier
from raytower.models.token_block import TokenBlock

ClassifierT = TypeVar("ClassifierT", bound=SequenceClassifier)


class LogitsEngine(BlockEngine, Generic[ClassifierT]):
    """Computes the logits of one sequence classifier at one precision on one device."""

    def __init__(
        self,
        model: ClassifierT,
        *,
        engine: EngineChoice = "torch",
        dtype: EngineDtype = "float32",
        device: str | torch.device | None = None,
        tokens_per_batch: int | None = None,
        max_length: int | None = None,
        directory: Path | None = None,
    ) -> None:
        """Take the model over: its weights are cast to `dtype` and moved to `device`, or replaced by an ONNX graph.

        `engine` and `directory` are as of `ForwardEngine`.

        Raises:
            InputError: `max_length` is beyond the model's positions, the engine does not compute in `dtype` or on
                `device`, or a number is none.
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
        self.model = model.eval().to(self.device)
        self.settled: Settled = settle_engine(self.model, engine, dtype, self.device, directory, self._race)
        if self.settled.engine == "torch":
            self.model.to(dtype=TORCH_DTYPES[dtype])

    @property
    def width(self) -> int:
        """C, the logits of a row."""
        return self.model.num_labels

    @property
    def transformer(self) -> nn.Module:
        """The model without its tokenizer."""
        return body_of(self.model)

    def compute(self, inputs: dict[str, Tensor]) -> Tensor:
        """Logits (B, C) of padded rows."""
        return self.model.logits(**inputs)

    def logits(self, *columns: Sequence[str]) -> NDArray[np.float32]:
        """Logits, float32 (N, C), of texts, or of the pairs of two columns, in input order.

        Raises:
            InputError: a text that is no valid Unicode; it is named.
            RaytowerError: one row alone does not fit into memory.
        """

        def tokenise_rows(rows: slice) -> TokenBlock:
            return self.model.tokenise([column[rows] for column in columns], self.max_length, rows.start)

        return self.forward_rows(len(columns[0]), tokenise_rows)

    def _race(self) -> None:
        for number in range(len(RACE_TEXTS)):
            self._logits_of(RACE_TEXTS[number : number + 1])
        self._logits_of(RACE_TEXTS)

    def _logits_of(self, texts: Sequence[str]) -> None:
        self.logits(*([texts, texts] if self.model.reads_pairs else [texts]))
