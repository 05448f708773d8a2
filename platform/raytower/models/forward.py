"""The engine of encoders: texts to vectors in one process, by PyTorch or ONNX Runtime. Imports no Ray."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from raytower.models.ahead import Ahead
from raytower.models.block_engine import refuse_no_numbers
from raytower.models.encoder import Encoder
from raytower.models.engine_choice import RACE_TEXTS
from raytower.models.model_engine import ModelEngine
from raytower.models.token_block import TokenBlock


class ForwardEngine(ModelEngine[Encoder]):
    """Encodes texts with one encoder at one precision on one device."""

    @property
    def encoder(self) -> Encoder:
        """The encoder that was taken over."""
        return self.model

    @property
    def dim(self) -> int:
        """D, the embedding dimension."""
        return self.encoder.dim

    @property
    def width(self) -> int:
        """D: what the encoder gives for a row."""
        return self.encoder.dim

    def compute(self, inputs: dict[str, Tensor]) -> Tensor:
        """Vectors (B, D) of padded texts."""
        return cast(Tensor, self.encoder(**inputs))

    def encode(self, texts: Sequence[str], prefix: str = "") -> NDArray[np.float32]:
        """Vectors of `texts`, float32 (len(texts), D), in input order; `prefix` is put before each text.

        Raises:
            InputError: a text that is no valid Unicode, or a vector that holds NaN or infinity; it is named.
            RaytowerError: one text alone does not fit into memory.
        """
        vectors_ND = self.forward_rows(
            len(texts), lambda rows: self.tokenise(texts[rows], prefix, rows.start)
        )
        return refuse_no_numbers(vectors_ND, "encoder", self.row_name)

    def tokenise(self, texts: Sequence[str], prefix: str = "", start: int = 0) -> TokenBlock:
        """The texts behind `prefix`, cut to `max_length`; `start` is the first one's number, for messages."""
        return self.encoder.tokenise(texts, self.max_length, prefix, start=start)

    def tokenise_ahead(self, blocks: Iterable[Sequence[str]], prefix: str = "") -> Ahead[Any, TokenBlock]:
        """The blocks tokenised, each while the one before it is worked on; the first is begun at once."""
        return Ahead(lambda texts: self.tokenise(texts, prefix), blocks)

    def _race(self) -> None:
        for text in RACE_TEXTS:
            self.encode([text])
        self.encode(RACE_TEXTS)
