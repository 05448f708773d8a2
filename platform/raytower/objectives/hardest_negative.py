"""Hardest negative: a margin between the positive and the most similar document of the batch that is not relevant.

For query i with positive p(i) and cosine similarities s:

    loss_i = max( 0, m - s[i, p(i)] + max over j in negatives(i) of s[i, j] )

with margin m. Documents known to be relevant to query i (objectives/keys.py) are no negatives; a query without any
negative adds 0.

    columns      queries (B, D), positives (B, D), then any number of hard-negative columns (B, D), all of unit length
    targets      keys of the texts

Use it where the last few confusions matter and the data is clean: one wrong negative takes the whole gradient of its
query. From an untrained model it can collapse all texts to one point; start from a trained one, or from its sibling
random_negative. in_batch_negatives weighs all negatives softly instead.
Source: Hermans et al. 2017 (batch-hard triplet loss); Faghri et al. 2018 (VSE++, maximum of hinges).

Shape legend: B queries of this worker, C documents of all workers, D embedding dimension.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from raytower.collectives import gather_rows
from raytower.objectives.config import HardestNegative
from raytower.objectives.keys import known_relevant
from raytower.objectives.targets import Targets, needed


def hardest_negative(settings: HardestNegative, columns: Sequence[Tensor], targets: Targets) -> Tensor:
    """Mean loss, a scalar, over this worker's queries; columns (B, D). Raises InputError without keys."""
    query_BD, *documents = columns
    keys = needed(targets.keys, "the keys of its texts", settings.name).to(query_BD.device)
    document_CD = torch.cat([gather_rows(column_BD) for column_BD in documents])
    cosine_BC = query_BD @ document_CD.T
    positive_B = (query_BD * documents[0]).sum(-1)
    # Without any negative the maximum is -inf and the hinge 0, with gradient 0.
    hardest_B = cosine_BC.masked_fill(known_relevant(keys), -torch.inf).amax(-1)
    return torch.relu(settings.margin - positive_B + hardest_B).mean()
