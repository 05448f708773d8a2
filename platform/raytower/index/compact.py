"""`raytower index compact`: added and deleted rows folded into a new build, from what the shards themselves hold."""

from __future__ import annotations

import time
from typing import Any, Literal

from pydantic import Field

from raytower.config import ByteSize, Config
from raytower.errors import InputError
from raytower.index.build import Build, figures, make_version
from raytower.index.config import IndexKind, IndexWorkersConfig, Placing, TargetConfig
from raytower.index.manifest import IndexManifest
from raytower.index.plan import IndexPlan, plan_index
from raytower.index.reader import open_manifest
from raytower.index.source import VersionSource
from raytower.index.stored import WHOLE_VECTOR_KINDS
from raytower.index.versions import publish
from raytower.runtime import log
from raytower.storage import Location


class IndexCompactConfig(Config):
    """`raytower index compact`. `kind`, `placement`, `recall` and `recall_k` null are the published version's own."""

    index: str
    kind: IndexKind | None = None
    shards: Literal["auto"] | int = "auto"
    placement: Placing | None = None
    recall: float | None = Field(default=None, gt=0, le=1)
    recall_k: int | None = Field(default=None, ge=1)
    memory: ByteSize = ByteSize(8 * 2**30)
    workers: IndexWorkersConfig = IndexWorkersConfig()
    seed: int = Field(default=0, ge=0)


def compact_index(config: IndexCompactConfig) -> dict[str, Any]:
    """Build the live rows of the published version anew and publish that; it equals a fresh build over those rows.

    Does nothing where nothing was added or deleted and no other kind is asked for.

    Returns:
        what `index build` returns, and compacted, shards_before, deleted_before.

    Raises:
        InputError: a shard keeps codes only, so that its vectors cannot be had; what does not fit. FormatError: damaged
        files. RaytowerError: another version was published meanwhile.
    """
    started = time.perf_counter()
    index = Location.of(config.index)
    parent, _ = open_manifest(index)
    before = {"shards_before": len(parent.shards), "deleted_before": parent.deleted_rows}
    if not _needs_compaction(config, parent):
        log(f"version {parent.version} of {index} holds no added or deleted rows; nothing to compact")
        return {**figures(parent, started, config.index), **before, "compacted": False}
    source, plan = _plan(config, index, parent)
    manifest = make_version(
        Build(
            source=source,
            output=index,
            plan=plan,
            target=_target(config, parent),
            workers=config.workers,
            placing=_placing(config, parent),
            seed=config.seed,
            operation="compact",
            parent=parent.version,
            check=lambda: source.opened.documents_schema,
        )
    )
    publish(index, manifest.version, instead_of=parent.version)
    return {**figures(manifest, started, config.index), **before, "compacted": True}


def plan_compact(config: IndexCompactConfig) -> dict[str, Any]:
    """The plan for --dry-run. Raises as `compact_index`."""
    index = Location.of(config.index)
    parent, _ = open_manifest(index)
    if not _needs_compaction(config, parent):
        return {"parent": parent.version, "compacted": False}
    _, plan = _plan(config, index, parent)
    return {
        "parent": parent.version,
        "compacted": True,
        "rows": plan.rows,
        "kind": plan.kind,
        "shards": plan.shards,
        "predicted_build_memory_bytes_per_task": plan.predicted_build_memory_bytes_per_task,
        "predicted_disk_bytes": plan.predicted_disk_bytes,
    }


def _needs_compaction(config: IndexCompactConfig, parent: IndexManifest) -> bool:
    changed = parent.deleted_rows > 0 or parent.operation in ("add", "delete")
    other_kind = config.kind not in (None, parent.kind)
    return changed or other_kind or _placing(config, parent) != _placed(parent) or config.shards != "auto"


def _plan(
    config: IndexCompactConfig, index: Location, parent: IndexManifest
) -> tuple[VersionSource, IndexPlan]:
    for entry in parent.shards:
        if entry.kind not in WHOLE_VECTOR_KINDS and "exact.npy" not in entry.files:
            raise InputError(
                f"index version {parent.version} is of kind {entry.kind} without exact vectors, so it cannot be built "
                "anew from itself; build it from its embeddings, with rescore: true"
            )
    source = VersionSource(index, parent.version)
    plan = plan_index(
        rows=parent.rows,
        dim=parent.dim,
        kind=config.kind or parent.kind,
        shards=config.shards,
        recall=_target(config, parent).recall,
        memory_bytes=int(config.memory),
        num_workers=config.workers.max,
        text_bytes=source.text_bytes,
        rescore="auto" if config.kind not in (None, parent.kind) else parent.exact_dtype is not None,
        vector_dtype=source.dtype,
    )
    return source, plan


def _target(config: IndexCompactConfig, parent: IndexManifest) -> TargetConfig:
    return TargetConfig(
        recall=config.recall or parent.recall_target,
        k=config.recall_k or parent.recall_k,
        memory=config.memory,
    )


def _placed(parent: IndexManifest) -> Placing:
    return "rows" if parent.placement is None else "cluster"


def _placing(config: IndexCompactConfig, parent: IndexManifest) -> Placing:
    return config.placement or _placed(parent)
