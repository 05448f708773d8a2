"""`raytower index compact`: every document into new shards, on an index that may change meanwhile."""

from __future__ import annotations

import time
from typing import Any

from raytower.index.build import (
    NLIST_SET,
    ShardPlan,
    build_shards,
    figures,
    lexical_entry,
    measured,
    refuse_missed_target,
    settings_of,
)
from raytower.index.config import IndexCompactConfig, Placing, TokensConfig
from raytower.index.fold import folded
from raytower.index.manifest import FORMAT_VERSION, IndexManifest, LexicalEntry, ShardEntry
from raytower.index.plan import IndexPlan, IndexRequest
from raytower.index.shard import shard_rows
from raytower.index.shard_build import digest_of
from raytower.index.table import DocumentTable
from raytower.index.target_queries import kept_queries
from raytower.index.tasks import Run, on_ray
from raytower.index.versions import Writer, changing, following, open_manifest, publish
from raytower.progress import log
from raytower.storage import Location


def compact_index(config: IndexCompactConfig, run: Run | None = None) -> dict[str, Any]:
    """Build shards over all documents anew and publish them; what is published meanwhile is carried over.

    Does nothing where nothing changed since the shards were built and nothing else is asked for.

    Returns:
        what `index build` returns, and compacted, shards_before.

    Raises:
        InputError: what does not fit, a target that is missed under on_target_missed keep, bad target.queries.
        FormatError: damaged files. RaytowerError: a task failed.
    """
    started = time.perf_counter()
    index = Location.of(config.index)
    before = open_manifest(index)
    shown = {"shards_before": len(before.shards)}
    target = config.target
    queries = None if target.queries is None else kept_queries(index, before.origin, target.queries)
    if not _needs_compaction(config, before) and queries in (None, before.queries):
        log(
            f"version {before.version} of {index} has no changes since its shards were built; nothing to compact"
        )
        return {**figures(before, started, config.index), **shown, "compacted": False}
    run = run or on_ray(config.workers, index)
    if not _needs_shards(config, before) and queries in (None, before.queries):
        return {
            **figures(_with_lexical_side(config, run), started, config.index),
            **shown,
            "compacted": False,
        }
    anew = shards_anew(config, before, run)
    entries = anew["shards"]
    with changing(index, "index compact") as writer:
        newest = writer.manifest
        table, lexical = _lexical_side(config, writer, run)
        later = _shards_since(index, before, newest, anew["kind"])
        draft = following(
            newest,
            "compact",
            digest_of({"compact": [entry.digest for entry in entries]}),
            table_version=table.version,
            **(anew | {"shards": (*entries, *later)}),
            recall_k=target.k or newest.recall_k,
            recall_target=target.recall or newest.recall_target,
            queries=queries or newest.queries,
            lexical=lexical,
        )
        draft = draft.model_copy(update={"shards": folded(index, draft, table, run)})
        manifest = measured(index, draft, run, config.seed)
        refuse_missed_target(manifest, target)
        writer.lease.check()
        publish(index, manifest, table)
    return {**figures(manifest, started, config.index), **shown, "compacted": True}


def _shards_since(
    index: Location, before: IndexManifest, newest: IndexManifest, kind: str
) -> tuple[ShardEntry, ...]:
    """The shards of changes published since, which stand beside the new ones, over the newest table.

    One that was folded from rows of before would hold them a second time, and one of another kind than the new ones is
    searched by other parameters: the rows of these are folded anew.
    """
    return tuple(
        entry
        for entry in newest.shards
        if entry not in before.shards
        and entry.kind in ("flat", kind)
        and int(shard_rows(index, entry)[0]) >= before.next_row
    )


def _with_lexical_side(config: IndexCompactConfig, run: Run) -> IndexManifest:
    """The version whose lexical side alone is another, published."""
    index = Location.of(config.index)
    with changing(index, "index compact") as writer:
        table, lexical = _lexical_side(config, writer, run)
        draft = following(
            writer.manifest,
            "compact",
            digest_of({"lexical": [writer.manifest.version, table.version]}),
            table_version=table.version,
            lexical=lexical,
        )
        writer.lease.check()
        publish(index, draft, table)
    return draft


def _lexical_side(
    config: IndexCompactConfig, writer: Writer, run: Run
) -> tuple[DocumentTable, LexicalEntry | None]:
    """The tidied table, and what it says of its lexical side: as it was, made anew as the config asks, or gone."""
    before, table = writer.manifest.lexical, writer.table
    wanted = _wanted_tokens(config, writer.manifest)
    if wanted == (before.tokens if before else None):
        return table.tidied(), before
    table = table.without_tokens() if wanted is None else table.with_tokens(wanted)
    table = table.lexically_indexed().tidied()
    return table, lexical_entry(writer.index, table, wanted, run)


def _wanted_tokens(config: IndexCompactConfig, before: IndexManifest) -> TokensConfig | None:
    has_one = before.lexical is not None if config.lexical is None else config.lexical
    if not has_one:
        return None
    return config.tokens or (before.lexical.tokens if before.lexical else TokensConfig())


def shards_anew(config: IndexCompactConfig, before: IndexManifest, run: Run) -> dict[str, Any]:
    """What a version says of shards that were built over all documents of `before`. Raises as `compact_index`."""
    index, plan = Location.of(config.index), plan_anew(config, before)
    shards = ShardPlan(
        index=index,
        table=DocumentTable.open(index, before.table_version),
        origin=before.origin,
        plan=plan,
        placing=_placing(config, before),
        seed=config.seed,
        # A number of the table's versions is given once, so it names what the rows hold.
        made_of={"format": FORMAT_VERSION, "table_version": before.table_version},
    )
    built = build_shards(shards, run)
    asked = {name: value for name, value in before.parameters.items() if name == NLIST_SET}
    return {
        "kind": plan.kind,
        "kind_reason": plan.reason,
        "parameters": {**plan.parameters, **asked},
        "exact_dtype": plan.exact_dtype,
        "shards": built.entries,
        "placement": built.placement,
        "search_parameters": {"1": {}},
    }


def plan_compact(config: IndexCompactConfig) -> dict[str, Any]:
    """The plan for --dry-run. Raises as `compact_index`."""
    before = open_manifest(config.index)
    # Whether queries that are asked for are the version's own is known once they are encoded.
    if not _needs_compaction(config, before) and config.target.queries is None:
        return {"parent": before.version, "compacted": False}
    if not _needs_shards(config, before) and config.target.queries is None:
        return {
            "parent": before.version,
            "compacted": False,
            "lexical": _wanted_tokens(config, before) is not None,
        }
    plan = plan_anew(config, before)
    shown = ("rows", "kind", "shards", "predicted_build_memory_bytes_per_task", "predicted_disk_bytes")
    return {
        "parent": before.version,
        "compacted": True,
        **{name: getattr(plan, name) for name in shown},
    }


def _needs_compaction(config: IndexCompactConfig, before: IndexManifest) -> bool:
    made = before.lexical.tokens if before.lexical else None
    return _needs_shards(config, before) or _wanted_tokens(config, before) != made


def _needs_shards(config: IndexCompactConfig, before: IndexManifest) -> bool:
    held = sum(entry.rows for entry in before.shards)
    changed = (
        held != before.rows
        or any(entry.kind != before.kind for entry in before.shards)
        or before.changed_rows > 0
    )
    return (
        changed
        or config.shards != "auto"
        or config.kind not in (None, before.kind)
        or _placing(config, before) != _placed(before)
        or config.target.recall not in (None, before.recall_target)
        or config.target.k not in (None, before.recall_k)
    )


def plan_anew(config: IndexCompactConfig, before: IndexManifest) -> IndexPlan:
    kind = config.kind or before.kind
    hnsw, ivf = settings_of(before, kind, before.rows)
    return IndexRequest(
        rows=before.rows,
        dim=before.dim,
        kind=kind,
        shards=config.shards,
        recall=config.target.recall or before.recall_target,
        memory_bytes=int(config.target.memory),
        latency_ms=config.target.latency_ms,
        num_workers=config.workers.num,
        rescore="auto" if config.kind not in (None, before.kind) or before.exact_dtype else False,
        vector_dtype=before.vector_dtype,
        hnsw=hnsw,
        ivf=ivf,
    ).plan()


def _placed(before: IndexManifest) -> Placing:
    return "rows" if before.placement is None else "cluster"


def _placing(config: IndexCompactConfig, before: IndexManifest) -> Placing:
    return config.placement or _placed(before)
