"""Placing the rows of a source on shards by cluster, by Ray tasks, before the shards are built."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import ray

from raytower.encoding.manifest import EmbeddingsFile, EmbeddingsManifest
from raytower.encoding.parts import write_part
from raytower.index.config import IndexWorkersConfig
from raytower.index.manifest import PLACEMENT_NAME, FileEntry
from raytower.index.partition import PlaceTask, place_files, placed_copy
from raytower.index.placement import Placement, sample_rows_for, train_placement
from raytower.index.plan import split_rows
from raytower.index.source import EmbeddingsSource, VectorSource
from raytower.index.tasks import run_tasks
from raytower.storage import Location

_PLACED_NAME = "placed"
_UNPLACED_NAME = "unplaced"
# So many tasks a worker, for workers to finish together.
_TASKS_PER_WORKER = 4
_ROWS_PER_FILE = 65_536


def place_source(
    source: VectorSource,
    schema: pa.Schema,
    num_shards: int,
    folder: Location,
    workers: IndexWorkersConfig,
    seed: int,
) -> tuple[EmbeddingsSource, tuple[tuple[int, int], ...], FileEntry]:
    """Write a copy of the rows in which each shard's lie together, and the placement file, into a version's folder.

    The copy is only for building: `remove_placed` takes it away. Interrupted work is taken up again.

    Returns:
        the copy; the half-open row range of each shard, none empty, so perhaps fewer than asked; the placement file.
    """
    placement = run_tasks(_train, [(source, num_shards, seed, workers.num_threads)], workers)[0]
    embeddings = source if isinstance(source, EmbeddingsSource) else _spill(source, folder, workers)
    target = folder / _PLACED_NAME
    files = len(embeddings.manifest.files)
    runs = split_rows(files, min(files, workers.max * _TASKS_PER_WORKER))
    reference = ray.put(placement)
    calls = [
        (
            PlaceTask(embeddings=embeddings.folder, target=target, files=run, documents_schema=schema),
            reference,
        )
        for run in runs
    ]
    parts = run_tasks(place_files, calls, workers, progress="placed {} of {} runs of files")
    copy = placed_copy(embeddings.manifest, [part for of_run in parts for part in of_run], placement)
    copy.manifest.write(target)
    copy.placement.save(folder / PLACEMENT_NAME)
    return EmbeddingsSource(target), copy.ranges, FileEntry.of(folder / PLACEMENT_NAME)


def remove_placed(folder: Location) -> None:
    """Take the copies away that `place_source` made in a version's folder; nothing happens where there are none."""
    for name in (_PLACED_NAME, _UNPLACED_NAME):
        (folder / name).delete()


def _train(source: VectorSource, num_shards: int, seed: int, num_threads: int) -> Placement:
    _, sample = source.sample(sample_rows_for(num_shards), seed)
    return train_placement(sample, num_shards, seed, metric=source.origin.metric, num_threads=num_threads)


def _spill(source: VectorSource, folder: Location, workers: IndexWorkersConfig) -> EmbeddingsSource:
    """The rows of any source as an embeddings folder."""
    target = folder / _UNPLACED_NAME
    ranges = split_rows(source.rows, -(-source.rows // _ROWS_PER_FILE))
    calls = [(source, target, number, *bounds) for number, bounds in enumerate(ranges)]
    files = run_tasks(_spill_range, calls, workers)
    origin = source.origin
    EmbeddingsManifest(
        fingerprint=origin.fingerprint,
        encoder=origin.encoder,
        dim=origin.dim,
        dtype=source.dtype,
        normalised=origin.metric == "cosine",
        similarity="cosine" if origin.metric == "cosine" else "dot",
        prefix=origin.prefix,
        query_prefix=origin.query_prefix,
        max_length=origin.max_length,
        rows=source.rows,
        files=tuple(files),
    ).write(target)
    return EmbeddingsSource(target)


def _spill_range(source: VectorSource, target: Location, number: int, start: int, end: int) -> EmbeddingsFile:
    place = target / f"part-{number:08d}.parquet"
    batches = list(source.stream(start, end))
    documents = pa.concat_tables([batch.documents for batch in batches], promote_options="permissive")
    vectors: Any = np.concatenate([batch.vectors for batch in batches]).astype(source.dtype, copy=False)
    write_part(place, documents, vectors, {})
    return EmbeddingsFile(name=place.name, rows=end - start, bytes=place.size_bytes(), sha256=place.sha256())
