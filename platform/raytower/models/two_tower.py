"""The encoder as it is trained: any number of text columns through shared weights, in batches of similar length.

Shape legend: B rows of this worker, r texts of one chunk, D embedding dimension, T a teacher's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from raytower.models.chunks import Chunk, Shares, cut_chunks, in_row_order
from raytower.models.encoder import Encoder
from raytower.models.known_padding import padding_is_known
from raytower.models.token_block import TokenBlock
from raytower.models.unpadded import PaddedOnlyError, lay_out


class TwoTower(nn.Module):
    """Wraps an encoder so that data parallelism sees one forward call for queries and documents alike."""

    def __init__(
        self,
        encoder: Encoder,
        max_length: int,
        tokens_per_batch: int,
        rows_per_batch: int | None = None,
        teacher_dim: int | None = None,
    ) -> None:
        """`tokens_per_batch` bounds the padded tokens of a chunk, `rows_per_batch` its texts.

        `teacher_dim` is the dimension of vectors that the embeddings are to follow: where it is another one, a linear
        layer brings them there. It trains with the encoder, inside the one forward call, and is no part of it.

        Without gradient caching chunks save padding, not memory; with it, a chunk is what the peak memory holds.
        """
        super().__init__()
        self.encoder = encoder
        self.max_length = max_length
        self.tokens_per_batch = tokens_per_batch
        self.rows_per_batch = rows_per_batch
        self.unpadded = False
        self.into_teacher: nn.Linear | None = None
        if teacher_dim is not None and teacher_dim != encoder.dim:
            self.into_teacher = nn.Linear(encoder.dim, teacher_dim)

    def tokenise(self, texts: Sequence[str], prefix: str | Sequence[str]) -> TokenBlock:
        """Ids of each text behind the prefix, or its own, cut to `max_length`."""
        return self.encoder.tokenise(texts, self.max_length, prefix)

    def plan_chunks(self, columns: Sequence[TokenBlock], shares: Shares | None = None) -> list[Chunk]:
        """Cut the texts of all columns, which count column after column, into chunks on the encoder's device."""
        return cut_chunks(
            TokenBlock.join(columns),
            self.encoder.padding,
            next(self.encoder.parameters()).device,
            tokens_per_batch=self.tokens_per_batch,
            rows_per_batch=self.rows_per_batch,
            shares=shares,
            unpadded=self.unpadded,
        )

    @torch.no_grad()
    def leave_out_padding(self, texts: Sequence[str]) -> None:
        """Lay the texts of chunks end to end from now on, if that changes no vector of `texts`, of several lengths.

        Raises:
            PaddedOnlyError: as `lay_out`.
        """
        encoder = self.encoder
        if encoder.output_name != "last_hidden_state":
            raise PaddedOnlyError("its vectors come from its pooler")
        column = self.tokenise(texts, "")
        device = next(encoder.parameters()).device

        def vectors_of(first_position: int | None) -> Tensor:
            encoder.first_position = first_position or 0
            chunks = cut_chunks(
                column,
                encoder.padding,
                device,
                tokens_per_batch=len(texts) * self.max_length,
                unpadded=first_position is not None,
            )
            return in_row_order([encoder(**chunk.inputs) for chunk in chunks], chunks)

        positions = (0, encoder.padding.token + 1)  # RoBERTa counts from behind its padding's id
        encoder.first_position = lay_out(encoder.backbone, positions, vectors_of)
        self.unpadded = True

    def forward(self, chunks: Sequence[Chunk]) -> list[Tensor]:
        """Embeddings (r, D), unit length, of each chunk's texts, with gradients; (r, T) where a layer brings them to a
        teacher's dimension.
        """
        vectors = []
        with padding_is_known():
            for chunk in chunks:
                chunk.begin()
                # A chunk may hold a row more than it stands for: see `Sharding.even_out`.
                vectors.append(self.encoder(**chunk.inputs)[: len(chunk.rows)])
        embeddings = [nn.functional.normalize(vectors_rD, dim=-1) for vectors_rD in vectors]
        if self.into_teacher is None:
            return embeddings
        # In fp32, as the encoder's own projections.
        with torch.autocast(embeddings[0].device.type, enabled=False):
            return [self.into_teacher(vectors_rD) for vectors_rD in embeddings]


def split_columns(vectors: Sequence[Tensor], chunks: Sequence[Chunk], num_columns: int) -> tuple[Tensor, ...]:
    """The embeddings (B, D) of each column, in row order, from those of the chunks."""
    return in_row_order(vectors, chunks).chunk(num_columns)
