"""The encoder as it is trained: several columns of texts through shared weights in one forward call.

Shape legend: B rows of this worker, D embedding dimension.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from raytower.models.batch_planner import plan_batches
from raytower.models.encoder import Encoder
from raytower.models.forward import pad_batch

TokenIds = list[list[int]]


class TwoTower(nn.Module):
    """Wraps an encoder so that data parallelism sees one forward call for queries and documents alike."""

    def __init__(self, encoder: Encoder, max_length: int, tokens_per_batch: int) -> None:
        """`tokens_per_batch` bounds the padded tokens of one backbone call; it saves padding, not memory."""
        super().__init__()
        self.encoder = encoder
        self.max_length = max_length
        self.tokens_per_batch = tokens_per_batch

    def tokenise(self, texts: Sequence[str], prefix: str) -> TokenIds:
        """Ids of each text with its prefix, cut to `max_length`."""
        prepared = [prefix + text for text in texts]
        if self.encoder.settings.lower_case:
            prepared = [text.lower() for text in prepared]
        ids: TokenIds = self.encoder.tokenizer(
            prepared,
            truncation=True,
            max_length=self.max_length,
            return_attention_mask=False,
            return_token_type_ids=False,
        )["input_ids"]
        return ids

    def forward(self, columns: Sequence[TokenIds]) -> list[Tensor]:
        """Embeddings (B, D), unit length, of each column of tokenised texts, with gradients."""
        return [self._embed(token_ids) for token_ids in columns]

    def _embed(self, token_ids: TokenIds) -> Tensor:
        device = next(self.encoder.parameters()).device
        pad_id = int(self.encoder.tokenizer.pad_token_id)
        plan = plan_batches([len(ids) for ids in token_ids], self.tokens_per_batch)
        parts = []
        for batch in plan.batches:
            ids, mask = pad_batch([token_ids[row] for row in batch], pad_id)
            parts.append(self.encoder(ids.to(device), None if mask is None else mask.to(device)))
        order = torch.cat([torch.from_numpy(batch) for batch in plan.batches]).to(device)
        vectors_BD = torch.cat(parts)[torch.argsort(order)]
        return nn.functional.normalize(vectors_BD, dim=-1)
