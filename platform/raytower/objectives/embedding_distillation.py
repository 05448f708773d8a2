"""Embedding distillation: a text has the vector that a larger encoder gives it.

For a row with the texts x_1 … x_C (its query and its documents), the student's vectors u and the teacher's v, each
compared with the teacher's of the same text:

    cosine:  distance = 1 - cos(u, v)
    mse:     distance = mean over dimensions of (u - v)²
    loss = mean over the row's texts of distance,    mean over rows

The teacher's vectors have unit length. Where the student's have another dimension, a linear layer brings them to the
teacher's; it is trained with the encoder and not published, since the student's own vectors are what is searched.

    columns      queries and documents (B, T): the student's vectors, brought to the teacher's dimension
    targets      teacher_columns (B, T), in the order of the columns

Use it to bring a small encoder near to a large one with texts alone: no labels, no negatives, any batch size. It
copies the teacher's space and not its order of hard cases: go on with in_batch_negatives or margin_mse. Siblings:
margin_mse and kl_divergence follow a reranker's scores.
Source: Reimers and Gurevych 2020 (multilingual distillation, mse); Kim et al. 2023 (EmbedDistill, projection).

Shape legend: B rows of this worker, C columns, T the teacher's dimension.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from raytower.errors import InputError
from raytower.objectives.config import EmbeddingDistillation
from raytower.objectives.targets import Targets, needed


def embedding_distillation(
    settings: EmbeddingDistillation, columns: Sequence[Tensor], targets: Targets
) -> Tensor:
    """Mean loss, a scalar, over this worker's rows; columns (B, T).

    Raises:
        InputError: no teacher's vectors, or of another dimension than the student's.
    """
    taught = needed(targets.teacher_columns, "a teacher's vectors", settings.name)
    if columns[0].shape != taught[0].shape:
        raise InputError(
            f"the teacher's vectors have shape {tuple(taught[0].shape)}, and the encoder's "
            f"{tuple(columns[0].shape)}; objective {settings.name} compares vectors of one dimension"
        )
    distance_BC = torch.stack(
        [_distance(settings, own, theirs.to(own)) for own, theirs in zip(columns, taught, strict=True)], dim=1
    )
    present_BC = torch.ones_like(distance_BC, dtype=torch.bool)
    if targets.present_BK is not None:
        present_BC[:, 1:] = targets.present_BK.to(distance_BC.device)  # a query is always there
    # Each row's mean first: a mean over all texts would depend on how the rows lie on the workers.
    return ((distance_BC * present_BC).sum(-1) / present_BC.sum(-1)).mean()


def _distance(settings: EmbeddingDistillation, own_BT: Tensor, theirs_BT: Tensor) -> Tensor:
    if settings.loss == "cosine":
        return 1 - nn.functional.cosine_similarity(own_BT, theirs_BT, dim=-1)
    return (own_BT - theirs_BT).square().mean(-1)
