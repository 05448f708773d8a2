"""A sequence classifier as it is trained: rows of any length through one forward call, in chunks of similar length.

Shape legend: B rows of this worker, C logits a row.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from raytower.models.chunks import Chunk, Shares, cut_chunks, in_row_order
from raytower.models.device import default_tokens_per_batch
from raytower.models.known_padding import padding_is_known
from raytower.models.sequence_classifier import SequenceClassifier
from raytower.models.token_block import TokenBlock


class LogitsModel(nn.Module):
    """Wraps a classifier so that data parallelism sees one forward call for all chunks of a batch."""

    def __init__(self, inner: SequenceClassifier) -> None:
        super().__init__()
        self.inner = inner

    def plan_chunks(self, block: TokenBlock, shares: Shares | None = None) -> list[Chunk]:
        """Cut tokenised rows into chunks of similar length, on the model's device."""
        device = self.inner.model.device
        tokens = default_tokens_per_batch(device)
        return cut_chunks(block, self.inner.padding, device, tokens_per_batch=tokens, shares=shares)

    def forward(self, chunks: Sequence[Chunk]) -> Tensor:
        """Logits (B, C) in fp32, in the order of the rows."""
        logits = []
        with padding_is_known():
            for chunk in chunks:
                chunk.begin()
                # A chunk may hold a row more than it stands for: see `Sharding.even_out`.
                logits.append(self.inner.logits(**chunk.inputs)[: len(chunk.rows)])
        return in_row_order(logits, chunks)
