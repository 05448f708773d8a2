"""A copy of the embeddings in which the rows of a shard lie together, so that a shard is a range of rows again.

One task takes a run of embeddings files and writes, for each shard that has rows in them, one Parquet file. It needs
memory for one batch and for the rows that wait to be written, and one open file a shard, however many rows there are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from raytower.encoding.manifest import EmbeddingsFile, EmbeddingsManifest
from raytower.errors import FormatError, RaytowerError
from raytower.index.costs import BATCH_ROWS
from raytower.index.placement import Placement
from raytower.index.vectors import stream_rows
from raytower.storage import Location

# Rows wait in memory until they make row groups worth reading.
_BUFFER_BYTES = 64 * 2**20


@dataclass(frozen=True, kw_only=True)
class PlaceTask:
    """What a worker needs to place one run of embeddings files; small enough to send.

    `files` is the half-open range of their numbers in the manifest. `documents_schema` is what all files agree on.
    """

    embeddings: Location
    target: Location
    files: tuple[int, int]
    documents_schema: pa.Schema
    buffer_bytes: int = _BUFFER_BYTES


@dataclass(frozen=True, kw_only=True)
class PlacedPart:
    """The rows of one shard among the files from number `first_file` on, as one Parquet file."""

    shard: int
    first_file: int
    file: EmbeddingsFile


@dataclass(frozen=True, kw_only=True)
class PlacedCopy:
    """A whole placed copy: its manifest, the half-open row range of each shard, and where queries go.

    A shard that got no rows is left out of all three, so no range is empty and `placement` counts as `ranges` does.
    """

    manifest: EmbeddingsManifest
    ranges: tuple[tuple[int, int], ...]
    placement: Placement


def place_files(task: PlaceTask, placement: Placement) -> list[PlacedPart]:
    """Write the rows of some embeddings files to one Parquet file a shard, with all columns as they are stored.

    Rows keep their order within a shard. What an earlier run of the same task finished is kept, what it left
    half-done is removed.

    Raises:
        FormatError, InputError: what reading the embeddings raises.
    """
    manifest = EmbeddingsManifest.read(task.embeddings)
    done = task.target / f"placed-{task.files[0]:08d}.json"
    spec = _spec(task, manifest, placement)
    kept = _finished(task.target, done, spec)
    if kept is not None:
        return kept
    _remove_leftovers(task, done)
    task.target.make_dir()
    with ExitStack() as stack:
        writers = _ShardWriters(task, _stored_schema(task, manifest), stack)
        for number in range(*task.files):
            _place_file(task.embeddings, manifest, number, placement, writers)
        writers.flush_all()
    parts = [
        PlacedPart(
            shard=shard, first_file=task.files[0], file=_entry(task.target / _part_name(task, shard), rows)
        )
        for shard, rows in sorted(writers.rows.items())
    ]
    done.write_json({"spec": spec, "parts": [asdict(part) for part in parts]})
    return parts


def placed_copy(
    manifest: EmbeddingsManifest, parts: Sequence[PlacedPart], placement: Placement
) -> PlacedCopy:
    """Put the parts of all tasks together: ordered by shard, then by embeddings file.

    Raises:
        RaytowerError: the parts do not hold each row once.
    """
    ordered = sorted(parts, key=lambda part: (part.shard, part.first_file))
    names = {part.file.name for part in ordered}
    rows = sum(part.file.rows for part in ordered)
    if len(names) < len(ordered) or rows != manifest.rows:
        raise RaytowerError(
            f"the placed copy has {rows} rows in {len(ordered)} parts, {len(names)} of them different; the embeddings "
            f"have {manifest.rows} rows: remove the unfinished version and build again"
        )
    shard_rows = np.zeros(placement.num_shards, np.int64)
    for part in ordered:
        shard_rows[part.shard] += part.file.rows
    ends = np.cumsum(shard_rows)
    bounds = zip((ends - shard_rows).tolist(), ends.tolist(), strict=True)
    return PlacedCopy(
        manifest=replace(manifest, files=tuple(part.file for part in ordered)),
        ranges=tuple((start, end) for start, end in bounds if start < end),
        placement=placement.without_empty(shard_rows),
    )


class _ShardWriters:
    """One Parquet file a shard, open side by side; each appears when `stack` ends without an exception.

    Of the rows that wait, at most `buffer_bytes` beside the last batch, the shard with most is written first.
    """

    def __init__(self, task: PlaceTask, schema: pa.Schema, stack: ExitStack) -> None:
        self.schema = schema
        self.rows: dict[int, int] = {}
        self._task = task
        self._stack = stack
        self._writers: dict[int, pq.ParquetWriter] = {}
        self._waiting: dict[int, list[pa.Table]] = {}
        self._waiting_bytes: dict[int, int] = {}

    def add(self, table: pa.Table, shards: NDArray[np.int32]) -> None:
        """Rows of `table`, each for the shard of the same place in `shards`."""
        order = np.argsort(shards, kind="stable")
        present, starts = np.unique(shards[order], return_index=True)
        for shard, rows in zip(present.tolist(), np.split(order, starts[1:]), strict=True):
            # A copy: a slice would keep the whole batch in memory while its few rows wait.
            taken = table.take(pa.array(rows))
            self.rows[shard] = self.rows.get(shard, 0) + len(rows)
            self._waiting.setdefault(shard, []).append(taken)
            self._waiting_bytes[shard] = self._waiting_bytes.get(shard, 0) + taken.nbytes
        while sum(self._waiting_bytes.values()) > self._task.buffer_bytes:
            self._flush(max(self._waiting_bytes, key=self._waiting_bytes.__getitem__))

    def flush_all(self) -> None:
        for shard in list(self._waiting):
            self._flush(shard)

    def _flush(self, shard: int) -> None:
        rows = pa.concat_tables(self._waiting.pop(shard))
        del self._waiting_bytes[shard]
        self._writer(shard).write_table(rows, row_group_size=rows.num_rows)

    def _writer(self, shard: int) -> pq.ParquetWriter:
        if shard not in self._writers:
            place = self._task.target / _part_name(self._task, shard)
            sink = self._stack.enter_context(place.open_write())
            # As the encoding job writes them: vectors do not compress, and statistics on them only cost time.
            columns = [name for name in self.schema.names if name != "embedding"]
            writer = pq.ParquetWriter(
                sink, self.schema, compression="zstd", use_dictionary=False, write_statistics=columns
            )
            self._writers[shard] = self._stack.enter_context(writer)
        return self._writers[shard]


def _place_file(
    folder: Location,
    manifest: EmbeddingsManifest,
    number: int,
    placement: Placement,
    writers: _ShardWriters,
) -> None:
    """Two readings: `stream_rows` checks the vectors and gives them unit length, the copy keeps them as stored."""
    entry = manifest.files[number]
    start = sum(item.rows for item in manifest.files[:number])
    assigned = [
        placement.assign(batch.vectors) for batch in stream_rows(folder, manifest, start, start + entry.rows)
    ]
    shards = np.concatenate([np.empty(0, np.int32), *assigned])
    row = 0
    for table in _stored_tables(folder / entry.name, writers.schema):
        writers.add(table, shards[row : row + table.num_rows])
        row += table.num_rows
    if row != len(shards):
        raise FormatError(f"{folder / entry.name} changed while it was read; encode the corpus again")


def _stored_tables(place: Location, schema: pa.Schema) -> Iterator[pa.Table]:
    """The file's rows with the columns and types of `schema`; a column that the file lacks is null."""
    with place.open_read() as stream:
        file = pq.ParquetFile(stream)
        stored, expected = file.schema_arrow.field("embedding").type, schema.field("embedding").type
        if stored != expected:
            raise FormatError(f"{place} has embeddings of type {stored}; its manifest says {expected}")
        for record in file.iter_batches(batch_size=BATCH_ROWS):
            whole = pa.concat_tables([schema.empty_table(), pa.table(record)], promote_options="permissive")
            yield whole.cast(schema)


def _stored_schema(task: PlaceTask, manifest: EmbeddingsManifest) -> pa.Schema:
    value = pa.float16() if manifest.dtype == "float16" else pa.float32()
    position = task.documents_schema.get_field_index("text") + 1
    return task.documents_schema.insert(position, pa.field("embedding", pa.list_(value, manifest.dim)))


def _part_name(task: PlaceTask, shard: int) -> str:
    return f"placed-{shard:05d}-{task.files[0]:08d}.parquet"


def _entry(place: Location, rows: int) -> EmbeddingsFile:
    return EmbeddingsFile(name=place.name, rows=rows, bytes=place.size_bytes(), sha256=place.sha256())


def _spec(task: PlaceTask, manifest: EmbeddingsManifest, placement: Placement) -> dict[str, Any]:
    """What the parts are made from; only parts of the same are taken up again."""
    return {
        "placement": placement.sha256,
        "files": [[item.name, item.rows, item.sha256] for item in manifest.files[slice(*task.files)]],
        "schema": str(_stored_schema(task, manifest)),
    }


def _finished(target: Location, done: Location, spec: dict[str, Any]) -> list[PlacedPart] | None:
    """The parts that an earlier run of the same task finished, or None. The files are checked."""
    if not done.is_file():
        return None
    try:
        values = done.read_json()
        if values["spec"] != spec:
            return None
        parts = [PlacedPart(**{**part, "file": EmbeddingsFile(**part["file"])}) for part in values["parts"]]
    except (FormatError, KeyError, TypeError):
        return None
    places = [(target / part.file.name, part.file.sha256) for part in parts]
    return parts if all(place.is_file() and place.sha256() == sha256 for place, sha256 in places) else None


def _remove_leftovers(task: PlaceTask, done: Location) -> None:
    """Parts and half-written files of an earlier run of this task; the note that calls them finished goes first."""
    done.delete()
    first = f"{task.files[0]:08d}"
    own = re.compile(rf"\.?placed-(\d+-{first}\.parquet|{first}\.json)(\.[0-9a-f]+\.tmp)?")
    for child in task.target.children():
        if own.fullmatch(child.name):
            child.delete()
