"""The forward engine: texts to vectors in one process. Imports no Ray, so it also runs alone beside an accelerator.

Texts are tokenised, sorted by length and cut into batches by a token budget; rows come back in input order.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raytower.errors import InputError
from raytower.models.batch_planner import plan_batches
from raytower.models.encoder import Encoder

ComputeDtype = Literal["float32", "bfloat16", "float16"]
TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_CPU_TOKENS_PER_BATCH = 2048
_GPU_TOKENS_PER_BATCH = 65536


@dataclass
class ForwardStats:
    """Running totals of one engine, for throughput reports."""

    rows: int = 0
    tokens: int = 0
    padded_tokens: int = 0
    tokenise_seconds: float = 0.0
    forward_seconds: float = 0.0


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def default_tokens_per_batch(device: torch.device) -> int:
    """Small batches stay in a CPU's cache; an accelerator wants big ones."""
    return _CPU_TOKENS_PER_BATCH if device.type == "cpu" else _GPU_TOKENS_PER_BATCH


class ForwardEngine:
    """Encodes texts with one encoder at one precision on one device."""

    def __init__(
        self,
        encoder: Encoder,
        *,
        dtype: ComputeDtype = "float32",
        device: str | torch.device | None = None,
        tokens_per_batch: int | None = None,
        max_length: int | None = None,
    ) -> None:
        """Take the encoder over: its weights are cast to `dtype` and moved to `device`.

        Raises:
            InputError: `max_length` is beyond the backbone's positions.
        """
        self.max_length = check_max_length(max_length or encoder.max_length, encoder.max_positions)
        self.device = torch.device(device) if device is not None else default_device()
        self.fingerprint = encoder.fingerprint  # before the cast: it names the model, not the precision
        self.encoder = encoder.eval().to(self.device)
        torch.nn.Module.to(self.encoder.backbone, dtype=TORCH_DTYPES[dtype])
        self.tokens_per_batch = tokens_per_batch or default_tokens_per_batch(self.device)
        self.stats = ForwardStats()

    @property
    def dim(self) -> int:
        return self.encoder.dim

    def encode(self, texts: Sequence[str], prefix: str = "") -> NDArray[np.float32]:
        """Vectors of `texts`, float32 (len(texts), dim), in input order; `prefix` is put before each text."""
        if len(texts) == 0:
            return np.zeros((0, self.dim), dtype=np.float32)
        return self.forward(self.tokenise(texts, prefix))

    def tokenise(self, texts: Sequence[str], prefix: str = "") -> list[list[int]]:
        """Token ids of each text, special tokens included, cut to `max_length`."""
        start = time.perf_counter()
        settings = self.encoder.settings
        prepared = [prefix + text for text in texts] if prefix else list(texts)
        if settings.lower_case:
            prepared = [text.lower() for text in prepared]
        ids: list[list[int]] = self.encoder.tokenizer(
            prepared,
            truncation=True,
            max_length=self.max_length,
            return_attention_mask=False,
            return_token_type_ids=False,
        )["input_ids"]
        self.stats.tokenise_seconds += time.perf_counter() - start
        return ids

    @torch.inference_mode()
    def forward(self, token_ids: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Vectors float32 (rows, dim) of tokenised texts, in input order."""
        start = time.perf_counter()
        plan = plan_batches([len(ids) for ids in token_ids], self.tokens_per_batch)
        output = torch.empty((len(token_ids), self.dim), dtype=torch.float32)
        pad_id = int(self.encoder.tokenizer.pad_token_id)
        for batch in plan.batches:
            input_ids, mask = pad_batch([token_ids[row] for row in batch], pad_id)
            vectors = self.encoder(input_ids.to(self.device), None if mask is None else mask.to(self.device))
            output[torch.from_numpy(batch)] = vectors.float().cpu()
        self.stats.rows += len(token_ids)
        self.stats.tokens += plan.num_tokens
        self.stats.padded_tokens += plan.num_padded_tokens
        self.stats.forward_seconds += time.perf_counter() - start
        return output.numpy()


def pad_batch(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor | None]:
    """Ids padded to the longest row (B, L) and their mask (B, L), or None where nothing had to be padded."""
    width = max(len(row) for row in rows)
    if all(len(row) == width for row in rows):
        return torch.tensor(rows, dtype=torch.long), None
    ids = np.full((len(rows), width), pad_id, dtype=np.int64)
    mask = np.zeros((len(rows), width), dtype=np.int64)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = row
        mask[number, : len(row)] = 1
    return torch.from_numpy(ids), torch.from_numpy(mask)


def check_max_length(max_length: int, positions: int) -> int:
    """Return `max_length` if the backbone has positions for it. Raises InputError otherwise."""
    if not 1 <= max_length <= positions:
        raise InputError(
            f"max_length is {max_length}; this model has positions for 1 to {positions} tokens; lower it"
        )
    return max_length
