"""Streaming vectors and documents out of an embeddings folder; a batch at a time, never the corpus."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from raytower.encoding.manifest import EmbeddingsManifest
from raytower.errors import FormatError, InputError
from raytower.storage import Location

BATCH_ROWS = 16_384


@dataclass(frozen=True)
class VectorBatch:
    """Rows of the embeddings in file order: `vectors` float32 (rows, dim) and the other columns."""

    first_row: int
    vectors: NDArray[np.float32]
    documents: pa.Table


def stream_rows(
    folder: Location, manifest: EmbeddingsManifest, start: int, end: int
) -> Iterator[VectorBatch]:
    """Rows start to end (exclusive) of the whole folder, files in manifest order.

    Raises:
        FormatError: a file is missing, has another row count than the manifest says, or other columns.
        InputError: vectors of the wrong dimension, not finite, or zero under cosine; names file and id.
    """
    file_start = 0
    for entry in manifest.files:
        file_end = file_start + entry.rows
        if file_start < end and file_end > start:
            yield from _stream_file(folder, manifest, entry.name, file_start, (start, end))
        file_start = file_end


def sample_rows(
    folder: Location, manifest: EmbeddingsManifest, count: int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """`count` distinct random rows in file order: their numbers and vectors (count, dim)."""
    chosen = np.sort(
        np.random.default_rng(seed).choice(manifest.rows, size=min(count, manifest.rows), replace=False)
    )
    parts = []
    for batch in stream_rows(folder, manifest, 0, manifest.rows):
        inside = (chosen >= batch.first_row) & (chosen < batch.first_row + len(batch.vectors))
        parts.append(batch.vectors[chosen[inside] - batch.first_row])
    return chosen, np.concatenate(parts)


def _stream_file(
    folder: Location, manifest: EmbeddingsManifest, name: str, file_start: int, wanted: tuple[int, int]
) -> Iterator[VectorBatch]:
    place = folder / name
    if not place.is_file():
        raise FormatError(f"{place} is missing but its manifest lists it; encode again")
    entry = next(item for item in manifest.files if item.name == name)
    with place.open_read() as stream:
        try:
            file = pq.ParquetFile(stream)
        except pa.ArrowInvalid as error:
            raise FormatError(f"{place} is no whole Parquet file: {error}; encode again") from error
        if file.metadata.num_rows != entry.rows:
            raise FormatError(f"{place} has {file.metadata.num_rows} rows, its manifest says {entry.rows}")
        row = file_start
        for record in file.iter_batches(batch_size=BATCH_ROWS):
            table = pa.table(record)
            low, high = max(wanted[0] - row, 0), min(wanted[1] - row, table.num_rows)
            if low < high:
                part = table.slice(low, high - low)
                yield VectorBatch(
                    row + low, _vectors_of(part, manifest, place), part.drop_columns(["embedding"])
                )
            row += table.num_rows


def _vectors_of(table: pa.Table, manifest: EmbeddingsManifest, place: Location) -> NDArray[np.float32]:
    missing = {"id", "text", "embedding"} - set(table.column_names)
    if missing:
        raise FormatError(f"{place} lacks the columns {sorted(missing)}; it is no embeddings file")
    column = table["embedding"].combine_chunks()
    kind = column.type
    if not pa.types.is_fixed_size_list(kind) or kind.list_size != manifest.dim:
        raise InputError(
            f"{place} has embeddings of type {kind}; its manifest says {manifest.dim} dimensions"
        )
    if column.null_count:
        raise InputError(f"{place} has {column.null_count} rows without an embedding; encode again")
    flat = column.flatten().to_numpy(zero_copy_only=False)
    vectors: NDArray[np.float32] = np.ascontiguousarray(flat.reshape(-1, manifest.dim), dtype=np.float32)
    _refuse(np.asarray(~np.isfinite(vectors).all(axis=1)), "that is not finite", table, place)
    if manifest.similarity == "cosine":
        norms: NDArray[np.float32] = np.asarray(np.linalg.norm(vectors, axis=1, keepdims=True))
        _refuse(np.asarray(norms[:, 0] == 0), "that is zero, which has no cosine", table, place)
        vectors = vectors / norms
    return vectors


def _refuse(bad: NDArray[np.bool_], what: str, table: pa.Table, place: Location) -> None:
    if bad.any():
        name: Any = table["id"][int(np.flatnonzero(bad)[0])].as_py()
        raise InputError(
            f"{place}: id {name!r} has a vector {what} ({int(bad.sum())} such rows); encode it again"
        )
