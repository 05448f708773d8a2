"""Placing the rows of a table on shards by cluster, by tasks, before the shards are built."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from raytower.index.config import Metric
from raytower.index.manifest import PLACEMENTS_NAME, FileEntry, PlacementEntry
from raytower.index.placement import Placement, sample_rows_for, train_placement
from raytower.index.plan import split_rows
from raytower.index.rowmap import Rows
from raytower.index.shard_build import TableRows
from raytower.index.tasks import Run

if TYPE_CHECKING:
    from raytower.index.build import ShardPlan

# So many tasks a worker, for workers to finish together.
_TASKS_PER_WORKER = 4


def place_rows(shards: ShardPlan, run: Run) -> tuple[PlacementEntry, list[Rows]]:
    """The file that says which cluster lies on which shard, and the rising rows (n,) of each shard, none empty.

    Clusters are found once: a build that was killed takes the file that it made, whatever another machine would find.
    """
    num_shards, rows = shards.plan.shards, shards.plan.rows
    call = (shards.all_rows, num_shards, shards.seed, shards.origin.metric, run.threads_alone)
    placement = run(_train, [call])[0]
    ranges = split_rows(rows, min(rows, run.at_once * _TASKS_PER_WORKER))
    parts = run(
        _assign, [(shards.rows(*bounds), placement) for bounds in ranges], progress="placed {} of {} parts"
    )
    # Fewer shards than asked where the sample has fewer distinct vectors.
    listed = [np.concatenate(parts_of) for parts_of in zip(*parts, strict=True)]
    counts = np.array([len(rows_of) for rows_of in listed], np.int64)
    placement = placement.without_empty(counts)
    listed = [rows_of for rows_of in listed if len(rows_of)]
    place = shards.index / PLACEMENTS_NAME / f"{placement.sha256}.npz"
    placement.save(place)
    return PlacementEntry(digest=placement.sha256, shards=len(listed), file=FileEntry.of(place)), listed


def _train(source: TableRows, num_shards: int, seed: int, metric: Metric, num_threads: int) -> Placement:
    _, sample = source.sample(sample_rows_for(num_shards), seed)
    return train_placement(sample, num_shards, seed, metric=metric, num_threads=num_threads)


def _assign(source: TableRows, placement: Placement) -> list[Rows]:
    """The rows of each shard, rising."""
    rows, shards = [np.empty(0, np.int64)], [np.empty(0, np.int32)]
    for batch, vectors in source.stream():
        rows.append(batch)
        shards.append(placement.assign(vectors))
    numbers, owners = np.concatenate(rows), np.concatenate(shards)
    return [numbers[owners == shard] for shard in range(placement.num_shards)]
