"""Random negative: a margin between the positive and one document of the batch that is not relevant.

For query i with positive p(i), one negative n(i) and cosine similarities s:

    loss_i = max( 0, m - s[i, p(i)] + s[i, n(i)] )

with margin m. Rows come shuffled, so n(i) is the positive of the next row after i, counted cyclically over the rows of
all workers, that is not known to be relevant to query i (objectives/keys.py). Nothing is drawn here: any number of
workers sees the same negatives. A query for which no row is left adds 0.

    columns      queries (B, D), positives (B, D), of unit length
    targets      keys of the texts

Use it to start from a model that knows nothing of the domain, or where most texts of a batch may be relevant to each
other. Siblings: hardest_negative takes the most similar document, in_batch_negatives all of them.
Source: Schroff et al. 2015 (FaceNet, triplet loss); Huang et al. 2020 (random negatives in embedding-based retrieval).

Shape legend: B queries of this worker, N rows of all workers, D embedding dimension.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from raytower.collectives import gather_rows
from raytower.objectives.config import RandomNegative
from raytower.objectives.keys import known_relevant, own_places
from raytower.objectives.targets import Targets, needed


def random_negative(settings: RandomNegative, columns: Sequence[Tensor], targets: Targets) -> Tensor:
    """Mean loss, a scalar, over this worker's queries; columns (B, D). Raises InputError without keys."""
    query_BD, document_BD = columns
    keys = needed(targets.keys, "the keys of its texts", settings.name).to(query_BD.device)
    document_ND = gather_rows(document_BD)
    num_rows = len(document_ND)
    rows_N = torch.arange(num_rows, device=query_BD.device)
    # Rows from the query's own to each document, cyclically: own row 2 of 4 gives 2 3 0 1. Forbidden ones come last.
    steps_BN = (rows_N[None] - own_places(query_BD)[:, None]) % num_rows
    nearest_B, negative_B = steps_BN.masked_fill(known_relevant(keys), num_rows).min(-1)
    positive_B = (query_BD * document_BD).sum(-1)
    hinge_B = torch.relu(settings.margin - positive_B + (query_BD * document_ND[negative_B]).sum(-1))
    return torch.where(nearest_B < num_rows, hinge_B, 0.0).mean()
