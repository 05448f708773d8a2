"""Building one shard: rows of the embeddings into a FAISS file and an Arrow file. Runs inside a Ray task."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raytower.encoding.manifest import EmbeddingsManifest
from raytower.index.faiss_import import import_faiss
from raytower.index.manifest import DOCUMENTS_NAME, VECTORS_NAME, ShardEntry
from raytower.index.plan import IndexPlan
from raytower.index.vectors import sample_rows, stream_rows
from raytower.storage import Location

SHARD_NAME = "shard.json"


def shard_name(number: int) -> str:
    return f"shard-{number:05d}"


def train_quantiser(embeddings: str, plan: IndexPlan, seed: int, num_threads: int) -> NDArray[np.uint8]:
    """Centroids and codebooks from a sample, as a serialised empty index that every shard starts from."""
    faiss = import_faiss()
    faiss.omp_set_num_threads(num_threads)
    folder = Location.of(embeddings)
    _, vectors = sample_rows(folder, EmbeddingsManifest.read(folder), plan.train_rows, seed)
    index = new_index(plan)
    index.train(vectors)
    serialised: NDArray[np.uint8] = faiss.serialize_index(index)
    return serialised


def new_index(plan: IndexPlan) -> Any:
    """An empty FAISS index over inner products, untrained where its kind trains."""
    faiss = import_faiss()
    parameters = plan.parameters
    if plan.kind == "flat":
        return faiss.IndexFlatIP(plan.dim)
    if plan.kind == "hnsw":
        index = faiss.IndexHNSWFlat(plan.dim, parameters["M"], faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = parameters["efConstruction"]
        return index
    codes = {"ivf_flat": "Flat", "ivf_sq8": "SQ8"}
    code = codes.get(plan.kind) or f"PQ{parameters['pq_m']}x{parameters['nbits']}"
    return faiss.index_factory(plan.dim, f"IVF{parameters['nlist']},{code}", faiss.METRIC_INNER_PRODUCT)


def build_shard(
    embeddings: str,
    version: str,
    number: int,
    plan: IndexPlan,
    trained: NDArray[np.uint8] | None,
    num_threads: int,
) -> tuple[ShardEntry, NDArray[np.uint64]]:
    """Build shard `number` under the version folder and return its entry and the hashes of its ids.

    A shard whose `shard.json` is there was finished by an earlier run and is only read for its ids.
    """
    faiss = import_faiss()
    faiss.omp_set_num_threads(num_threads)
    source = Location.of(embeddings)
    target = Location.of(version) / shard_name(number)
    if (target / SHARD_NAME).is_file():
        return _finished(target)
    manifest = EmbeddingsManifest.read(source)
    index = new_index(plan) if trained is None else faiss.deserialize_index(trained)
    with tempfile.TemporaryDirectory(dir=_scratch(target)) as scratch:
        vectors_path, documents_path = Path(scratch) / VECTORS_NAME, Path(scratch) / DOCUMENTS_NAME
        hashes = _fill(index, source, manifest, plan.ranges[number], documents_path)
        faiss.write_index(index, str(vectors_path))
        entry = ShardEntry(
            name=shard_name(number),
            rows=int(index.ntotal),
            vectors_sha256=Location.of(vectors_path).sha256(),
            documents_sha256=Location.of(documents_path).sha256(),
            vectors_bytes=vectors_path.stat().st_size,
            documents_bytes=documents_path.stat().st_size,
        )
        (target / VECTORS_NAME).move_from_local(vectors_path)
        (target / DOCUMENTS_NAME).move_from_local(documents_path)
    (target / SHARD_NAME).write_json(asdict(entry))
    return entry, hashes


def hash_ids(ids: list[str]) -> NDArray[np.uint64]:
    """64-bit hashes, to find duplicates without holding the ids."""
    digests = b"".join(hashlib.blake2b(name.encode(), digest_size=8).digest() for name in ids)
    return np.frombuffer(digests, dtype=np.uint64)


def _fill(
    index: Any, source: Location, manifest: EmbeddingsManifest, rows: tuple[int, int], documents_path: Path
) -> NDArray[np.uint64]:
    hashes: list[NDArray[np.uint64]] = []
    writer: pa.ipc.RecordBatchFileWriter | None = None
    try:
        for batch in stream_rows(source, manifest, *rows):
            index.add(batch.vectors)
            documents = batch.documents.replace_schema_metadata(None)
            if writer is None:
                schema = documents.schema
                writer = pa.ipc.new_file(str(documents_path), schema)
            # Files may infer a column differently (int in one, float in the next); the first one decides.
            writer.write_table(documents.cast(schema))
            hashes.append(hash_ids(batch.documents["id"].to_pylist()))
    finally:
        if writer is not None:
            writer.close()
    return np.concatenate(hashes)


def _finished(target: Location) -> tuple[ShardEntry, NDArray[np.uint64]]:
    entry = ShardEntry(**json.loads((target / SHARD_NAME).read_bytes()))
    with (target / DOCUMENTS_NAME).open_read() as stream:
        reader = pa.ipc.open_file(stream)
        parts = [
            hash_ids(reader.get_batch(n).column("id").to_pylist()) for n in range(reader.num_record_batches)
        ]
    return entry, np.concatenate(parts)


def _scratch(target: Location) -> str | None:
    """Beside the target where that is local, so that a finished file gets its name by a rename."""
    if not target.is_local:
        return None
    os.makedirs(target.path, exist_ok=True)
    return target.path
