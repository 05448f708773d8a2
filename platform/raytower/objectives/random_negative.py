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

Shape legend: B queries of this worker, N rows of all workers, R queries of a block, D embedding dimension.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from raytower.collectives import gather_rows
from raytower.objectives.config import RandomNegative
from raytower.objectives.keys import KnownRelevant
from raytower.objectives.targets import Targets, needed


def random_negative(settings: RandomNegative, columns: Sequence[Tensor], targets: Targets) -> Tensor:
    """Mean loss, a scalar, over this worker's queries; columns (B, D). Raises InputError without keys."""
    query_BD, document_BD = columns
    keys = needed(targets.keys, "the keys of its texts", settings.name).to(query_BD.device)
    document_ND = gather_rows(document_BD)
    negative_B, has_any_B = _next_rows(keys.known)
    positive_B = (query_BD * document_BD).sum(-1)
    hinge_B = torch.relu(settings.margin - positive_B + (query_BD * document_ND[negative_B]).sum(-1))
    return torch.where(has_any_B, hinge_B, 0.0).mean()


def _next_rows(known: KnownRelevant) -> tuple[Tensor, Tensor]:
    """(B,) the next document after each query's own that is not relevant to it, cyclically; (B,) if there is any."""
    num_rows = known.num_documents
    row_N = torch.arange(num_rows, device=known.own_B.device)
    found = []
    for rows in known.blocks():
        # Rows from the query's own to each document: own row 2 of 4 gives 2 3 0 1. Forbidden ones come last.
        steps_RN = (row_N[None] - known.own_B[rows, None]) % num_rows
        found.append(steps_RN.masked_fill_(known.mask(rows), num_rows).min(-1))
    nearest_B = torch.cat([best.values for best in found])
    return torch.cat([best.indices for best in found]), nearest_B < num_rows
