"""`raytower index build`: embeddings into a new version, published only when it is whole."""

from __future__ import annotations

import json
import os
import socket
import time
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray

from raytower.encoding.manifest import EmbeddingsManifest
from raytower.errors import InputError, RaytowerError, find_cause
from raytower.index.config import IndexBuildConfig
from raytower.index.manifest import (
    CURRENT_NAME,
    MANIFEST_NAME,
    IndexManifest,
    ShardEntry,
    current_version,
    publish,
    version_folder,
)
from raytower.index.measure import MeasuredRecall, measure_recall
from raytower.index.plan import IndexPlan, plan_index
from raytower.index.reader import Index, default_cache_dir
from raytower.index.search import Shard
from raytower.index.shard_build import build_shard, hash_ids, shard_name, train_quantiser
from raytower.index.vectors import stream_rows
from raytower.runtime import ensure_ray, log
from raytower.storage import Location, absolute_if_local

BUILD_NAME = "build.json"


def build_index(config: IndexBuildConfig) -> dict[str, Any]:
    """Build, measure and publish a version; shards that a killed run of the same build finished are kept.

    Returns:
        version, kind, shards, rows, recall, search_parameters, seconds, output.

    Raises:
        FormatError: damaged or unfinished embeddings. InputError: NaN or zero vectors, duplicate ids, more shards
        than rows, a kind that does not fit the memory. RaytowerError: a task failed.
    """
    started = time.perf_counter()
    embeddings = EmbeddingsManifest.read(Location.of(config.embeddings))
    plan = _plan(config, embeddings)
    log(f"index plan: {plan.kind}, {plan.shards} shards; {plan.reason}")
    output = Location.of(config.output)
    version, folder = _claim_version(output, config, plan, embeddings)
    ensure_ray()
    try:
        entries, hashes = _build_shards(config, plan, folder)
        _refuse_duplicates(config, embeddings, hashes)
        draft = _draft_manifest(config, embeddings, plan, version, output, entries)
        measured = _measure(config, draft, folder)
    except Exception as error:
        cause = find_cause(error)
        if isinstance(cause, RaytowerError):
            raise cause from error
        raise RaytowerError(f"building {folder} failed: {error}") from error
    if not measured.reached:
        log(
            f"recall@{config.target.k} stays at {measured.recall:.4f}, below target.recall {config.target.recall}"
        )
    manifest = replace(
        draft,
        recall=measured.recall,
        recall_target_reached=measured.reached,
        recall_curve=measured.curve,
        search_parameters=measured.search_parameters,
    )
    manifest.write(folder)
    publish(output, version)
    return {
        "version": version,
        "kind": plan.kind,
        "shards": plan.shards,
        "rows": plan.rows,
        "recall": round(measured.recall, 5),
        "recall_target_reached": measured.reached,
        "search_parameters": measured.search_parameters,
        "seconds": round(time.perf_counter() - started, 3),
        "output": config.output,
    }


def plan_build(config: IndexBuildConfig) -> dict[str, Any]:
    """The plan for --dry-run: kind and why, shards, parameters, predicted memory and disk."""
    plan = _plan(config, EmbeddingsManifest.read(Location.of(config.embeddings)))
    return {**{key: value for key, value in asdict(plan).items() if key != "ranges"}, "shards": plan.shards}


def _plan(config: IndexBuildConfig, embeddings: EmbeddingsManifest) -> IndexPlan:
    vector_bytes = embeddings.rows * embeddings.dim * (4 if embeddings.dtype == "float32" else 2)
    return plan_index(
        rows=embeddings.rows,
        dim=embeddings.dim,
        kind=config.kind,
        shards=config.shards,
        memory_bytes=int(config.target.memory),
        num_workers=config.workers.max,
        text_bytes=max(sum(item.bytes for item in embeddings.files) - vector_bytes, 0),
    )


def _claim_version(
    output: Location, config: IndexBuildConfig, plan: IndexPlan, embeddings: EmbeddingsManifest
) -> tuple[str, Location]:
    """A version of our own: an unfinished one of a dead builder of the same build, or the next free number.

    Creating the folder is the claim: of two builders at once only one succeeds in making it.
    """
    spec = json.loads(
        json.dumps(
            {
                "fingerprint": embeddings.fingerprint,
                "files": [item.sha256 for item in embeddings.files],
                "kind": plan.kind,
                "parameters": plan.parameters,
                "ranges": plan.ranges,
                "seed": config.seed,
            }
        )
    )
    owner = {"host": socket.gethostname(), "pid": os.getpid()}
    versions = [place.name for place in (output / "versions").children()]
    for name in versions:
        folder = version_folder(output, name)
        if (folder / MANIFEST_NAME).exists() or not (folder / BUILD_NAME).exists():
            continue
        found = (folder / BUILD_NAME).read_json()
        if found["spec"] == spec and _is_dead(found["owner"]):
            log(f"continuing the unfinished version {name}")
            (folder / BUILD_NAME).write_json({"spec": spec, "owner": owner})
            return name, folder
    number = max((int(name[1:]) for name in versions if name[1:].isdigit()), default=0) + 1
    while True:
        name = f"v{number:06d}"
        folder = version_folder(output, name)
        if _create_exclusively(folder):
            (folder / BUILD_NAME).write_json({"spec": spec, "owner": owner})
            return name, folder
        number += 1


def _create_exclusively(folder: Location) -> bool:
    folder.parent.make_dir()
    if not folder.is_local:
        # Object stores have no exclusive mkdir; the window between asking and writing is documented, not closed.
        return not folder.exists()
    try:
        os.mkdir(folder.path)
    except FileExistsError:
        return False
    return True


def _is_dead(owner: dict[str, Any]) -> bool:
    if owner["host"] != socket.gethostname():
        return False
    if owner["pid"] == os.getpid():
        return True
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def _build_shards(
    config: IndexBuildConfig, plan: IndexPlan, folder: Location
) -> tuple[list[ShardEntry], list[NDArray[np.uint64]]]:
    workers = config.workers
    threads = max(int(workers.num_cpus), 1)
    options: dict[str, Any] = {"num_cpus": workers.num_cpus, "num_gpus": workers.num_gpus or None}
    embeddings = absolute_if_local(config.embeddings)
    trained: Any = None
    if plan.train_rows:
        trained = ray.remote(**options)(train_quantiser).remote(embeddings, plan, config.seed, threads)
    task = ray.remote(**options)(build_shard)
    results: dict[int, tuple[ShardEntry, NDArray[np.uint64]]] = {}
    waiting = list(range(plan.shards))
    running: dict[ray.ObjectRef[Any], int] = {}
    while waiting or running:
        while waiting and len(running) < workers.max:
            number = waiting.pop(0)
            uri = folder.path if folder.is_local else str(folder)
            running[task.remote(embeddings, uri, number, plan, trained, threads)] = number
        finished, _ = ray.wait(list(running), num_returns=1)
        number = running.pop(finished[0])
        results[number] = ray.get(finished[0])
        log(f"built {shard_name(number)}: {results[number][0].rows:,} rows")
    ordered = [results[number] for number in range(plan.shards)]
    return [entry for entry, _ in ordered], [hashes for _, hashes in ordered]


def _refuse_duplicates(
    config: IndexBuildConfig, embeddings: EmbeddingsManifest, hashes: list[NDArray[np.uint64]]
) -> None:
    """Raises InputError naming a duplicate id. Equal hashes are looked up as text before anything is refused."""
    values, counts = np.unique(np.concatenate(hashes), return_counts=True)
    suspects = set(values[counts > 1].tolist())
    if not suspects:
        return
    seen: dict[str, int] = {}
    for batch in stream_rows(Location.of(config.embeddings), embeddings, 0, embeddings.rows):
        ids = batch.documents["id"].to_pylist()
        for row, (name, value) in enumerate(
            zip(ids, hash_ids(ids).tolist(), strict=True), start=batch.first_row
        ):
            if value in suspects:
                if name in seen:
                    raise InputError(
                        f"id {name!r} stands in rows {seen[name]} and {row} of {config.embeddings!r}; "
                        "ids must be unique, so give the corpus unique ids and encode it again"
                    )
                seen[name] = row


def _draft_manifest(
    config: IndexBuildConfig,
    embeddings: EmbeddingsManifest,
    plan: IndexPlan,
    version: str,
    output: Location,
    entries: list[ShardEntry],
) -> IndexManifest:
    return IndexManifest(
        version=version,
        parent=current_version(output) if (output / CURRENT_NAME).exists() else None,
        fingerprint=embeddings.fingerprint,
        encoder=embeddings.encoder,
        metric="cosine" if embeddings.similarity == "cosine" else "inner_product",
        dim=plan.dim,
        kind=plan.kind,
        parameters=plan.parameters,
        rows=plan.rows,
        shards=tuple(entries),
        prefix=embeddings.prefix,
        query_prefix=embeddings.query_prefix,
        max_length=embeddings.max_length,
        recall=0.0,
        recall_k=config.target.k,
        recall_target=config.target.recall,
        recall_target_reached=False,
        recall_curve=(),
        search_parameters={},
    )


def _measure(config: IndexBuildConfig, draft: IndexManifest, folder: Location) -> MeasuredRecall:
    threads = max(int(config.workers.num_cpus * config.workers.max), 1)

    embeddings = absolute_if_local(config.embeddings)

    def measure() -> MeasuredRecall:
        cache = default_cache_dir()
        shards = [Shard.open(folder, number, draft, cache) for number in range(len(draft.shards))]
        return measure_recall(
            embeddings,
            Index(draft, shards),
            target=config.target.recall,
            k=config.target.k,
            seed=config.seed,
            num_threads=threads,
        )

    return ray.get(ray.remote(num_cpus=config.workers.num_cpus)(measure).remote())
