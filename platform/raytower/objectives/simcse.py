"""SimCSE: a text matches itself under another dropout mask; the other texts of the batch are negatives.

For text i with its two embeddings h_i and h'_i, and cosine similarities s:

    loss_i = -log( exp(a·s[h_i, h'_i]) / ( sum over j of exp(a·s[h_i, h'_j]) ) )

with scale a; equal texts i and j are no negatives of each other. This is in_batch_negatives over two passes.

    columns      first pass (B, D), second pass (B, D) of the same texts, of unit length
    targets      keys of the texts, the same for both columns

Use it to adapt an encoder to a domain of which there is only text: no pairs and no labels. The model must train with
dropout, or both passes are equal and only the negatives push. Sibling: in_batch_negatives, as soon as there are pairs.
Source: Gao et al. 2021 (SimCSE, unsupervised; temperature 0.05 is scale 20).

Shape legend: B texts of this worker, D embedding dimension.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from raytower.objectives.config import InBatchNegatives, SimCSE
from raytower.objectives.in_batch_negatives import in_batch_negatives
from raytower.objectives.targets import Targets, needed


def simcse(settings: SimCSE, columns: Sequence[Tensor], targets: Targets) -> Tensor:
    """Mean loss, a scalar, over this worker's texts; columns (B, D). Raises InputError without keys."""
    needed(targets.keys, "the keys of its texts", settings.name)
    first_BD, second_BD = columns
    return in_batch_negatives(InBatchNegatives(scale=settings.scale), [first_BD, second_BD], targets)
