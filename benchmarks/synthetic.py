"""Clustered vectors as sentence embeddings roughly lie, and an embeddings folder that holds them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from raytower.encoding.manifest import EmbeddingsFile, EmbeddingsManifest
from raytower.storage import Location

Vectors = NDArray[np.float32]
_DIRECTIONS = 64
_CENTRES = 1000
_ROWS_PER_FILE = 50_000


def clustered(rows: int, dim: int, seed: int = 0) -> Vectors:
    """Unit vectors (rows, dim) around 1,000 centres in a space of 64 directions; the seed draws the rows only."""
    fixed = np.random.default_rng(12345)
    basis = fixed.normal(size=(_DIRECTIONS, dim)).astype(np.float32)
    centres = fixed.normal(size=(_CENTRES, _DIRECTIONS)).astype(np.float32)
    random = np.random.default_rng(seed)
    found = np.empty((rows, dim), np.float32)
    for start in range(0, rows, _ROWS_PER_FILE):
        count = min(_ROWS_PER_FILE, rows - start)
        noise = random.standard_normal((count, _DIRECTIONS), np.float32)
        block = (centres[random.integers(0, _CENTRES, count)] + 0.7 * noise) @ basis
        block += 0.5 * random.standard_normal((count, dim), np.float32)
        found[start : start + count] = block / np.linalg.norm(block, axis=1, keepdims=True)
    return found


def write_embeddings(
    folder: Path, blocks: Iterator[Vectors], dim: int, documents: pa.Table | None = None
) -> Path:
    """An embeddings folder with one file a block; without `documents` (id, text, ...) both are row numbers."""
    folder.mkdir(parents=True)
    entries: list[EmbeddingsFile] = []
    rows = 0
    for number, block in enumerate(blocks):
        if documents is None:
            names = [str(row) for row in range(rows, rows + len(block))]
            columns = pa.table({"id": names, "text": names})
        else:
            columns = documents.slice(rows, len(block))
        rows += len(block)
        flat = pa.FixedSizeListArray.from_arrays(pa.array(block.reshape(-1)), dim)
        place = folder / f"part-{number:08d}.parquet"
        pq.write_table(columns.append_column("embedding", flat), place, use_dictionary=False)
        sha256 = Location.of(place).sha256()
        entries.append(
            EmbeddingsFile(name=place.name, rows=len(block), bytes=place.stat().st_size, sha256=sha256)
        )
    EmbeddingsManifest(
        fingerprint="benchmark",
        encoder="none",
        dim=dim,
        dtype="float32",
        normalised=True,
        prefix="",
        max_length=1,
        rows=rows,
        files=tuple(entries),
    ).write(Location.of(folder))
    return folder


def blocks_of(vectors: Vectors) -> Iterator[Vectors]:
    """`vectors` in pieces of one file each."""
    return (vectors[start : start + _ROWS_PER_FILE] for start in range(0, len(vectors), _ROWS_PER_FILE))
