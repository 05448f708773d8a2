"""`raytower index build`: embeddings into a new version, published only when it is whole.

The steps: check the embeddings, claim a version, train on a sample, build shards, measure recall, write the manifest,
publish. Each step runs as Ray tasks that stream; the driver holds 8 bytes a row, to find duplicate ids.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any, TypeVar

import pyarrow as pa
import ray

from raytower.encoding.manifest import EmbeddingsManifest
from raytower.errors import FormatError, RaytowerError, find_cause
from raytower.index.config import IndexBuildConfig, IndexWorkersConfig
from raytower.index.manifest import FORMAT_VERSION, IndexManifest, ShardEntry
from raytower.index.measure import MeasuredRecall, exact_hits, hold_out, measure_recall, merge_exact
from raytower.index.plan import IndexPlan, human_bytes, plan_index
from raytower.index.reader import Index
from raytower.index.shard_build import ShardTask, build_shard, finished_shard, shard_name, train_template
from raytower.index.vectors import check_file, metric_of, refuse_duplicate_ids
from raytower.index.versions import (
    claim_version,
    finished_build,
    publish,
    published_version,
    spec_sha256,
    version_folder,
)
from raytower.runtime import ensure_ray, log
from raytower.storage import Location

ResultT = TypeVar("ResultT")


def build_index(config: IndexBuildConfig) -> dict[str, Any]:
    """Build, measure and publish a version.

    Shards that a killed run of the same build finished are kept; a build that is finished already is only published.

    Returns:
        version, kind, shards, rows, recall, recall_target_reached, search_parameters, seconds, output.

    Raises:
        FormatError: damaged or unfinished embeddings. InputError: NaN or zero vectors, duplicate ids, more shards
        than rows, a kind that does not fit the memory. RaytowerError: a task failed.
    """
    started = time.perf_counter()
    source = Location.of(config.embeddings)
    embeddings = EmbeddingsManifest.read(source)
    plan = _plan(config, embeddings)
    log(
        f"index plan: {plan.kind}, {plan.shards} shards, {human_bytes(plan.predicted_search_memory_bytes)} to search, "
        f"{human_bytes(plan.predicted_build_memory_bytes_per_task)} a build task; {plan.reason}"
    )
    output = Location.of(config.output)
    spec = _spec(config, embeddings, plan)
    manifest = _reusable(output, spec, config)
    if manifest is None:
        ensure_ray(config.workers.num_cpus)
        schema = _check_embeddings(source, embeddings, config.workers)
        with claim_version(output, spec) as version:
            manifest = _build_version(config, embeddings, plan, version, schema, spec)
            manifest.write(version_folder(output, version))
    if not manifest.recall_target_reached:
        log(
            f"recall@{manifest.recall_k} is {manifest.recall:.4f} at {manifest.search_parameters}, below target.recall "
            f"{manifest.recall_target}; another kind may reach it"
        )
    if published_version(output) != manifest.version:
        publish(output, manifest.version)
    return {
        "version": manifest.version,
        "kind": manifest.kind,
        "shards": len(manifest.shards),
        "rows": manifest.rows,
        "recall": round(manifest.recall, 5),
        "recall_target_reached": manifest.recall_target_reached,
        "search_parameters": manifest.search_parameters,
        "seconds": round(time.perf_counter() - started, 3),
        "output": config.output,
    }


def plan_build(config: IndexBuildConfig) -> dict[str, Any]:
    """The plan for --dry-run: kind and why, shards, parameters, predicted memory and disk.

    Raises:
        FormatError, InputError: unfinished embeddings, or what does not fit.
    """
    plan = _plan(config, EmbeddingsManifest.read(Location.of(config.embeddings)))
    return {"shards": plan.shards, **asdict(plan)}


def _plan(config: IndexBuildConfig, embeddings: EmbeddingsManifest) -> IndexPlan:
    vector_bytes = embeddings.rows * embeddings.dim * (4 if embeddings.dtype == "float32" else 2)
    return plan_index(
        rows=embeddings.rows,
        dim=embeddings.dim,
        kind=config.kind,
        shards=config.shards,
        recall=config.target.recall,
        memory_bytes=int(config.target.memory),
        num_workers=config.workers.max,
        text_bytes=max(sum(item.bytes for item in embeddings.files) - vector_bytes, 0),
    )


def _spec(config: IndexBuildConfig, embeddings: EmbeddingsManifest, plan: IndexPlan) -> dict[str, Any]:
    """What shards are built from; two builds with the same spec may share finished shards."""
    return {
        "format_version": FORMAT_VERSION,
        "fingerprint": embeddings.fingerprint,
        "files": [[item.name, item.rows, item.sha256] for item in embeddings.files],
        "dim": plan.dim,
        "metric": metric_of(embeddings),
        "kind": plan.kind,
        "parameters": plan.parameters,
        "ranges": [list(bounds) for bounds in plan.ranges],
        "train_rows": plan.train_rows,
        "seed": config.seed,
    }


def _reusable(output: Location, spec: dict[str, Any], config: IndexBuildConfig) -> IndexManifest | None:
    manifest = finished_build(output, spec, config.target.recall, config.target.k)
    if manifest is None:
        return None
    try:
        Index.of_manifest(manifest, version_folder(output, manifest.version))
    except FormatError as error:
        log(f"version {manifest.version} is damaged and is built again: {error}")
        return None
    log(f"version {manifest.version} of {output} is this build, finished; nothing to build")
    return manifest


def _check_embeddings(
    source: Location, embeddings: EmbeddingsManifest, workers: IndexWorkersConfig
) -> pa.Schema:
    """Check every file and the ids of all; returns the schema of the documents."""
    calls = [(source, embeddings, number) for number in range(len(embeddings.files))]
    checked = _run_tasks(check_file, calls, workers, workers.max)
    refuse_duplicate_ids(source, embeddings, [item.id_hashes for item in checked])
    schemas = [item.documents_schema for item in checked]
    try:
        # A file may infer a column as null or int where another has text or float.
        return pa.unify_schemas(schemas, promote_options="permissive")
    except pa.ArrowTypeError as error:
        raise FormatError(f"the files of {source} do not agree on their columns: {error}") from error


def _build_version(
    config: IndexBuildConfig,
    embeddings: EmbeddingsManifest,
    plan: IndexPlan,
    version: str,
    schema: pa.Schema,
    spec: dict[str, Any],
) -> IndexManifest:
    output, digest = Location.of(config.output), spec_sha256(spec)
    entries = _build_shards(config, plan, version_folder(output, version), schema, digest)
    draft = IndexManifest(
        version=version,
        parent=None,
        fingerprint=embeddings.fingerprint,
        encoder=embeddings.encoder,
        metric=metric_of(embeddings),
        dim=plan.dim,
        kind=plan.kind,
        kind_reason=plan.reason,
        parameters=plan.parameters,
        rows=plan.rows,
        shards=tuple(entries),
        prefix=embeddings.prefix,
        query_prefix=embeddings.query_prefix,
        max_length=embeddings.max_length,
        spec_sha256=digest,
        recall_k=config.target.k,
        recall_target=config.target.recall,
        search_parameters={},
    )
    measured = _measure(config, plan, draft)
    return replace(
        draft,
        recall=measured.recall,
        recall_queries=measured.num_queries,
        recall_target_reached=measured.reached,
        recall_curve=measured.curve,
        search_parameters=measured.search_parameters,
    )


def _build_shards(
    config: IndexBuildConfig, plan: IndexPlan, folder: Location, schema: pa.Schema, digest: str
) -> list[ShardEntry]:
    source, workers = Location.of(config.embeddings), config.workers
    kept = [finished_shard(folder, number, digest) for number in range(plan.shards)]
    missing = [number for number, entry in enumerate(kept) if entry is None]
    if len(missing) < plan.shards:
        log(f"continuing {folder}: {plan.shards - len(missing)} of {plan.shards} shards are finished already")
    built: list[ShardEntry] = []
    if missing:
        train = [(source, plan, config.seed, workers.num_threads)]
        # Put into the object store once, not once a task.
        template = ray.put(_run_tasks(train_template, train, workers, 1)[0])
        calls = [
            (
                ShardTask(
                    embeddings=source,
                    version=folder,
                    number=number,
                    plan=plan,
                    documents_schema=schema,
                    spec_sha256=digest,
                    num_threads=workers.num_threads,
                ),
                template,
            )
            for number in missing
        ]
        built = _run_tasks(build_shard, calls, workers, plan.tasks_at_once, "built {} of {} shards")
    entries = {entry.name: entry for entry in [*kept, *built] if entry is not None}
    return [entries[shard_name(number)] for number in range(plan.shards)]


def _measure(config: IndexBuildConfig, plan: IndexPlan, manifest: IndexManifest) -> MeasuredRecall:
    source, workers = Location.of(config.embeddings), config.workers
    folder = version_folder(Location.of(config.output), manifest.version)
    queries = _run_tasks(hold_out, [(source, config.seed)], workers, 1)[0]
    calls = [(source, *bounds, queries, config.target.k) for bounds in plan.ranges]
    parts = _run_tasks(exact_hits, calls, workers, workers.max)

    def measure() -> MeasuredRecall:
        return measure_recall(
            Index.of_manifest(manifest, folder, verify="none"),
            queries,
            merge_exact(parts, config.target.k),
            target=config.target.recall,
            num_threads=workers.num_threads,
        )

    return _run_tasks(measure, [()], workers, 1)[0]


def _run_tasks(
    function: Callable[..., ResultT],
    calls: Sequence[tuple[Any, ...]],
    workers: IndexWorkersConfig,
    at_once: int,
    progress: str | None = None,
) -> list[ResultT]:
    """Results of `function` over `calls`, in order, with at most `at_once` Ray tasks running.

    Raises:
        RaytowerError: the first failure, as the task raised it where that was meant for the user.
    """
    task = ray.remote(num_cpus=workers.num_cpus, num_gpus=workers.num_gpus)(function)
    waiting = list(enumerate(calls))
    running: dict[ray.ObjectRef[Any], int] = {}
    results: dict[int, ResultT] = {}
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                number, arguments = waiting.pop(0)
                running[task.remote(*arguments)] = number
            finished, _ = ray.wait(list(running), num_returns=1)
            number = running.pop(finished[0])
            results[number] = ray.get(finished[0])
            if progress:
                log(progress.format(len(results), len(calls)))
    except Exception as error:
        for reference in running:
            ray.cancel(reference, force=True)
        cause = find_cause(error)
        if isinstance(cause, RaytowerError):
            raise cause from None
        raise RaytowerError(f"a task of the index build failed: {cause}") from error
    return [results[number] for number in range(len(calls))]
