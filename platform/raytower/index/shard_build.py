"""Building one shard: rows of the embeddings into a FAISS file and an Arrow file. Runs inside a Ray task."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raytower.encoding.manifest import EmbeddingsManifest
from raytower.errors import FormatError
from raytower.index.faiss_import import import_faiss
from raytower.index.kinds import new_index
from raytower.index.manifest import DOCUMENTS_NAME, VECTORS_NAME, ShardEntry
from raytower.index.plan import IndexPlan
from raytower.index.vectors import sample_rows, stream_rows
from raytower.storage import Location, publish_directory

SHARD_NAME = "shard.json"


@dataclass(frozen=True, kw_only=True)
class ShardTask:
    """Everything a worker needs to build one shard; small enough to send."""

    embeddings: Location
    version: Location
    number: int
    plan: IndexPlan
    documents_schema: pa.Schema
    spec_sha256: str
    num_threads: int


def shard_name(number: int) -> str:
    return f"shard-{number:05d}"


def train_template(embeddings: Location, plan: IndexPlan, seed: int, num_threads: int) -> NDArray[np.uint8]:
    """A trained empty index (centroids, codebooks, value ranges), serialised: every shard starts from it."""
    faiss = import_faiss()
    faiss.omp_set_num_threads(num_threads)
    index = new_index(plan.kind, plan.dim, plan.parameters)
    if plan.train_rows:
        _, vectors = sample_rows(embeddings, EmbeddingsManifest.read(embeddings), plan.train_rows, seed)
        index.train(vectors)
    serialised: NDArray[np.uint8] = faiss.serialize_index(index)
    return serialised


def build_shard(task: ShardTask, template: NDArray[np.uint8]) -> ShardEntry:
    """Build a shard under the version folder; it appears there whole or not at all.

    Raises:
        InputError, FormatError: what reading the embeddings raises.
    """
    faiss = import_faiss()
    faiss.omp_set_num_threads(task.num_threads)
    index = faiss.deserialize_index(template)
    target = task.version / shard_name(task.number)
    with publish_directory(target) as folder:
        vectors_path, documents_path = folder / VECTORS_NAME, folder / DOCUMENTS_NAME
        _fill(index, task, documents_path)
        faiss.write_index(index, str(vectors_path))
        entry = ShardEntry(
            version=task.version.name,
            name=shard_name(task.number),
            rows=int(index.ntotal),
            vectors_sha256=Location.of(vectors_path).sha256(),
            documents_sha256=Location.of(documents_path).sha256(),
            vectors_bytes=vectors_path.stat().st_size,
            documents_bytes=documents_path.stat().st_size,
        )
        Location.of(folder / SHARD_NAME).write_json({"spec_sha256": task.spec_sha256, "shard": asdict(entry)})
    return entry


def finished_shard(version: Location, number: int, spec_sha256: str) -> ShardEntry | None:
    """The entry of a shard that an earlier run of the same build finished, or None. Its files are checked."""
    folder = version / shard_name(number)
    if not (folder / SHARD_NAME).is_file():
        return None
    try:
        values = (folder / SHARD_NAME).read_json()
        entry = ShardEntry(**values["shard"])
    except (FormatError, KeyError, TypeError):
        return None
    files = {VECTORS_NAME: entry.vectors_sha256, DOCUMENTS_NAME: entry.documents_sha256}
    if values.get("spec_sha256") != spec_sha256 or not all((folder / name).is_file() for name in files):
        return None
    return entry if all((folder / name).sha256() == sha256 for name, sha256 in files.items()) else None


def _fill(index: Any, task: ShardTask, documents_path: Path) -> None:
    manifest = EmbeddingsManifest.read(task.embeddings)
    start, end = task.plan.ranges[task.number]
    with pa.ipc.new_file(str(documents_path), task.documents_schema) as writer:
        for batch in stream_rows(task.embeddings, manifest, start, end):
            index.add(batch.vectors)
            writer.write_table(_conform(batch.documents, task.documents_schema))


def _conform(documents: pa.Table, schema: pa.Schema) -> pa.Table:
    """`documents` with the columns and types that all files agree on; a column that a file lacks is null."""
    columns = [
        documents[field.name].cast(field.type)
        if field.name in documents.column_names
        else pa.nulls(documents.num_rows, field.type)
        for field in schema
    ]
    return pa.table(columns, schema=schema)
