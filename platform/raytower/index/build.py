"""`raytower index build`: embeddings into a new version, published only when it is whole.

The steps: check the embeddings, claim a version, place rows by cluster where asked, train on a sample, build shards,
measure recall, write the manifest, publish. Each step runs as Ray tasks that stream; the driver holds 8 bytes a row,
to find duplicate ids. Compaction takes the same way, with the rows of a version in place of embeddings.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from numpy.typing import NDArray

from raytower.encoding.manifest import EmbeddingsManifest
from raytower.errors import FormatError
from raytower.index.config import IndexBuildConfig, IndexWorkersConfig, Placing, TargetConfig
from raytower.index.faiss_import import import_faiss
from raytower.index.faiss_index import GPU_LISTS
from raytower.index.kinds import Vectors, parameter_grid
from raytower.index.manifest import (
    FORMAT_VERSION,
    IndexManifest,
    Operation,
    PlacementEntry,
    ShardEntry,
)
from raytower.index.measure import MeasuredRecall, exact_hits, hold_out, measure_recall, merge_exact
from raytower.index.place import place_source, remove_placed
from raytower.index.plan import IndexPlan, human_bytes, plan_index
from raytower.index.reader import Index
from raytower.index.search import unified_schema
from raytower.index.shard_build import ShardTask, build_shard, finished_shard, shard_name, train_template
from raytower.index.source import EmbeddingsSource, VectorSource
from raytower.index.tasks import run_tasks, threads_of_lone_task
from raytower.index.vectors import check_file, refuse_duplicate_ids
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


@dataclass(frozen=True, kw_only=True)
class Build:
    """What a new version is built from, and how."""

    source: VectorSource
    output: Location
    plan: IndexPlan
    target: TargetConfig
    workers: IndexWorkersConfig
    placing: Placing
    seed: int
    operation: Operation
    parent: str | None
    check: Callable[[], pa.Schema]
    """Checks the rows before anything is built; returns the schema of the documents."""

    @property
    def spec(self) -> dict[str, Any]:
        """What shards are built from; two builds with the same spec may share finished shards."""
        plan = self.plan
        return {
            "format_version": FORMAT_VERSION,
            "operation": self.operation,
            "parent": self.parent,
            **asdict(self.source.origin),
            "rows": self.source.identity(),
            "kind": plan.kind,
            "parameters": plan.parameters,
            "exact_dtype": plan.exact_dtype,
            "ranges": [list(bounds) for bounds in plan.ranges],
            "placing": self.placing,
            "train_rows": plan.train_rows,
            "seed": self.seed,
        }


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
    source = EmbeddingsSource(Location.of(config.embeddings))
    build = Build(
        source=source,
        output=Location.of(config.output),
        plan=_plan(config, source),
        target=config.target,
        workers=config.workers,
        placing=config.placement,
        seed=config.seed,
        operation="build",
        parent=None,
        check=lambda: check_embeddings(source, config.workers),
    )
    manifest = make_version(build)
    if published_version(build.output) != manifest.version:
        publish(build.output, manifest.version)
    return figures(manifest, started, config.output)


def plan_build(config: IndexBuildConfig) -> dict[str, Any]:
    """The plan for --dry-run: kind and why, shards, parameters, predicted memory and disk.

    Raises:
        FormatError, InputError: unfinished embeddings, or what does not fit.
    """
    plan = _plan(config, EmbeddingsSource(Location.of(config.embeddings)))
    return {"shards": plan.shards, **asdict(plan)}


def make_version(build: Build) -> IndexManifest:
    """A finished version of this build: one that is there already, or a new one, not yet published."""
    plan, output = build.plan, build.output
    log(
        f"index plan: {plan.kind}, {plan.shards} shards, {human_bytes(plan.predicted_search_memory_bytes)} to search, "
        f"{human_bytes(plan.predicted_build_memory_bytes_per_task)} a build task, about "
        f"{plan.predicted_build_seconds:.0f} s; {plan.reason}"
    )
    spec = build.spec
    manifest = _reusable(build, spec)
    if manifest is None:
        ensure_ray(build.workers.num_cpus)
        schema = build.check()
        with claim_version(output, spec) as version:
            manifest = _build_version(build, version, schema, spec_sha256(spec))
            manifest.write(version_folder(output, version))
    if not manifest.recall_target_reached:
        log(
            f"recall@{manifest.recall_k} is {manifest.recall:.4f} at {manifest.search_parameters}, below target.recall "
            f"{manifest.recall_target}; another kind may reach it"
        )
    return manifest


def check_embeddings(source: EmbeddingsSource, workers: IndexWorkersConfig) -> pa.Schema:
    """Check every file and the ids of all, by Ray tasks; returns the schema of the documents.

    Raises:
        FormatError, InputError: what `check_file` and `refuse_duplicate_ids` raise.
    """
    embeddings: EmbeddingsManifest = source.manifest
    calls = [(source.folder, embeddings, number) for number in range(len(embeddings.files))]
    checked = run_tasks(check_file, calls, workers)
    refuse_duplicate_ids(source.folder, embeddings, [item.id_hashes for item in checked])
    return unified_schema([item.documents_schema for item in checked])


def build_shards(
    tasks: list[ShardTask], template: Callable[[], Any], workers: IndexWorkersConfig, at_once: int
) -> tuple[ShardEntry, ...]:
    """Shards by Ray tasks; those that an earlier run of the same build finished are kept.

    `template` gives the trained empty index, and is asked only where a shard is missing.
    """
    kept = [finished_shard(task.version, task.number, task.spec_sha256) for task in tasks]
    missing = [task for task, entry in zip(tasks, kept, strict=True) if entry is None]
    if len(missing) < len(tasks):
        log(f"{len(tasks) - len(missing)} of {len(tasks)} shards are finished already")
    built: list[ShardEntry] = []
    if missing:
        # Put into the object store once, not once a task.
        reference = ray.put(template())
        calls = [(task, reference) for task in missing]
        built = run_tasks(
            build_shard,
            calls,
            workers,
            at_once=at_once,
            num_gpus=max(task.num_gpus for task in missing),
            progress="built {} of {} shards",
        )
    entries = {entry.name: entry for entry in [*kept, *built] if entry is not None}
    return tuple(entries[shard_name(task.number)] for task in tasks)


def figures(manifest: IndexManifest, started: float, output: str) -> dict[str, Any]:
    """The JSON line of a job that ended with this version; `started` by `time.perf_counter`."""
    return {
        "version": manifest.version,
        "kind": manifest.kind,
        "shards": len(manifest.shards),
        "rows": manifest.rows,
        "recall": round(manifest.recall, 5),
        "recall_target_reached": manifest.recall_target_reached,
        "search_parameters": manifest.search_parameters,
        "seconds": round(time.perf_counter() - started, 3),
        "output": output,
    }


def _plan(config: IndexBuildConfig, source: EmbeddingsSource) -> IndexPlan:
    return plan_index(
        rows=source.rows,
        dim=source.origin.dim,
        kind=config.kind,
        shards=config.shards,
        recall=config.target.recall,
        memory_bytes=int(config.target.memory),
        latency_ms=config.target.latency_ms,
        num_workers=config.workers.max,
        threads_per_task=config.workers.num_threads,
        text_bytes=source.text_bytes,
        rescore=config.rescore,
        vector_dtype=source.dtype,
        hnsw=config.hnsw,
        ivf=config.ivf,
    )


def _reusable(build: Build, spec: dict[str, Any]) -> IndexManifest | None:
    manifest = finished_build(build.output, spec, build.target.recall, build.target.k)
    if manifest is None:
        return None
    try:
        Index.of_manifest(manifest, version_folder(build.output, manifest.version))
    except FormatError as error:
        log(f"version {manifest.version} is damaged and is built again: {error}")
        return None
    log(f"version {manifest.version} of {build.output} is this build, finished; nothing to build")
    return manifest


def _build_version(build: Build, version: str, schema: pa.Schema, digest: str) -> IndexManifest:
    folder = version_folder(build.output, version)
    source, plan, placement = build.source, build.plan, None
    if build.placing == "cluster" and plan.shards > 1:
        source, ranges, file = place_source(source, schema, plan.shards, folder, build.workers, build.seed)
        plan = dataclasses.replace(plan, ranges=ranges)
        placement = PlacementEntry(version=version, shards=len(ranges), file=file)
    workers = build.workers
    tasks = [
        ShardTask(
            source=source,
            version=folder,
            number=number,
            start=start,
            end=end,
            kind=plan.kind,
            exact_dtype=plan.exact_dtype,
            documents_schema=schema,
            spec_sha256=digest,
            num_threads=workers.num_threads,
            num_gpus=workers.num_gpus if plan.kind in GPU_LISTS else 0,
        )
        for number, (start, end) in enumerate(plan.ranges)
    ]

    def template() -> Any:
        call = (source, plan, build.seed, threads_of_lone_task(workers))
        return run_tasks(train_template, [call], workers, num_gpus=workers.num_gpus)[0]

    draft = IndexManifest(
        **asdict(build.source.origin),
        version=version,
        parent=build.parent,
        operation=build.operation,
        kind=plan.kind,
        kind_reason=plan.reason,
        parameters=plan.parameters,
        exact_dtype=plan.exact_dtype,
        placement=placement,
        rows=plan.rows,
        shards=build_shards(tasks, template, workers, plan.tasks_at_once),
        spec_sha256=digest,
        recall_k=build.target.k,
        recall_target=build.target.recall,
        recall_version=version,
    )
    measured = _measure(build, source, plan, draft)
    remove_placed(folder)
    return dataclasses.replace(
        draft,
        recall=measured.recall,
        recall_queries=measured.num_queries,
        recall_target_reached=measured.reached,
        recall_curve=measured.curve,
        placement_curve=measured.placement_curve,
        search_parameters=measured.search_parameters,
    )


def _measure(build: Build, source: VectorSource, plan: IndexPlan, manifest: IndexManifest) -> MeasuredRecall:
    workers, target = build.workers, build.target
    folder = version_folder(build.output, manifest.version)
    queries = run_tasks(hold_out, [(source, build.seed)], workers)[0]
    calls = [(source, *bounds, queries, target.k) for bounds in plan.ranges]
    parts = run_tasks(exact_hits, calls, workers)
    num_threads = threads_of_lone_task(workers)

    def measure() -> MeasuredRecall:
        import_faiss().omp_set_num_threads(num_threads)
        index = Index.of_manifest(manifest, folder, verify="none")
        starts = np.cumsum([0, *(entry.rows for entry in manifest.shards)])
        k = max(min(target.k, manifest.rows - 1), 1)

        def search(vectors: Vectors, k: int, parameters: Mapping[str, int]) -> NDArray[np.int64]:
            hits = index.search(vectors, k, search_parameters=parameters)
            return np.where(hits.shards < 0, -1, starts[hits.shards] + hits.rows)

        def vectors(rows: NDArray[np.int64]) -> Vectors:
            shards = np.searchsorted(starts, rows, side="right") - 1
            return np.concatenate(
                [
                    index.shards[n].vectors(rows[place : place + 1] - starts[n])
                    for place, n in enumerate(shards)
                ]
            )

        def grid(k: int) -> list[dict[str, int]]:
            return parameter_grid(
                manifest.kind,
                manifest.parameters,
                manifest.rows,
                k,
                rescored=manifest.exact_dtype is not None,
                shards=1 if manifest.placement else len(manifest.shards),
            )

        return measure_recall(
            search,
            queries,
            merge_exact(parts, target.k),
            [k],
            target=target.recall,
            grid=grid,
            placed_shards=manifest.placement.shards if manifest.placement else None,
            vectors=vectors if index.shards[0].has_vectors else None,
        )[k]

    return run_tasks(measure, [()], workers)[0]
