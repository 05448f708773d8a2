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
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from raytower.errors import InputError
from raytower.objectives.config import Matryoshka
from raytower.objectives.targets import EncoderObjective, Targets


def over_dimensions(settings: Matryoshka, objective: EncoderObjective) -> EncoderObjective:
    """`objective` over every one of the dims. Calling it raises InputError if an embedding has fewer dimensions."""
    return partial(_weighted_sum, settings, objective)


def _weighted_sum(
    settings: Matryoshka, objective: EncoderObjective, columns: Sequence[Tensor], targets: Targets
) -> Tensor:
    available = columns[0].shape[-1]
    if settings.dims[0] > available:
        raise InputError(
            f"matryoshka.dims asks for {settings.dims[0]} dimensions; the embeddings have {available}; "
            f"start at {available} or less"
        )
    weights = settings.weights or (1.0,) * len(settings.dims)
    if targets.keys is not None:  # moved here, so that all dims share what is known of them
        targets = replace(targets, keys=targets.keys.to(columns[0].device))
    losses = [
        weight * objective([_cut(column_BD, dim) for column_BD in columns], targets)
        for dim, weight in zip(settings.dims, weights, strict=True)
    ]
    return torch.stack(losses).sum()


def _cut(column_BD: Tensor, dim: int) -> Tensor:
    return nn.functional.normalize(column_BD[:, :dim], dim=-1)
