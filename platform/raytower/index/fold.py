"""Folding: rows that no shard holds, small shards and shards with many dead rows become fewer, larger shards.

Shards are derived from the table, so folding changes no answer: it can be done at any time, over what is
published then, and whatever is published meanwhile stays.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from raytower.index.build import run_shard_tasks, settings_of
from raytower.index.config import BuiltKind
from raytower.index.manifest import FORMAT_VERSION, IndexManifest, ShardEntry
from raytower.index.plan import IndexRequest
from raytower.index.rowmap import Rows
from raytower.index.shard import shard_rows
from raytower.index.shard_build import ShardTask, TableRows, train_template
from raytower.index.table import DocumentTable
from raytower.index.tasks import Run
from raytower.storage import Location

# Rows outside shards are scored exactly at every search, in 28 ns a row of 384 dimensions. A graph of any small size
# costs 45 us, so twice as many rows would cost more than half of what the graph that took them up costs.
TAIL_ROWS = 512
# Up to so many rows are scored exactly in less time than the lists of an index take; a graph is faster from the tail
# on (384 dimensions, one query: 10,000 rows in 540 us, their graph in 41).
FLAT_ROWS = 20_000
# A change folds no more rows than that; `index compact` folds all.
MAX_FOLDED_ROWS = 200_000
_ROWS_PER_SHARD = 5_000_000
# What a few rows take is not what an index is planned for.
_MEMORY_BYTES = 2**50
# A shard is taken up into what is folded where it is not much larger: so each row is folded a few times in all, and
# few small shards stand beside the large ones, each of which costs half of a large one. At four there are more of them,
# for two thirds of the writing.
_TIER = 8
# A shard with more than this share of dead rows is folded by itself.
_DEAD_SHARE = 0.3


@dataclass(frozen=True)
class Held:
    """What a shard holds: its live rows, and all of them."""

    live: int
    rows: int


def plan_fold(shards: Sequence[Held], tail: int) -> list[int]:
    """Which shards are to be folded together with the rows outside shards; empty where nothing is to be done.

    As in a log-structured merge: what is new takes up the shards that are not much larger than itself, smallest first,
    so there are never more than some log(rows / TAIL_ROWS) / log(_TIER) small ones. Shards beyond MAX_FOLDED_ROWS are
    left to compaction.
    """
    wasted = [
        number
        for number, shard in enumerate(shards)
        if shard.live < (1 - _DEAD_SHARE) * shard.rows and shard.live <= MAX_FOLDED_ROWS
    ]
    if tail <= TAIL_ROWS and not wasted:
        return []
    folded, total = list(wasted), tail + sum(shards[number].live for number in wasted)
    for number in sorted(range(len(shards)), key=lambda number: shards[number].live):
        small = shards[number].live <= _TIER * total and total + shards[number].live <= MAX_FOLDED_ROWS
        if number not in wasted and small:
            folded.append(number)
            total += shards[number].live
    return sorted(folded)


def folded(
    index: Location, manifest: IndexManifest, table: DocumentTable, run: Run
) -> tuple[ShardEntry, ...]:
    """The shards of a version with what is to be folded folded; placed shards stay as they are."""
    held = [shard_rows(index, entry) for entry in manifest.shards]
    live = [_live(table, rows) for rows in held]
    tail = table.row_map.outside(held)
    candidates = [number for number, entry in enumerate(manifest.shards) if not entry.placed]
    chosen = [
        candidates[place]
        for place in plan_fold(
            [Held(len(live[number]), len(held[number])) for number in candidates], len(tail)
        )
    ]
    if len(tail) <= TAIL_ROWS and not chosen:
        return manifest.shards
    kept = [entry for number, entry in enumerate(manifest.shards) if number not in chosen]
    rows = np.sort(np.concatenate([tail, *(live[number] for number in chosen)]))
    if not len(rows):
        return tuple(kept)
    return (*kept, *_build(index, manifest, table, rows, run))


def _live(table: DocumentTable, rows: Rows) -> Rows:
    mask = table.row_map.live_mask(rows)
    return np.asarray(rows) if mask is None else np.asarray(rows)[mask]


def _build(
    index: Location, manifest: IndexManifest, table: DocumentTable, rows: Rows, run: Run
) -> tuple[ShardEntry, ...]:
    """Shards over some rows. Each set is trained on its own rows: those of the index may have been few, or others."""
    exactly = TAIL_ROWS if manifest.kind == "hnsw" else FLAT_ROWS
    kind: BuiltKind = "flat" if len(rows) <= exactly else manifest.kind
    # Lists are planned even where the build's were set: few rows in as many lists need a larger nprobe.
    hnsw, ivf = settings_of(manifest, kind, len(rows))
    plan = IndexRequest(
        rows=len(rows),
        dim=manifest.dim,
        kind=kind,
        shards=-(-len(rows) // _ROWS_PER_SHARD),
        memory_bytes=_MEMORY_BYTES,
        rescore="auto" if manifest.exact_dtype else False,
        vector_dtype=manifest.vector_dtype,
        hnsw=hnsw,
        ivf=ivf.model_copy(update={"nlist": None}),
    ).plan()

    def source(first: int, last: int) -> TableRows:
        unit = manifest.metric == "cosine"
        return TableRows(index=index, table_version=table.version, unit=unit, listed=rows[first:last])

    tasks = [
        ShardTask(
            source=source(first, last),
            num_rows=last - first,
            kind=kind,
            exact_dtype=plan.exact_dtype,
            made_of={
                "format": FORMAT_VERSION,
                # A number of the table's versions is given once, so it names what the rows hold.
                "table_version": table.version,
                "rows": hashlib.sha256(rows[first:last].tobytes()).hexdigest(),
                "parameters": plan.parameters,
                "train_rows": plan.train_rows,
            },
            placed=False,
            num_threads=run.threads,
        )
        for first, last in plan.ranges
    ]

    def template() -> Any:
        call = (
            source(0, len(rows)),
            kind,
            manifest.dim,
            plan.parameters,
            plan.train_rows,
            0,
            run.threads_alone,
        )
        return run(train_template, [call])[0]

    return tuple(shard.entry for shard in run_shard_tasks(tasks, template, run, run.at_once))
