"""A batch as it is trained on: cut into chunks of similar length, padded, on the device.

Shape legend: R rows of a batch, r rows of one chunk, L tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raytower.models.batch_planner import plan_chunks
from raytower.models.device import load_tensor, tokens_per_launch
from raytower.models.token_block import Ids, Padding, TokenBlock


@dataclass(frozen=True)
class Chunk:
    """Rows that go through the model together.

    inputs: what the model takes of them, each (r, L); see `TokenBlock.pad`. rows: (r,) their positions in the batch.
    """

    inputs: dict[str, Tensor]
    rows: Tensor


def cut_chunks(
    block: TokenBlock,
    padding: Padding,
    device: torch.device,
    *,
    tokens_per_batch: int,
    rows_per_batch: int | None = None,
) -> list[Chunk]:
    """Cut a batch into the chunks that cost least, with at most `tokens_per_batch` padded tokens and `rows_per_batch`
    rows each.
    """
    plan = plan_chunks(block.lengths, tokens_per_batch, tokens_per_launch(device), rows_per_batch)
    return [
        Chunk(load_rows(block, rows_r, padding, device), load_tensor(rows_r, device))
        for rows_r in plan.batches
    ]


def load_rows(block: TokenBlock, rows_r: Ids, padding: Padding, device: torch.device) -> dict[str, Tensor]:
    """What a model takes of `rows_r` of a block, padded and on the device; see `TokenBlock.pad`."""
    return {name: load_tensor(values, device) for name, values in block.pad(rows_r, padding).items()}


def in_row_order(parts: Sequence[Tensor], chunks: Sequence[Chunk]) -> Tensor:
    """What a model made of each chunk (r, …) as one tensor (R, …), in the order of the batch's rows."""
    rows_R = torch.cat([chunk.rows for chunk in chunks])
    return torch.cat(list(parts))[torch.argsort(rows_R)]
