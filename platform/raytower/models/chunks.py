"""A batch as it is trained on: cut into chunks of similar length, padded, on the device.

Shape legend: R rows of a batch, r rows of one chunk, L tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from raytower.models.batch_planner import plan_chunks
from raytower.models.device import load_tensor, tokens_per_launch
from raytower.models.token_block import Ids, Padding, TokenBlock


@dataclass(frozen=True)
class Chunk:
    """Rows that go through the model together.

    inputs: what the model takes of them, each (r, L); see `TokenBlock.pad`. rows: (r,) their positions in the batch.
    share: of the batch's `Shares` the one that begins with this chunk; None for none.
    seed: what dropout begins with at this chunk; None goes on where the one before ends.
    """

    inputs: dict[str, Tensor]
    rows: Tensor
    share: int | None = None
    seed: int | None = None

    def begin(self) -> None:
        """Have dropout draw for this chunk; called before each forward pass of it in training."""
        if self.seed is not None:
            torch.manual_seed(self.seed)


@dataclass(frozen=True)
class Shares:
    """A batch whose rows lie in several shares, with a dropout of its own for each.

    share_R: (R,) the share of each row, from 0. number: how many there are.
    """

    share_R: Ids  # noqa: N815 - carries its shape
    number: int


def cut_chunks(
    block: TokenBlock,
    padding: Padding,
    device: torch.device,
    *,
    tokens_per_batch: int,
    rows_per_batch: int | None = None,
    shares: Shares | None = None,
    unpadded: bool = False,
) -> list[Chunk]:
    """Cut a batch into the chunks that cost least, with at most `tokens_per_batch` padded tokens and `rows_per_batch`
    rows each.

    No chunk holds rows of two shares, so that they are the chunks of workers with a share each. With `unpadded` inputs
    say where in them texts lie; see `run_laid_out`.
    """
    chunks = []
    for share in range(1 if shares is None else shares.number):
        own = np.arange(len(block)) if shares is None else np.flatnonzero(shares.share_R == share)
        plan = plan_chunks(block.lengths[own], tokens_per_batch, tokens_per_launch(device), rows_per_batch)
        for place, rows_r in enumerate(own[rows] for rows in plan.batches):
            inputs = load_rows(block, rows_r, padding, device)
            if unpadded:
                inputs |= _places(block.lengths[rows_r], device)
            begins = None if shares is None or place else share
            chunks.append(Chunk(inputs, load_tensor(rows_r, device), begins))
    return chunks


def _places(lengths_r: Ids, device: torch.device) -> dict[str, Tensor]:
    """Of texts of 2 and 1 tokens, filled up to 2: places [0, 1, 2] of 4, starts [0, 2, 3]."""
    places_T = np.flatnonzero(np.arange(lengths_r.max()) < lengths_r[:, None])
    starts = load_tensor(np.concatenate([[0], np.cumsum(lengths_r)]), device)
    return {"places": load_tensor(places_T, device), "starts": starts.to(torch.int32)}


def load_rows(block: TokenBlock, rows_r: Ids, padding: Padding, device: torch.device) -> dict[str, Tensor]:
    """What a model takes of `rows_r` of a block, padded and on the device; see `TokenBlock.pad`."""
    return {name: load_tensor(values, device) for name, values in block.pad(rows_r, padding).items()}


def in_row_order(parts: Sequence[Tensor], chunks: Sequence[Chunk]) -> Tensor:
    """What a model made of each chunk (r, …) as one tensor (R, …), in the order of the batch's rows."""
    rows_R = torch.cat([chunk.rows for chunk in chunks])
    return torch.cat(list(parts))[torch.argsort(rows_R)]
