"""Building one shard: rows of a source into a FAISS file and an Arrow file. Runs inside a Ray task."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raytower.errors import FormatError
from raytower.index.config import BuiltKind
from raytower.index.faiss_import import import_faiss
from raytower.index.faiss_index import Vectors, fill, new_index, train
from raytower.index.manifest import (
    DOCUMENTS_NAME,
    EXACT_NAME,
    VECTORS_NAME,
    ExactDtype,
    FileEntry,
    ShardEntry,
)
from raytower.index.plan import IndexPlan
from raytower.index.source import VectorSource
from raytower.storage import Location, publish_directory

SHARD_NAME = "shard.json"


@dataclass(frozen=True, kw_only=True)
class ShardTask:
    """Everything a worker needs to build one shard of rows start to end (exclusive); small enough to send."""

    source: VectorSource
    version: Location
    number: int
    start: int
    end: int
    kind: BuiltKind
    exact_dtype: ExactDtype | None
    documents_schema: pa.Schema
    spec_sha256: str
    num_threads: int
    num_gpus: float = 0


def shard_name(number: int) -> str:
    return f"shard-{number:05d}"


def train_template(source: VectorSource, plan: IndexPlan, seed: int, num_threads: int) -> NDArray[np.uint8]:
    """A trained empty index (centroids, codebooks, value ranges), serialised: every shard starts from it."""
    faiss = import_faiss()
    faiss.omp_set_num_threads(num_threads)
    index = new_index(plan.kind, plan.dim, plan.parameters)
    if plan.train_rows:
        _, vectors = source.sample(plan.train_rows, seed)
        train(plan.kind, index, vectors)
    return serialise(index)


def serialise(index: Any) -> NDArray[np.uint8]:
    """A FAISS index as bytes that travel to workers."""
    serialised: NDArray[np.uint8] = import_faiss().serialize_index(index)
    return serialised


def build_shard(task: ShardTask, template: NDArray[np.uint8]) -> ShardEntry:
    """Build a shard under the version folder; it appears there whole or not at all.

    Raises:
        InputError, FormatError: what reading the source raises.
    """
    faiss = import_faiss()
    faiss.omp_set_num_threads(task.num_threads)
    empty = faiss.deserialize_index(template)
    target = task.version / shard_name(task.number)
    with publish_directory(target) as folder:
        index = _fill(empty, task, folder)
        faiss.write_index(index, str(folder / VECTORS_NAME))
        entry = ShardEntry(
            version=task.version.name,
            name=shard_name(task.number),
            rows=int(index.ntotal),
            kind=task.kind,
            files={path.name: FileEntry.of(Location.of(path)) for path in sorted(folder.iterdir())},
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
        entry = ShardEntry.of_json(values["shard"])
    except (AttributeError, FormatError, KeyError, TypeError):
        return None
    if values.get("spec_sha256") != spec_sha256:
        return None
    places = [(folder / name, file) for name, file in entry.files.items()]
    return entry if all(place.is_file() and place.sha256() == file.sha256 for place, file in places) else None


def _fill(index: Any, task: ShardTask, folder: Path) -> Any:
    with ExitStack() as stack:
        writer = stack.enter_context(pa.ipc.new_file(str(folder / DOCUMENTS_NAME), task.documents_schema))
        exact = None
        if task.exact_dtype is not None:
            exact = stack.enter_context(open(folder / EXACT_NAME, "wb"))
            shape = (task.end - task.start, index.d)
            _write_array_header(exact, np.dtype(task.exact_dtype), shape)

        def batches() -> Iterator[Vectors]:
            for batch in task.source.stream(task.start, task.end):
                yield batch.vectors
                if exact is not None:
                    # Written, not mapped: the pages of a mapped file would count as this process's memory.
                    exact.write(batch.vectors.astype(task.exact_dtype).data)
                writer.write_table(_conform(batch.documents, task.documents_schema))

        rows = task.end - task.start
        return fill(task.kind, index, batches(), rows, num_threads=task.num_threads, num_gpus=task.num_gpus)


def _write_array_header(stream: IO[bytes], dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, header)


def _conform(documents: pa.Table, schema: pa.Schema) -> pa.Table:
    """`documents` with the columns and types that all files agree on; a column that a file lacks is null."""
    columns = [
        documents[field.name].cast(field.type)
        if field.name in documents.column_names
        else pa.nulls(documents.num_rows, field.type)
        for field in schema
    ]
    return pa.table(columns, schema=schema)
