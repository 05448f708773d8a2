"""A sequence classifier as it is trained: rows of any length through one forward call, in chunks of similar length.

Shape legend: B rows of this worker, r rows of one chunk, C logits a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from raytower.models.batch_planner import plan_batches
from raytower.models.sequence_classifier import SequenceClassifier

LogitsChunk = tuple[dict[str, Tensor], Tensor]
"""Padded inputs (r, L) of a chunk, and the places (r,) of its rows in the batch."""

# As for encoders: small chunks stay in a CPU's cache.
_CPU_TOKENS_PER_BATCH = 2048
_GPU_TOKENS_PER_BATCH = 65536


class LogitsModel(nn.Module):
    """Wraps a classifier so that data parallelism sees one forward call for all chunks of a batch."""

    def __init__(self, inner: SequenceClassifier) -> None:
        super().__init__()
        self.inner = inner

    def plan_chunks(self, rows: Mapping[str, list[list[int]]]) -> list[LogitsChunk]:
        """Pad tokenised rows, as the tokenizer gives them without padding, in chunks on the model's device."""
        device = self.inner.model.device
        budget = _CPU_TOKENS_PER_BATCH if device.type == "cpu" else _GPU_TOKENS_PER_BATCH
        plan = plan_batches([len(ids) for ids in rows["input_ids"]], budget)
        chunks = []
        for batch in plan.batches:
            part = {name: [values[row] for row in batch] for name, values in rows.items()}
            inputs = self.inner.tokenizer.pad(part, return_tensors="pt").to(device)
            chunks.append((dict(inputs), torch.from_numpy(batch).to(device)))
        return chunks

    def forward(self, chunks: Sequence[LogitsChunk]) -> Tensor:
        """Logits (B, C) in fp32, in the order of the rows."""
        parts = [self.inner.logits(**inputs) for inputs, _ in chunks]
        rows_B = torch.cat([rows for _, rows in chunks])
        return torch.cat(parts)[torch.argsort(rows_B)]
