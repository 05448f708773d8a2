"""The encoder as it is trained: any number of text columns through shared weights, in batches of similar length.

Shape legend: C columns, B rows of this worker, R = C·B texts, r texts of one chunk, L tokens, D embedding dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from raytower.models.batch_planner import plan_batches
from raytower.models.encoder import Encoder
from raytower.models.forward import pad_batch

TokenIds = list[list[int]]


@dataclass(frozen=True)
class Chunk:
    """Texts that go through the backbone together.

    ids: (r, L). mask: (r, L), or None where nothing had to be padded. rows: (r,) places of the texts among all R texts,
    which stand column after column.
    """

    ids: Tensor
    mask: Tensor | None
    rows: Tensor


class TwoTower(nn.Module):
    """Wraps an encoder so that data parallelism sees one forward call for queries and documents alike."""

    def __init__(
        self, encoder: Encoder, max_length: int, tokens_per_batch: int, rows_per_batch: int | None = None
    ) -> None:
        """`tokens_per_batch` bounds the padded tokens of a chunk, `rows_per_batch` its texts.

        Without gradient caching chunks save padding, not memory; with it, a chunk is what the peak memory holds.
        """
        super().__init__()
        self.encoder = encoder
        self.max_length = max_length
        self.tokens_per_batch = tokens_per_batch
        self.rows_per_batch = rows_per_batch

    def tokenise(self, texts: Sequence[str], prefix: str) -> TokenIds:
        """Ids of each text with its prefix, cut to `max_length`."""
        ids: TokenIds = self.encoder.tokenizer(
            self.encoder.prepared(texts, prefix),
            truncation=True,
            max_length=self.max_length,
            return_attention_mask=False,
            return_token_type_ids=False,
        )["input_ids"]
        return ids

    def plan_chunks(self, columns: Sequence[TokenIds]) -> list[Chunk]:
        """Cut the texts of all columns into chunks of similar length, on the encoder's device."""
        device = next(self.encoder.parameters()).device
        pad_id = int(self.encoder.tokenizer.pad_token_id)
        texts = [ids for column in columns for ids in column]
        plan = plan_batches(
            [len(ids) for ids in texts], self.tokens_per_batch, rows_per_batch=self.rows_per_batch
        )
        chunks = []
        for batch in plan.batches:
            ids, mask = pad_batch([texts[row] for row in batch], pad_id)
            chunks.append(
                Chunk(
                    ids=ids.to(device),
                    mask=None if mask is None else mask.to(device),
                    rows=torch.from_numpy(batch).to(device),
                )
            )
        return chunks

    def forward(self, chunks: Sequence[Chunk]) -> list[Tensor]:
        """Embeddings (r, D), unit length, of each chunk's texts, with gradients."""
        vectors = [self.encoder(chunk.ids, chunk.mask) for chunk in chunks]
        return [nn.functional.normalize(vectors_rD, dim=-1) for vectors_rD in vectors]


def split_columns(vectors: Sequence[Tensor], chunks: Sequence[Chunk], num_columns: int) -> tuple[Tensor, ...]:
    """The embeddings (B, D) of each column, in row order, from those of the chunks."""
    rows_R = torch.cat([chunk.rows for chunk in chunks])
    return torch.cat(list(vectors))[torch.argsort(rows_R)].chunk(num_columns)
