"""`raytower index add | delete`: a new version that shares the shards of the published one.

Adding builds delta shards beside them, deleting writes tombstones: sorted numbers of rows that can be no hits any more.
Documents that are added under ids that are there already replace them where `upsert` allows it. Readers of earlier
versions are not disturbed, and what someone else publishes meanwhile is never lost.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import ray
from numpy.typing import NDArray
from pydantic import Field

from raytower.config import Config
from raytower.errors import InputError
from raytower.index.build import build_shards, check_embeddings, figures
from raytower.index.config import BuiltKind, IndexWorkersConfig
from raytower.index.faiss_index import new_index
from raytower.index.manifest import (
    DeletedRows,
    FileEntry,
    IndexManifest,
    Operation,
    Origin,
    ShardEntry,
)
from raytower.index.plan import split_rows
from raytower.index.reader import default_cache_dir, open_manifest
from raytower.index.search import Shard, deleted_place, find_ids
from raytower.index.shard_build import ShardTask, serialise
from raytower.index.source import EmbeddingsSource
from raytower.index.tasks import run_tasks
from raytower.index.vectors import stream_ids
from raytower.index.versions import claim_version, publish, spec_sha256, version_folder
from raytower.runtime import ensure_ray, log
from raytower.storage import Location

_ROWS_PER_DELTA_SHARD = 5_000_000
# So few rows are searched exactly in well under a millisecond, whatever the kind of the index.
_FLAT_DELTA_ROWS = 20_000
_SAME_ORIGIN = ("fingerprint", "metric", "dim", "prefix", "max_length")
_NAMES_SHOWN = 3
# Rows found by id: shard number to row numbers.
FoundRows = Mapping[int, NDArray[np.int64]]


class IndexAddConfig(Config):
    """`raytower index add`: documents of an embeddings folder into the published version of `index`.

    `upsert` lets a document replace the one with its id; without it an id that is there already is refused.
    """

    index: str
    embeddings: str
    upsert: bool = False
    workers: IndexWorkersConfig = IndexWorkersConfig()


class IndexDeleteConfig(Config):
    """`raytower index delete`: by `ids`, or by a text file at `path` with an id a line (or both).

    `on_unknown` ignore lets ids pass that the index does not hold; they are counted.
    """

    index: str
    ids: list[str] = Field(default_factory=list)
    path: str | None = None
    on_unknown: Literal["fail", "ignore"] = "fail"
    workers: IndexWorkersConfig = IndexWorkersConfig()

    def model_post_init(self, context: Any) -> None:
        if not self.ids and self.path is None:
            raise ValueError("there is nothing to delete: give ids, or path, a text file with an id a line")


def add_to_index(config: IndexAddConfig) -> dict[str, Any]:
    """Publish a version that holds the documents of an embeddings folder besides what is published.

    A small addition is searched exactly; a larger one is of the index's own kind, with its training.

    Returns:
        what `index build` returns, and added, replaced.

    Raises:
        InputError: another encoder, prefix, length or dimension; ids that occur twice, or are there already without
            `upsert`. FormatError: damaged files. RaytowerError: another version was published meanwhile.
    """
    started = time.perf_counter()
    index = Location.of(config.index)
    parent, _ = open_manifest(index)
    source = EmbeddingsSource(Location.of(config.embeddings))
    refuse_other_origin(source.origin, parent, config.embeddings)
    ensure_ray(config.workers.num_cpus)
    schema = check_embeddings(source, config.workers)
    replaced = find_rows(index, parent, _ids_of(source), config.workers)
    if replaced.num_rows and not config.upsert:
        raise InputError(
            f"{replaced.num_rows} ids of {config.embeddings!r} are in index version {parent.version} already, such as "
            f"{replaced.shown()}; set upsert: true to replace those documents, or leave them out"
        )
    if source.rows == 0:
        raise InputError(f"{config.embeddings!r} holds no rows; there is nothing to add")
    spec = {
        "operation": "add",
        "parent": parent.version,
        "shards": [asdict(entry) for entry in parent.shards],
        "rows": source.identity(),
    }
    with claim_version(index, spec) as version:
        folder = version_folder(index, version)
        kept = mark_deleted(index, parent, version, replaced.rows)
        added = _delta_shards(config, parent, source, folder, schema, spec_sha256(spec))
        manifest = derive(parent, version, "add", (*kept, *added), spec_sha256(spec))
        manifest.write(folder)
    publish(index, version, instead_of=parent.version)
    return {
        **figures(manifest, started, config.index),
        "added": source.rows,
        "replaced": replaced.num_rows,
    }


def delete_from_index(config: IndexDeleteConfig) -> dict[str, Any]:
    """Publish a version without some documents.

    Returns:
        what `index build` returns, and deleted, unknown (ids that were not there), repeated (ids given twice).

    Raises:
        InputError: an id that the index does not hold (one deleted before is such) under on_unknown fail, or no ids.
        RaytowerError: another version was published meanwhile.
    """
    started = time.perf_counter()
    index = Location.of(config.index)
    parent, _ = open_manifest(index)
    given = _given_ids(config)
    if not given:
        raise InputError(f"{config.path!r} holds no ids; there is nothing to delete")
    wanted = list(dict.fromkeys(given))
    ensure_ray(config.workers.num_cpus)
    found = find_rows(index, parent, pa.array(wanted, pa.string()), config.workers)
    unknown = sorted(set(wanted) - set(found.names))
    if unknown and config.on_unknown == "fail":
        shown = ", ".join(map(repr, unknown[:_NAMES_SHOWN])) + (
            " and others" if len(unknown) > _NAMES_SHOWN else ""
        )
        raise InputError(
            f"{len(unknown)} of {len(wanted)} ids are not in index version {parent.version}: {shown}; they never were, "
            "or are deleted already: correct them, or set on_unknown: ignore"
        )
    if found.num_rows == parent.rows:
        raise InputError(
            f"this deletes all {parent.rows} documents of index version {parent.version}; an index holds at least one: "
            "remove the index itself instead"
        )
    manifest = parent
    if found.num_rows:
        spec = {
            "operation": "delete",
            "parent": parent.version,
            "shards": [asdict(entry) for entry in parent.shards],
            "ids": sorted(found.names),
        }
        with claim_version(index, spec) as version:
            shards = mark_deleted(index, parent, version, found.rows)
            manifest = derive(parent, version, "delete", shards, spec_sha256(spec))
            manifest.write(version_folder(index, version))
        publish(index, version, instead_of=parent.version)
    return {
        **figures(manifest, started, config.index),
        "deleted": found.num_rows,
        "unknown": len(unknown),
        "repeated": len(given) - len(wanted),
    }


def plan_add(config: IndexAddConfig) -> dict[str, Any]:
    """What an addition would do. Raises InputError and FormatError as `add_to_index`, the ids aside."""
    parent, _ = open_manifest(config.index)
    source = EmbeddingsSource(Location.of(config.embeddings))
    refuse_other_origin(source.origin, parent, config.embeddings)
    kind, ranges = _delta_plan(parent, source.rows)
    return {
        "parent": parent.version,
        "rows_before": parent.rows,
        "rows_added": source.rows,
        "delta_kind": kind,
        "delta_shards": len(ranges),
    }


def plan_delete(config: IndexDeleteConfig) -> dict[str, Any]:
    """What a deletion would do; the ids are not looked up."""
    parent, _ = open_manifest(config.index)
    return {"parent": parent.version, "rows_before": parent.rows, "ids": len(set(_given_ids(config)))}


@dataclasses.dataclass(frozen=True)
class Found:
    """Documents found by their ids: names, and row numbers by shard."""

    names: list[str]
    rows: FoundRows

    @property
    def num_rows(self) -> int:
        return sum(len(rows) for rows in self.rows.values())

    def shown(self) -> str:
        return ", ".join(map(repr, self.names[:_NAMES_SHOWN]))


def find_rows(index: Location, manifest: IndexManifest, ids: pa.Array, workers: IndexWorkersConfig) -> Found:
    """The live documents of a version with one of `ids`, by a Ray task a shard."""
    reference = ray.put(ids)
    calls = [(index, manifest, number, reference) for number in range(len(manifest.shards))]
    parts = run_tasks(_find_in_shard, calls, workers)
    names = [name for part_names, _ in parts for name in part_names]
    return Found(names, {number: rows for number, (_, rows) in enumerate(parts) if len(rows)})


def mark_deleted(
    index: Location, parent: IndexManifest, version: str, rows: FoundRows
) -> tuple[ShardEntry, ...]:
    """The shards of `parent` with more rows deleted; writes the tombstones into the folder of `version`."""
    entries = []
    for number, entry in enumerate(parent.shards):
        more = rows.get(number)
        if more is None:
            entries.append(entry)
            continue
        before = _deleted_rows(index, parent, number)
        deleted = np.union1d(before, more).astype(np.int64)
        draft = dataclasses.replace(
            entry, deleted=DeletedRows(version=version, rows=len(deleted), file=FileEntry(sha256="", bytes=0))
        )
        place = deleted_place(version_folder(index, version).parent, draft)
        with place.open_write() as sink:
            np.lib.format.write_array(sink, deleted, allow_pickle=False)
        tombstones = DeletedRows(version=version, rows=len(deleted), file=FileEntry.of(place))
        entries.append(dataclasses.replace(entry, deleted=tombstones))
    return tuple(entries)


def derive(
    parent: IndexManifest, version: str, operation: Operation, shards: Sequence[ShardEntry], digest: str
) -> IndexManifest:
    """The manifest of a version made from `parent`; recall stays what was measured on an earlier version."""
    return dataclasses.replace(
        parent,
        version=version,
        parent=parent.version,
        operation=operation,
        rows=sum(entry.live_rows for entry in shards),
        shards=tuple(shards),
        spec_sha256=digest,
    )


def refuse_other_origin(found: Origin, parent: IndexManifest, embeddings: str) -> None:
    """Raises InputError, naming both sides, where vectors were made in another way than those of the index."""
    for name in _SAME_ORIGIN:
        ours, theirs = getattr(parent, name), getattr(found, name)
        if ours != theirs:
            raise InputError(
                f"{embeddings!r} has {name} {theirs!r}, index version {parent.version} has {ours!r}; vectors made in "
                f"different ways cannot be compared: encode with {parent.encoder!r}, prefix {parent.prefix!r} and "
                f"max_length {parent.max_length}"
            )


def _delta_plan(parent: IndexManifest, rows: int) -> tuple[BuiltKind, tuple[tuple[int, int], ...]]:
    """The kind of the shards to add, and their row ranges."""
    kind: BuiltKind = "flat" if rows <= _FLAT_DELTA_ROWS else parent.kind
    return kind, split_rows(rows, -(-rows // _ROWS_PER_DELTA_SHARD))


def _delta_shards(
    config: IndexAddConfig,
    parent: IndexManifest,
    source: EmbeddingsSource,
    folder: Location,
    schema: pa.Schema,
    digest: str,
) -> tuple[ShardEntry, ...]:
    kind, ranges = _delta_plan(parent, source.rows)
    log(f"adding {source.rows} rows in {len(ranges)} shards of kind {kind}")
    tasks = [
        ShardTask(
            source=source,
            version=folder,
            number=number,
            start=start,
            end=end,
            kind=kind,
            exact_dtype=parent.exact_dtype if kind == parent.kind else None,
            documents_schema=schema,
            spec_sha256=digest,
            num_threads=config.workers.num_threads,
        )
        for number, (start, end) in enumerate(ranges)
    ]

    def template() -> NDArray[np.uint8]:
        if kind == "flat":
            return serialise(new_index("flat", parent.dim, {}))
        # A version has shards of its own kind, with the training that all of them share.
        number = next(place for place, entry in enumerate(parent.shards) if entry.kind == kind)
        return run_tasks(_template_of, [(folder, parent, number)], config.workers)[0]

    return build_shards(tasks, template, config.workers, config.workers.max)


def _template_of(folder: Location, parent: IndexManifest, number: int) -> NDArray[np.uint8]:
    """The training of a shard, as an empty index."""
    return serialise(_open(folder, parent, number).new_like())


def _find_in_shard(
    index: Location, manifest: IndexManifest, number: int, ids: pa.Array
) -> tuple[list[str], NDArray[np.int64]]:
    return find_ids(_open(version_folder(index, manifest.version), manifest, number), ids)


def _deleted_rows(index: Location, manifest: IndexManifest, number: int) -> NDArray[np.int64]:
    shard = _open(version_folder(index, manifest.version), manifest, number)
    return np.setdiff1d(np.arange(shard.num_rows), shard.live_rows)


def _open(folder: Location, manifest: IndexManifest, number: int) -> Shard:
    return Shard.open(folder, number, manifest, default_cache_dir(), verify="none")


def _ids_of(source: EmbeddingsSource) -> pa.Array:
    return pa.concat_arrays(list(stream_ids(source.folder, source.manifest)))


def _given_ids(config: IndexDeleteConfig) -> list[str]:
    return [*config.ids, *(_read_ids(config.path) if config.path is not None else [])]


def _read_ids(path: str) -> Iterator[str]:
    """Ids of a text file, one a line. Raises InputError for an empty line, or no UTF-8."""
    place = Location.of(path)
    try:
        lines = place.read_bytes().decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"{place} is not UTF-8 text: {error}; give a text file with an id a line") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            raise InputError(f"{place} line {number} is empty; every line is an id")
        yield line
