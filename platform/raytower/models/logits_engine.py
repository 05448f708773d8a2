"""The engine of sequence classifiers: texts or pairs to logits in one process, by PyTorch or ONNX Runtime. No Ray.

Shape legend: B rows of one forward call, N rows in all, C logits a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from raytower.models.engine_choice import RACE_TEXTS
from raytower.models.model_engine import ModelEngine
from raytower.models.sequence_classifier import SequenceClassifier
from raytower.models.token_block import TokenBlock

ClassifierT = TypeVar("ClassifierT", bound=SequenceClassifier)


class LogitsEngine(ModelEngine[ClassifierT]):
    """Computes the logits of one sequence classifier at one precision on one device."""

    @property
    def width(self) -> int:
        """C, the logits of a row."""
        return self.model.num_labels

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
