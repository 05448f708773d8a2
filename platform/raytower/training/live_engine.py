"""The engine of dev measurements: it computes with the model under training as that stands. Imports no Ray.

No weight is copied, cast or hashed, and results stay on the device: of a large model each of these would take longer
than the dev rows.

Shape legend: B rows of a batch, N rows in all, W values that the model gives for a row, D embedding dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from raytower.models.ahead import Ahead
from raytower.models.block_engine import BlockEngine, refuse_no_numbers
from raytower.models.device import TORCH_DTYPES
from raytower.models.encoder import Encoder
from raytower.models.known_padding import padding_is_known
from raytower.models.sequence_classifier import SequenceClassifier
from raytower.models.token_block import TokenBlock
from raytower.training.shares import evaluation_dtype


class LiveEngine(BlockEngine):
    """Computes rows with a model that is in eval mode and goes on training."""

    def __init__(self, model: Encoder | SequenceClassifier, *, dtype: str, max_length: int) -> None:
        """`dtype` is the precision of training, in which forward passes are made here, too."""
        device = next(model.parameters()).device
        super().__init__(device, model.padding, max_length=max_length, tokens_per_batch=None)
        self.model = model
        self._dtype = TORCH_DTYPES[evaluation_dtype(dtype, self.device)]

    @property
    def width(self) -> int:
        """W: what the model gives for a row."""
        return self.model.dim if isinstance(self.model, Encoder) else self.model.num_labels

    @property
    def transformer(self) -> nn.Module:
        """The model itself."""
        return self.model

    def compute(self, inputs: dict[str, Tensor]) -> Tensor:
        """Vectors, or logits, (B, W) of padded rows."""
        if isinstance(self.model, Encoder):
            return cast(Tensor, self.model(**inputs))
        return self.model.logits(**inputs)

    def encode(self, texts: Sequence[str], prefix: str | Sequence[str] = "") -> Tensor:
        """Vectors, float32 (N, D) on the device, of texts behind a prefix, or each behind its own, by an encoder.

        Raises:
            InputError: a vector that holds NaN or infinity.
            RaytowerError: one text alone does not fit into memory.
        """
        encoder = cast(Encoder, self.model)

        def tokenise_rows(rows: slice) -> TokenBlock:
            own = prefix if isinstance(prefix, str) else prefix[rows]
            return encoder.tokenise(texts[rows], self.max_length, own, start=rows.start)

        return self._refused(self._forward_all(len(texts), tokenise_rows), "encoder", "dev text")

    def logits(self, *columns: Sequence[str]) -> Tensor:
        """Logits, float32 (N, W) on the device, of texts or pairs, by a classifier. Raises as `encode`."""
        classifier = cast(SequenceClassifier, self.model)

        def tokenise_rows(rows: slice) -> TokenBlock:
            return classifier.tokenise([column[rows] for column in columns], self.max_length, rows.start)

        logits_NW = self._forward_all(len(columns[0]), tokenise_rows)
        return self._refused(logits_NW, "classifier", "dev row")

    def _forward_all(self, num_rows: int, tokenise_rows: Callable[[slice], TokenBlock]) -> Tensor:
        starts = range(0, num_rows, self.block_rows)
        slices = [slice(start, min(start + self.block_rows, num_rows)) for start in starts]
        parts = [torch.empty((0, self.width), device=self.device)]
        with self._as_trained(), Ahead(tokenise_rows, slices) as blocks:
            parts += [self.forward_on_device(block) for block in blocks]
        return torch.cat(parts)

    @contextmanager
    def _as_trained(self) -> Iterator[None]:
        """Forward passes at the precision of training. A compiled model would be compiled anew for eval mode."""
        is_mixed = self._dtype is not torch.float32
        with (
            torch.autocast(self.device.type, dtype=self._dtype, enabled=is_mixed),
            torch.compiler.set_stance("force_eager"),
            padding_is_known(),
        ):
            yield

    @staticmethod
    def _refused(values_NW: Tensor, model: str, row_name: str) -> Tensor:
        if not bool(values_NW.isfinite().all()):
            refuse_no_numbers(values_NW.cpu().numpy(), model, row_name)
        return values_NW
