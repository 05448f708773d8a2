"""The engine of encoders: texts to vectors in one process, by PyTorch or ONNX Runtime. Imports no Ray."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from raytower.models.ahead import Ahead
from raytower.models.block_engine import BlockEngine, refuse_no_numbers
from raytower.models.compute import EngineChoice, EngineDtype, check_compute, check_max_length
from raytower.models.device import TORCH_DTYPES, choose_device
from raytower.models.encoder import Encoder
from raytower.models.engine_choice import RACE_TEXTS, Settled, narrowed, settle_engine
from raytower.models.onnx_export import body_of
from raytower.models.token_block import TokenBlock


class ForwardEngine(BlockEngine):
    """Encodes texts with one encoder at one precision on one device."""

    def __init__(
        self,
        encoder: Encoder,
        *,
        engine: EngineChoice = "torch",
        dtype: EngineDtype = "float32",
        device: str | torch.device | None = None,
        tokens_per_batch: int | None = None,
        max_length: int | None = None,
        directory: Path | None = None,
    ) -> None:
        """Take the encoder over: its weights are cast to `dtype` and moved to `device`, or replaced by an ONNX graph.

        Engine auto times both and takes the faster; `settled` says which. `directory` is where the encoder was loaded
        from, in case `raytower export` put a graph there. Without one the graph is exported once into this machine's
        cache.

        Raises:
            InputError: `max_length` is beyond the backbone's positions, there is no such device, the engine does not
                compute in `dtype` or on it, or a number is none.
            MissingExtraError: engine onnx without ONNX Runtime.
        """
        check_compute(engine, dtype)
        engine = narrowed(engine, dtype)
        super().__init__(
            choose_device(device, engine),
            encoder.padding,
            max_length=check_max_length(
                encoder.max_length if max_length is None else max_length, encoder.max_positions
            ),
            tokens_per_batch=tokens_per_batch,
        )
        self.fingerprint = encoder.fingerprint  # before the cast: it names the model, not the precision
        self.encoder = encoder.eval()
        self.encoder.to(self.device)
        self.settled: Settled = settle_engine(self.encoder, engine, dtype, self.device, directory, self._race)
        if self.settled.engine == "torch":
            torch.nn.Module.to(self.encoder.backbone, dtype=TORCH_DTYPES[dtype])

    @property
    def dim(self) -> int:
        """D, the embedding dimension."""
        return self.encoder.dim

    @property
    def width(self) -> int:
        """D: what the encoder gives for a row."""
        return self.encoder.dim

    @property
    def transformer(self) -> nn.Module:
        """The encoder's backbone."""
        return body_of(self.encoder)

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
