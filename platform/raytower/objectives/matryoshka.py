"""Matryoshka: the first d dimensions of an embedding are an embedding too, for several d.

    loss = sum over d of w_d · objective( columns cut to their first d dimensions and renormalised, targets )

with weights w_d, 1 each unless given. It wraps any encoder objective and takes that one's columns and targets.

Use it where an index should be able to store short vectors and keep most of the quality. The full dimension is trained
only if it stands among `dims`. Sibling: a projection learns one short embedding instead of several.
Source: Kusupati et al. 2022 (Matryoshka representation learning).

Shape legend: B rows of this worker, D embedding dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from raytower.config import Config
from raytower.errors import InputError
from raytower.objectives.targets import EncoderObjective, Targets


class Matryoshka(Config):
    """The dimensions, each smaller than the one before, and the weight of each."""

    dims: tuple[Annotated[int, Field(gt=0)], ...] = Field(min_length=1)
    weights: tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...] | None = None

    def model_post_init(self, context: Any) -> None:
        if any(later >= earlier for earlier, later in pairwise(self.dims)):
            raise ValueError(f"dims are {list(self.dims)}; write each once, from the largest to the smallest")
        if self.weights is not None and len(self.weights) != len(self.dims):
            raise ValueError(
                f"there are {len(self.weights)} weights for {len(self.dims)} dims; give one for each, or leave "
                "weights out for 1 each"
            )

    def wrap(self, objective: EncoderObjective) -> EncoderObjective:
        """`objective` over every one of the dims; raises InputError where an embedding has fewer dimensions."""
        return partial(self._weighted_sum, objective)

    def _weighted_sum(
        self, objective: EncoderObjective, columns: Sequence[Tensor], targets: Targets
    ) -> Tensor:
        available = columns[0].shape[-1]
        if self.dims[0] > available:
            raise InputError(
                f"matryoshka.dims asks for {self.dims[0]} dimensions; the embeddings have {available}; "
                f"start at {available} or less"
            )
        weights = self.weights or (1.0,) * len(self.dims)
        losses = [
            weight * objective([_cut(column_BD, dim) for column_BD in columns], targets)
            for dim, weight in zip(self.dims, weights, strict=True)
        ]
        return torch.stack(losses).sum()


def _cut(column_BD: Tensor, dim: int) -> Tensor:
    return nn.functional.normalize(column_BD[:, :dim], dim=-1)
