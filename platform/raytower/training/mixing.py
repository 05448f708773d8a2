"""Several sets of rows in one run: how many batches each has, and which of them a batch is of. Pure; no Ray.

The share of a set grows with its weight and its rows:

    share ∝ weight · rows ^ (1 / T)

T is 1 for proportional mixing, without bound for even, and what is given between (the temperature of Raffel et al.,
"Exploring the Limits of Transfer Learning", 2020, 3.5.2, and the smoothing of multilingual BERT and XLM before it).

A batch is of one set, so that its negatives are of one kind, and all workers take it together. Each set goes through
its own rows in its own epochs. The sets lie evenly over the run:

    batches of ask, sts    3, 1
    places of ask          0.1  0.5  0.8        in thirds of the run, drawn by chance inside each
    places of sts          0.6                  drawn in the whole
    order                  ask ask sts ask

So at any point of a run each set has had its share of the batches, to one or two, and a run continues at any batch.

Shape legend: S sets, N batches of the run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from raytower.errors import InputError
from raytower.training.config import Mixing

SET = "set"
"""The column of a batch's rows that holds the name of their set, where there are several."""
# Apart from the numbers that seed the order of rows.
_ORDER = 0x5E7


def set_shares(rows: Mapping[str, int], weights: Mapping[str, float], mixing: Mixing) -> dict[str, float]:
    """The share of the batches that each set has; they add up to 1.

    Args:
        rows: of each set, by name; at least 1.
        weights: of each set, above 0.
        mixing: "proportional", "even", or a temperature from 1 on.
    """
    power = {"proportional": 1.0, "even": 0.0}[mixing] if isinstance(mixing, str) else 1.0 / mixing
    parts = {name: weights[name] * count**power for name, count in rows.items()}
    whole = sum(parts.values())
    return {name: part / whole for name, part in parts.items()}


def count_batches(shares: Mapping[str, float], num_batches: int) -> dict[str, int]:
    """Batches of each set, at least one, `num_batches` in all: whole ones nearest to the shares.

    Raises:
        InputError: there are more sets than batches.
    """
    if num_batches < len(shares):
        raise InputError(
            f"the run has {num_batches} batches for {len(shares)} sets of training rows; raise epochs, or lower "
            "batch_size"
        )
    wanted_S = np.array(list(shares.values())) * num_batches
    counts_S = np.maximum(np.floor(wanted_S), 1)
    while (missing := num_batches - int(counts_S.sum())) != 0:
        lack_S = wanted_S - counts_S
        if (
            missing < 0
        ):  # sets of less than one batch have one all the same, at the cost of the largest surplus
            lack_S[counts_S == 1] = np.inf
        counts_S[lack_S.argmax() if missing > 0 else lack_S.argmin()] += np.sign(missing)
    return dict(zip(shares, counts_S.astype(int).tolist(), strict=True))


def order_of_sets(counts: Sequence[int], seed: int) -> NDArray[np.int32]:
    """(N,) the number of the set that each batch is of; set s comes counts[s] times, spread evenly.

    The same for every worker, and however often a run begins again.
    """
    random = np.random.default_rng([seed, _ORDER])
    places = [(np.arange(count) + random.random(count)) / count for count in counts]
    sets_N = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    return sets_N[np.argsort(np.concatenate(places), kind="stable")]
