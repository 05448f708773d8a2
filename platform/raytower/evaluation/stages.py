"""Where a loss comes from: the stages of a retrieval on the same queries, each against the one before.

- encoder: exact search over the stored vectors, the best that these vectors can give;
- index: approximate search, which loses what it does not visit;
- lexical: search by words alone;
- fusion: both lists as one, against that of the index, so that it says what words add;
- reranker: the order of what was recalled, anew.

Differences are of the same queries, so their intervals are narrower than those of the figures.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from raytower.evaluation.figures import STAGES, mean_of
from raytower.index.exact import search_exact
from raytower.index.hits import Hits
from raytower.index.kinds import SEARCH_PARAMETER
from raytower.index.reader import Index, resolve_parameters
from raytower.index.table import ID
from raytower.metrics import NDCG_DEPTH, Floats, bootstrap_interval
from raytower.models.search_mode import SearchMode
from raytower.retrieval.retriever import EncodedQueries, Vectors

if TYPE_CHECKING:
    from raytower.evaluation.measured import Measured

# Query vectors that one pass over the table is made for.
_BLOCK_BYTES = 64 * 2**20
# Queries and settings that time is measured by.
_TIMED_QUERIES = 256
_FACTORS = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0)


def loss_by_stage(
    stages: Mapping[str, Mapping[str, Floats]], ks: Sequence[int], seed: int
) -> list[dict[str, Any]]:
    """A record a stage: `stage`, `against` (the one before, or null), `metrics` and `differences`, by metric.

    Args:
        stages: by stage and metric one value per query, [Q].
        ks: cut-offs of recall that are told, beside nDCG.
    """
    names = [*(f"recall@{k}" for k in sorted(ks)), f"ndcg@{NDCG_DEPTH}"]
    rows: list[dict[str, Any]] = []
    for stage in (name for name in STAGES if name in stages):
        before = _before(stage, [row["stage"] for row in rows])
        rows.append(
            {
                "stage": stage,
                "against": before,
                "metrics": {name: mean_of(stages[stage][name], seed) for name in names},
                "differences": {}
                if before is None
                else {name: _difference(stages[stage][name] - stages[before][name], seed) for name in names},
            }
        )
    return rows


def _before(stage: str, measured: Sequence[str]) -> str | None:
    # Words are another source than vectors: fusion builds on the vectors' list, and says what words add to it.
    if stage == "fusion" and "index" in measured:
        return "index"
    return measured[-1] if measured else None


def _difference(differences: Floats, seed: int) -> dict[str, float]:
    low, high = bootstrap_interval(differences, seed=seed)
    return {"value": float(differences.mean()), "low": low, "high": high}


class OtherStages:
    """The stages that an evaluation does not pass by itself: exact search and, where both are fused, each list alone.

    Query vectors wait until they are 64 MiB; then one pass over the table serves all of them.
    """

    def __init__(self, index: Index, mode: SearchMode, depth: int, measured: Measured) -> None:
        self._index = index
        self._mode = mode
        self._depth = depth
        self._measured = measured
        self._waiting: list[Vectors] = []
        self._first = 0
        self.seconds = 0.0
        self.sample: Vectors = np.empty((0, index.dim), np.float32)
        """The vectors of the first queries."""

    def add(self, part: slice, queries: EncodedQueries) -> None:
        """The next queries."""
        if queries.vectors is None:
            return
        start = time.perf_counter()
        if self._mode == "hybrid":
            by_vector = self._index.search(queries.vectors, self._depth)
            self._measured.add_stage("index", part, ids_of(self._index, by_vector))
            by_words = self._index.search_lexical(queries.texts, self._depth)
            self._measured.add_stage("lexical", part, ids_of(self._index, by_words))
        self.seconds += time.perf_counter() - start
        missing = _TIMED_QUERIES - len(self.sample)
        if missing > 0:
            self.sample = np.concatenate([self.sample, queries.vectors[:missing]])
        self._waiting.append(queries.vectors)
        if sum(each.nbytes for each in self._waiting) >= _BLOCK_BYTES:
            self.finish()

    def finish(self) -> None:
        """Search what waits."""
        if not self._waiting:
            return
        start = time.perf_counter()
        vectors = np.concatenate(self._waiting)
        self._waiting = []
        part = slice(self._first, self._first + len(vectors))
        found = search_exact(self._index, vectors, self._depth)
        self._measured.add_stage("encoder", part, ids_of(self._index, found))
        self._first = part.stop
        self.seconds += time.perf_counter() - start


def ids_of(index: Index, found: Hits) -> list[list[str]]:
    """The ids of the documents of each query's hits (Q, K), best first; padding is left out."""
    rows = np.unique(found.rows[found.rows >= 0])
    ids = dict(zip(rows.tolist(), index.table.take(rows, [ID])[ID].to_pylist(), strict=True))
    return [[ids[row] for row in line if row >= 0] for line in found.rows.tolist()]


def recall_against_time(
    index: Index, vectors: Vectors, measured: Measured, depth: int
) -> list[dict[str, Any]]:
    """Recall and milliseconds a query of searches of the first queries, at rising values of the search parameter.

    The values lie around the one that the index takes by itself, which has `used` true; a kind without a parameter has
    no points. Recall is that at 10, or at the nearest k that is measured.
    """
    kind = index.manifest.kind
    name = SEARCH_PARAMETER.get(kind)
    used = resolve_parameters(index.manifest, depth)
    if name is None or name not in used or not len(vectors):
        return []
    points = []
    part = slice(0, len(vectors))
    k = min(measured.curve_ks, key=lambda each: abs(each - NDCG_DEPTH))
    for value in sorted({max(1, round(used[name] * factor)) for factor in _FACTORS}):
        start = time.perf_counter()
        found = index.search(vectors, depth, search_parameters={**used, name: value})
        milliseconds = (time.perf_counter() - start) * 1000 / len(vectors)
        values = measured.stage_values(part, ids_of(index, found))[f"recall@{k}"]
        points.append(
            {
                "parameter": name,
                "setting": value,
                "used": value == used[name],
                "k": k,
                "milliseconds": milliseconds,
                **mean_of(values, measured.seed),
            }
        )
    return points
