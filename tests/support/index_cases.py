"""Small embeddings folders and indexes for tests, made without an encoder and without Ray."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raytower.encoding.manifest import EmbeddingsFile, EmbeddingsManifest
from raytower.encoding.parts import write_part
from raytower.index.build import build_index
from raytower.index.config import IndexBuildConfig
from raytower.index.tasks import Run
from raytower.storage import Location

HERE = Run()


def unit_vectors(count: int, dim: int = 8, seed: int = 0) -> NDArray[np.float32]:
    vectors = np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def write_embeddings(
    folder: Path,
    ids: Sequence[str],
    vectors: NDArray[Any],
    texts: Sequence[str] | None = None,
    columns: dict[str, Any] | None = None,
    rows_per_file: int = 1_000_000,
    **manifest: Any,
) -> str:
    """An embeddings folder as the encoding job would have written it; returns its path."""
    table = pa.table(
        {
            "id": pa.array(list(ids), pa.string()),
            "text": pa.array(
                list(texts if texts is not None else [f"text of {name}" for name in ids]), pa.string()
            ),
            **(columns or {}),
        }
    )
    place = Location.of(folder)
    files = []
    for number, start in enumerate(range(0, len(ids), rows_per_file)):
        part = place / f"part-{number:08d}.parquet"
        rows = table.slice(start, rows_per_file)
        write_part(part, rows, vectors[start : start + rows_per_file], {})
        files.append(
            EmbeddingsFile(name=part.name, rows=rows.num_rows, bytes=part.size_bytes(), sha256=part.sha256())
        )
    settings: dict[str, Any] = {
        "fingerprint": "f" * 64,
        "encoder": "an-encoder",
        "dim": vectors.shape[1],
        "dtype": str(vectors.dtype),
        "normalised": True,
        "prefix": "",
        "max_length": 64,
    }
    EmbeddingsManifest(**{**settings, **manifest}, rows=len(ids), files=tuple(files)).write(place)
    return str(folder)


def build(folder: Path | str, embeddings: str, **settings: Any) -> dict[str, Any]:
    """An index over an embeddings folder, built in this process."""
    config = {"kind": "flat", **settings, "embeddings": embeddings, "output": str(folder)}
    return build_index(IndexBuildConfig.model_validate(config), run=HERE)
