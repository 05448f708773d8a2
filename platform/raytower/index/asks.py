"""Which shards a search asks, for how many hits, whether they lie in this process or in others.

Shape legend: Q queries, D dimension, K hits a query, S shards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raytower.index.hits import Hits
from raytower.index.kinds import SHARDS_PROBE, Vectors
from raytower.index.manifest import IndexManifest
from raytower.index.placement import Placement


@dataclass(frozen=True)
class Ask:
    """What is asked of one shard: `depth` hits of each query, or only of those with the numbers in `queries`."""

    shard: int
    depth: int
    queries: NDArray[np.int64] | None = None


class SearchPlanner:
    """Decides what each shard of a version is asked.

    Args:
        manifest: the version.
        digests: of all shards that are searched, in order; "" for rows that no shard holds.
        counts: live rows of each of them.
        placement: which shard holds which part of space, where the index is placed by cluster.
    """

    def __init__(
        self,
        manifest: IndexManifest,
        digests: Sequence[str],
        counts: Sequence[int],
        placement: Placement | None = None,
    ) -> None:
        self._manifest = manifest
        self._counts = list(counts)
        self._placement = placement
        # A version that is being measured is searched as it will be searched once it is published.
        measured = set(
            manifest.measured.shards if manifest.measured else (entry.digest for entry in manifest.shards)
        )
        self._num_measured = len(measured)
        self._is_measured = [digest in measured for digest in digests]

    @property
    def num_rows(self) -> int:
        """Live rows of all shards."""
        return sum(self._counts)

    def first(
        self, prepared: Vectors, k: int, parameters: Mapping[str, int], *, is_filtered: bool
    ) -> tuple[list[Ask], bool]:
        """What is asked for prepared queries (Q, D), and whether `rest` has to be asked for those with too few hits."""
        probe = parameters.get(SHARDS_PROBE)
        if is_filtered:
            return [Ask(number, k) for number in range(len(self._counts))], False
        if self._placement is None or probe is None or probe >= self._num_placed:
            return self.everywhere(k, parameters), False
        visits = self._placement.visit(prepared, probe)  # [Q, S], of the placed shards alone
        asks = []
        for number in range(len(self._counts)):
            if number >= visits.shape[1]:
                asks.append(Ask(number, k))
            elif len(queries := np.flatnonzero(visits[:, number])):
                asks.append(Ask(number, k, queries))
        return asks, True

    def rest(self, best: Hits) -> NDArray[np.int64]:
        """Numbers of the queries whose visited shards hold too few rows; all shards are to be asked for them."""
        return np.flatnonzero((best.rows < 0).any(axis=1))

    def everywhere(self, k: int, parameters: Mapping[str, int]) -> list[Ask]:
        """All queries, of every shard."""
        return [Ask(number, depth) for number, depth in enumerate(self._depths(k, parameters))]

    def _depths(self, k: int, parameters: Mapping[str, int]) -> list[int]:
        """How many hits each shard is asked for; together they hold k wherever the index does.

        Each shard is asked for k hits, except graphs whose efSearch is below k. FAISS explores at least as many
        candidates as hits are asked for: k hits of each of S shards would cost S times the work, and the merge drops
        most of them. Such a shard is asked for max(efSearch, ceil(k / S)) hits. If hits lie on shards by chance, few
        shards hold many more than their share (Vespa bounds its searches of several nodes so, by top-k-probability).
        Recall is measured with this rule; shards that were added after the measurement are asked for k.
        """
        whole = [k] * len(self._counts)
        if self._manifest.kind != "hnsw" or self._placement is not None:
            return whole
        depth = min(k, max(parameters["efSearch"], -(-k // max(self._num_measured, 1))))
        if depth == k:
            return whole
        depths = [depth if measured else k for measured in self._is_measured]
        enough = sum(map(min, depths, self._counts)) >= min(k, sum(self._counts))
        return depths if enough else whole

    @property
    def _num_placed(self) -> int:
        return self._manifest.placement.shards if self._manifest.placement else 0
