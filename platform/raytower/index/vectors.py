"""Streaming vectors and documents out of an embeddings folder; a batch at a time, never the corpus."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from raytower.encoding.manifest import EmbeddingsFile, EmbeddingsManifest
from raytower.errors import FormatError, InputError
from raytower.index.costs import BATCH_ROWS
from raytower.storage import Location

_READ_BUFFER_BYTES = 2**20
Metric = Literal["cosine", "inner_product"]


@dataclass(frozen=True)
class VectorBatch:
    """Rows of the embeddings in file order: `vectors` float32 (rows, dim) and the other columns.

    Under cosine the vectors have unit length, whatever length they are stored with.
    """

    first_row: int
    vectors: NDArray[np.float32]
    documents: pa.Table


@dataclass(frozen=True)
class CheckedFile:
    """What reading a whole file proved: hashes of its ids in row order, and the schema of its documents."""

    id_hashes: NDArray[np.uint64]
    documents_schema: pa.Schema


def metric_of(manifest: EmbeddingsManifest) -> Metric:
    """The metric that these vectors were trained for."""
    return "cosine" if manifest.similarity == "cosine" else "inner_product"


def check_file(folder: Location, manifest: EmbeddingsManifest, number: int) -> CheckedFile:
    """Read file `number` whole and check it against the manifest, so that a build never fails late.

    Raises:
        FormatError: the file is missing, changed, of another row count, or has other columns.
        InputError: a vector that is null, not finite, of the wrong dimension, or zero under cosine; an id that is null.
    """
    entry = manifest.files[number]
    place = folder / entry.name
    if not place.is_file():
        raise FormatError(f"{place} is missing but the manifest beside it lists it; encode the corpus again")
    found = place.sha256()
    if found != entry.sha256:
        raise FormatError(
            f"{place} has sha256 {found[:12]}…, its manifest says {entry.sha256[:12]}…: the file was changed after "
            "encoding; encode the corpus again"
        )
    hashes: list[NDArray[np.uint64]] = []
    schema: pa.Schema | None = None
    first_row = sum(item.rows for item in manifest.files[:number])
    for batch in stream_rows(folder, manifest, first_row, first_row + entry.rows):
        schema = batch.documents.schema
        ids = batch.documents["id"]
        if ids.null_count:
            raise InputError(f"{place} has {ids.null_count} rows without an id; every document needs one")
        hashes.append(hash_ids(ids.to_pylist()))
    if schema is None:
        schema = _documents_schema(pq.read_schema(place.path, filesystem=place.filesystem))
    return CheckedFile(np.concatenate([*hashes, np.empty(0, np.uint64)]), schema)


def hash_ids(ids: Iterable[str]) -> NDArray[np.uint64]:
    """64-bit hashes, to find duplicates without holding the ids."""
    digests = b"".join(hashlib.blake2b(name.encode(), digest_size=8).digest() for name in ids)
    return np.frombuffer(digests, dtype=np.uint64)


def refuse_duplicate_ids(
    folder: Location, manifest: EmbeddingsManifest, hashes: Sequence[NDArray[np.uint64]]
) -> None:
    """Raises InputError naming an id that occurs twice; equal hashes are compared as text first."""
    values, counts = np.unique(np.concatenate(hashes), return_counts=True)
    repeated = values[counts > 1]
    if not len(repeated):
        return
    seen: dict[str, str] = {}
    for entry, of_file in zip(manifest.files, hashes, strict=True):
        rows = np.flatnonzero(np.isin(of_file, repeated))
        if not len(rows):
            continue
        place = folder / entry.name
        with place.open_read() as stream:
            ids = pq.read_table(stream, columns=["id"])["id"].take(pa.array(rows)).to_pylist()
        for name, row in zip(ids, rows.tolist(), strict=True):
            where = f"{entry.name} row {row}"
            if name in seen:
                raise InputError(
                    f"id {name!r} stands twice in {folder}: {seen[name]} and {where}; ids must be unique, so give "
                    "the corpus unique ids and encode it again"
                )
            seen[name] = where


def stream_rows(
    folder: Location, manifest: EmbeddingsManifest, start: int, end: int
) -> Iterator[VectorBatch]:
    """Rows start to end (exclusive) of the whole folder, files in manifest order.

    Raises:
        FormatError: a file is missing, has another row count than the manifest says, or other columns.
        InputError: vectors of the wrong dimension, not finite, or zero under cosine; names file, row and id.
    """
    for entry, file_start in _files_with_starts(manifest):
        if file_start >= end or file_start + entry.rows <= start:
            continue
        wanted = (max(start - file_start, 0), min(end - file_start, entry.rows))
        place = folder / entry.name
        with place.open_read() as stream:
            file = _open_parquet(stream, place, entry)
            for row, table in _stream_tables(file, *wanted, columns=None):
                vectors = _vectors_of(table, manifest, place, row)
                yield VectorBatch(file_start + row, vectors, table.drop_columns(["embedding"]))


def stream_ids(folder: Location, manifest: EmbeddingsManifest) -> Iterator[pa.Array]:
    """The ids of each file, in manifest order."""
    for entry in manifest.files:
        place = folder / entry.name
        with place.open_read() as stream:
            ids = _open_parquet(stream, place, entry).read(columns=["id"])["id"]
        yield ids.combine_chunks().cast(pa.string())


def sample_rows(
    folder: Location, manifest: EmbeddingsManifest, count: int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """`count` distinct random rows in file order: their numbers and vectors (count, dim).

    Only row groups that hold a chosen row are read.
    """
    generator = np.random.default_rng(seed)
    chosen = np.sort(generator.choice(manifest.rows, size=min(count, manifest.rows), replace=False))
    vectors = np.empty((len(chosen), manifest.dim), np.float32)
    filled = 0
    for entry, file_start in _files_with_starts(manifest):
        low, high = np.searchsorted(chosen, (file_start, file_start + entry.rows))
        if low == high:
            continue
        rows = chosen[low:high] - file_start
        place = folder / entry.name
        with place.open_read() as stream:
            file = _open_parquet(stream, place, entry)
            for first, table in _stream_groups(file, rows):
                inside = rows[(rows >= first) & (rows < first + table.num_rows)] - first
                picked = table.take(pa.array(inside))
                found = _vectors_of(picked, manifest, place, first)
                vectors[filled : filled + len(found)] = found
                filled += len(found)
    return chosen, vectors


def _files_with_starts(manifest: EmbeddingsManifest) -> Iterator[tuple[EmbeddingsFile, int]]:
    start = 0
    for entry in manifest.files:
        yield entry, start
        start += entry.rows


def _open_parquet(stream: Any, place: Location, entry: EmbeddingsFile) -> pq.ParquetFile:
    try:
        # A buffer in place of whole row groups read ahead: a third less memory while a shard is filled.
        file = pq.ParquetFile(stream, pre_buffer=False, buffer_size=_READ_BUFFER_BYTES)
    except (pa.ArrowInvalid, OSError) as error:
        raise FormatError(f"{place} is no whole Parquet file: {error}; encode the corpus again") from error
    if file.metadata.num_rows != entry.rows:
        raise FormatError(f"{place} has {file.metadata.num_rows} rows, its manifest says {entry.rows}")
    _documents_schema(file.schema_arrow, place)
    return file


def _documents_schema(schema: pa.Schema, place: Location | None = None) -> pa.Schema:
    missing = {"id", "text", "embedding"} - set(schema.names)
    if missing:
        raise FormatError(f"{place} lacks the columns {sorted(missing)}; it is no embeddings file")
    return schema.remove(schema.get_field_index("embedding")).remove_metadata()


def _stream_tables(
    file: pq.ParquetFile, low: int, high: int, columns: list[str] | None
) -> Iterator[tuple[int, pa.Table]]:
    """Rows low to high of a file with their first row number; row groups outside are not read."""
    first, groups, skipped = 0, [], 0
    for group in range(file.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        if first < high and first + rows > low:
            groups.append(group)
        elif first + rows <= low:
            skipped = first + rows
        first += rows
    row = skipped
    for record in file.iter_batches(batch_size=BATCH_ROWS, row_groups=groups, columns=columns):
        begin, end = max(low - row, 0), min(high - row, record.num_rows)
        if begin < end:
            yield row + begin, pa.table(record.slice(begin, end - begin))
        row += record.num_rows


def _stream_groups(file: pq.ParquetFile, rows: NDArray[np.int64]) -> Iterator[tuple[int, pa.Table]]:
    """Ids and vectors of the parts of a file, batch by batch, that hold one of `rows` (sorted)."""
    first = 0
    for group in range(file.num_row_groups):
        end = first + file.metadata.row_group(group).num_rows
        low, high = np.searchsorted(rows, (first, end))
        if low < high:
            for batch_first, table in _stream_tables(file, first, end, columns=["id", "embedding"]):
                inside = np.searchsorted(rows, (batch_first, batch_first + table.num_rows))
                if inside[0] < inside[1]:
                    yield batch_first, table
        first = end


def _vectors_of(
    table: pa.Table, manifest: EmbeddingsManifest, place: Location, first_row: int
) -> NDArray[np.float32]:
    column = table["embedding"].combine_chunks()
    kind = column.type
    if not pa.types.is_fixed_size_list(kind) or kind.list_size != manifest.dim:
        raise FormatError(
            f"{place} has embeddings of type {kind}; its manifest says fixed_size_list of {manifest.dim} dimensions"
        )
    flat = column.flatten()
    if column.null_count or flat.null_count:
        raise InputError(f"{place} has null vectors from row {first_row} on; encode the corpus again")
    values = flat.to_numpy(zero_copy_only=False).reshape(-1, manifest.dim)
    vectors: NDArray[np.float32] = np.ascontiguousarray(values, dtype=np.float32)
    _refuse(~np.isfinite(vectors).all(axis=1), "that holds NaN or infinity", table, place, first_row)
    if metric_of(manifest) == "cosine":
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        _refuse(
            norms[:, 0] == 0,
            "that is zero, which has no cosine with anything",
            table,
            place,
            first_row,
        )
        vectors = vectors / norms
    return vectors


def _refuse(bad: Any, what: str, table: pa.Table, place: Location, first_row: int) -> None:
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        name = table["id"][row].as_py()
        raise InputError(
            f"{place} row {first_row + row}: id {name!r} has a vector {what} ({int(bad.sum())} such rows near it); "
            "check the encoder and encode the corpus again"
        )
