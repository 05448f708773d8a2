"""`raytower index build`: embeddings into a new version, published only when it is whole and can be opened.

The steps: put the embeddings into the table, refuse ids that stand twice, place rows by cluster where asked, train on a
sample, build shards, measure recall, publish. Each runs as tasks that stream. What a killed build finished,
fragments of the table and shards, is found again by what it was made of.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raytower.errors import FormatError, InputError
from raytower.index.config import (
    ExactDtype,
    HnswConfig,
    IndexBuildConfig,
    IndexKind,
    IvfConfig,
    Placing,
    RebuildTargetConfig,
    TokensConfig,
)
from raytower.index.embeddings import Embeddings
from raytower.index.faiss_import import import_faiss
from raytower.index.faiss_index import GPU_LISTS
from raytower.index.kinds import parameter_grid
from raytower.index.lexical import first_entry
from raytower.index.manifest import (
    FORMAT_VERSION,
    IndexManifest,
    LexicalEntry,
    Measured,
    Origin,
    PlacementEntry,
    ShardEntry,
)
from raytower.index.measure import (
    ExactHits,
    HeldOut,
    Wanted,
    exact_hits,
    hold_out,
    measure_recall,
    measured_ks,
    merge_exact,
)
from raytower.index.place import place_rows
from raytower.index.plan import IndexPlan, IndexRequest, human_bytes, split_rows
from raytower.index.reader import Index
from raytower.index.shard_build import (
    BuiltShard,
    ShardTask,
    TableRows,
    build_shard,
    digest_of,
    finished_shard,
    train_template,
)
from raytower.index.table import (
    DocumentTable,
    commit_fragments,
    fragments_exist,
    refuse_unindexable,
    table_batch,
    table_schema,
    write_fragments,
)
from raytower.index.target_queries import kept_queries, opened_queries
from raytower.index.tasks import Run, on_ray
from raytower.index.versions import (
    index_folder,
    next_version,
    open_manifest,
    publish,
    published_version,
    refuse_damaged,
    writing,
)
from raytower.progress import log
from raytower.storage import Location

WORK_NAME = "work"
# Among the parameters of a version: the lists of a shard, where they were set at the build and not planned.
NLIST_SET = "nlist_set"
# Rows whose ids one task compares: 8 bytes each.
_IDS_PER_TASK = 50_000_000


class RowSource(Protocol):
    """Rows for the table in files that can be streamed, one group of them a task; see `Embeddings`."""

    @property
    def origin(self) -> Origin: ...
    @property
    def dtype(self) -> ExactDtype: ...
    def identity(self) -> list[Any]: ...
    def groups(self) -> list[tuple[int, int]]: ...
    def first_row(self, file: int) -> int: ...
    def documents_schema(self) -> pa.Schema: ...
    def stream(self, file: int) -> Iterator[tuple[pa.Table, NDArray[Any]]]:
        """A file's documents in blocks, each with its vectors (rows, dim)."""


@dataclass(frozen=True, kw_only=True)
class ShardPlan:
    """Which shards to build over a version of the table."""

    index: Location
    table: DocumentTable
    origin: Origin
    plan: IndexPlan
    placing: Placing
    seed: int
    made_of: Any
    """JSON that names the rows, so that a killed job finds its shards again."""

    def rows(self, first: int, last: int) -> TableRows:
        """The rows at places first to last (exclusive) of all that the table holds."""
        unit, version = self.origin.metric == "cosine", self.table.version
        return TableRows(index=self.index, table_version=version, unit=unit, first=first, last=last)

    @property
    def all_rows(self) -> TableRows:
        return self.rows(0, self.plan.rows)


def build_index(config: IndexBuildConfig, run: Run | None = None) -> dict[str, Any]:
    """Build, measure and publish a version.

    A build that is finished already, whatever was changed since, is not done again unless `replace` is true, or files
    of it are gone and nothing was changed since.

    Returns:
        version, kind, shards, rows, recall, recall_target_reached, search_parameters, seconds, output.

    Raises:
        FormatError: damaged or unfinished embeddings. InputError: NaN or zero vectors, duplicate ids, more shards
        than rows, a kind that does not fit the memory, an index that was changed since it was built, an output that
        holds something else.
        RaytowerError: a task failed, or someone else published meanwhile.
    """
    started = time.perf_counter()
    source, index = Embeddings(Location.of(config.embeddings)), index_folder(config.output)
    plan = _plan(config, source)
    log(
        f"index plan: {plan.kind}, {plan.shards} shards, {human_bytes(plan.predicted_search_memory_bytes)} to search, "
        f"{human_bytes(plan.predicted_build_memory_bytes_per_task)} a build task, about "
        f"{plan.predicted_build_seconds:.0f} s; {plan.reason}"
    )
    identity = _identity(config, source, plan)
    before = open_manifest(index) if published_version(index) else None
    if before is not None and _is_built(config, index, before, identity):
        return figures(before, started, config.output)
    run = run or on_ray(config.workers, index)
    tokens = config.tokens if config.lexical else None
    table, first_row = ingest(index, source, before.next_row if before else 0, config.indexed, run, tokens)
    refuse_duplicate_ids(index, table, run)
    shards = ShardPlan(
        index=index,
        table=table,
        origin=source.origin,
        plan=plan,
        placing=config.placement,
        seed=config.seed,
        made_of={"format": FORMAT_VERSION, "rows": source.identity(), "first_row": first_row},
    )
    asked = config.target.queries
    queries = None if asked is None else kept_queries(index, source.origin, asked)
    draft = _draft(config, shards, before, identity, first_row).model_copy(
        update={"queries": queries, "lexical": lexical_entry(index, table, tokens, run)}
    )
    wanted = wanted_hits(index, draft, run, config.seed)
    built = build_shards(shards, run, wanted)
    draft = draft.model_copy(update={"shards": built.entries, "placement": built.placement})
    exact = merge_exact([shard.exact for shard in built.shards if shard.exact is not None], wanted.k)
    manifest = measured_against(index, draft, run, wanted, exact)
    refuse_missed_target(manifest, config.target)
    _publish(index, manifest, table)
    remove_work(index, digest_of(source.identity()))
    return figures(manifest, started, config.output)


def _is_built(config: IndexBuildConfig, index: Location, before: IndexManifest, identity: str) -> bool:
    """Whether the newest version came of this very build, which then is not done again unless `replace` is true.

    Raises:
        InputError: the index was changed since another build, and `replace` is false.
        FormatError: it came of this build, is damaged now, and holds changes.
    """
    if config.replace:
        return False
    if identity in before.built and (damage := find_damage(index, before)) is not None:
        if before.applied:
            raise FormatError(
                f"{damage}; it was changed {len(before.applied)} times since this build, which replace: true does anew "
                "without all that"
            )
        log(f"{damage}; it is built again")
        return False
    if identity in before.built:
        log(f"{index} holds this build already, and version {before.version} came of it; nothing to build")
        if config.lexical and before.lexical is None:
            log(f"it has no lexical side; make one: `raytower index compact --index {index} --lexical true`")
        return True
    if before.applied:
        raise InputError(
            f"{index} was changed {len(before.applied)} times since it was built; a new build takes the place of "
            "all that: set replace: true, or build into another folder"
        )
    return False


def find_damage(index: Location, manifest: IndexManifest) -> str | None:
    """What is wrong with the files of a published version, as `refuse_damaged` finds it; None where nothing is."""
    try:
        refuse_damaged(index, manifest, DocumentTable.open(index, manifest.table_version))
    except FormatError as error:
        return str(error)
    return None


def _draft(
    config: IndexBuildConfig, shards: ShardPlan, before: IndexManifest | None, identity: str, first_row: int
) -> IndexManifest:
    """The version that a build makes after `before`, without shards and not measured yet."""
    plan = shards.plan
    lists = {NLIST_SET: config.ivf.nlist} if config.ivf.nlist and plan.kind.startswith("ivf") else {}
    return IndexManifest(
        **shards.origin.model_dump(),
        version=next_version(before.version if before else None),
        parent=before.version if before else None,
        operation="build",
        identity=identity,
        built=(*(before.built if before else ()), identity),
        applied=(),
        table_version=shards.table.version,
        next_row=first_row + plan.rows,
        rows=plan.rows,
        kind=plan.kind,
        kind_reason=plan.reason,
        parameters=plan.parameters | lists,
        exact_dtype=plan.exact_dtype,
        vector_dtype=shards.table.vector_dtype,
        shards=(),
        placement=None,
        indexed=tuple(config.indexed),
        search_parameters={"1": {}},
        recall_k=config.target.k,
        recall_target=config.target.recall,
        queries=None,
        measured=None,
        changed_rows=0,
    )


def settings_of(manifest: IndexManifest, kind: IndexKind, rows: int) -> tuple[HnswConfig, IvfConfig]:
    """With which settings `rows` rows of an index are built anew, as `kind`: those of its build.

    Links, construction and codes are what the version's parameters say: where they were planned, they would be planned
    so again. Planned lists follow the rows, so lists that were set stand beside them; a row makes one list at most.
    """
    made = manifest.parameters
    hnsw, ivf = HnswConfig(), IvfConfig()
    if kind in ("hnsw", "auto"):
        hnsw = HnswConfig(m=made.get("M"), ef_construction=made.get("efConstruction"))
    if kind.startswith("ivf") or kind == "auto":
        ivf = IvfConfig(
            nlist=min(made[NLIST_SET], rows) if NLIST_SET in made else None,
            pq_m=made.get("pq_m") if kind in ("ivf_pq", "auto") else None,
        )
    return hnsw, ivf


def _publish(index: Location, manifest: IndexManifest, table: DocumentTable) -> None:
    """Raises InputError where another version than its parent is published by now."""
    with writing(index, "index build") as lease:
        found = published_version(index)
        if found != manifest.parent:
            raise InputError(
                f"{index} has version {found} published by now, which this build does not hold; nothing was published: "
                "run the command again, with replace: true if the build is to take its place"
            )
        # Measuring opened it; once more, now that nobody can take anything away.
        refuse_damaged(index, manifest, table)
        lease.check()
        publish(index, manifest)


def plan_build(config: IndexBuildConfig) -> dict[str, Any]:
    """The plan for --dry-run: kind and why, shards, parameters, predicted memory and disk.

    Raises:
        FormatError, InputError: unfinished embeddings, what does not fit, or an output that holds something else.
    """
    index_folder(config.output)
    plan = _plan(config, Embeddings(Location.of(config.embeddings)))
    return {"shards": plan.shards, **asdict(plan)}


@dataclass(frozen=True)
class BuiltShards:
    """The shards of a plan, and where documents were placed, if they were."""

    shards: tuple[BuiltShard, ...]
    placement: PlacementEntry | None

    @property
    def entries(self) -> tuple[ShardEntry, ...]:
        return tuple(shard.entry for shard in self.shards)


def build_shards(shards: ShardPlan, run: Run, wanted: Wanted | None = None) -> BuiltShards:
    """Shards are built, and those that are there already kept; with the exact hits of each, where they are wanted."""
    plan = shards.plan
    placement = None
    sources = [(shards.rows(first, last), last - first) for first, last in plan.ranges]
    if shards.placing == "cluster" and plan.shards > 1:
        placement, listed = place_rows(shards, run)
        sources = [(dataclasses.replace(shards.rows(0, 0), listed=rows), len(rows)) for rows in listed]
    made_of = {
        "of": shards.made_of,
        "parameters": plan.parameters,
        "train": [plan.train_rows, shards.seed, plan.rows],
        "metric": shards.origin.metric,
        "placement": placement.file.sha256 if placement else None,
    }
    tasks = [
        ShardTask(
            source=source,
            num_rows=rows,
            kind=plan.kind,
            exact_dtype=plan.exact_dtype,
            made_of={**made_of, "part": [number, *plan.ranges[number], rows]},
            placed=placement is not None,
            num_threads=run.threads,
            num_gpus=run.num_gpus if plan.kind in GPU_LISTS else 0,
        )
        for number, (source, rows) in enumerate(sources)
    ]

    def template() -> Any:
        call = (shards.all_rows, plan.kind, plan.dim, plan.parameters, plan.train_rows)
        return run(train_template, [(*call, shards.seed, run.threads_alone)], num_gpus=run.num_gpus)[0]

    return BuiltShards(run_shard_tasks(tasks, template, run, plan.tasks_at_once, wanted), placement)


def run_shard_tasks(
    tasks: Sequence[ShardTask],
    template: Callable[[], Any],
    run: Run,
    at_once: int,
    wanted: Wanted | None = None,
) -> tuple[BuiltShard, ...]:
    """The shards of some tasks; `template` gives the trained empty index, and is asked only where a shard is
    missing.
    """
    found = [finished_shard(task.source.index, task.digest) for task in tasks]
    missing = [task for task, entry in zip(tasks, found, strict=True) if entry is None]
    kept = [(task, entry) for task, entry in zip(tasks, found, strict=True) if entry is not None]
    if kept:
        log(f"{len(kept)} of {len(tasks)} shards are finished already")
    built: list[BuiltShard] = []
    if missing:
        trained = template()
        calls = [(task, trained, wanted) for task in missing]
        num_gpus = max(task.num_gpus for task in missing)
        built = run(build_shard, calls, at_once=at_once, num_gpus=num_gpus, progress="built {} of {} shards")
    # Of a kept shard only the rows are known: its vectors are read again for the exact hits.
    hits: Sequence[ExactHits | None] = [None] * len(kept)
    if wanted is not None:
        hits = run(exact_hits, [(task.source, wanted) for task, _ in kept])
    built += [BuiltShard(entry, exact) for (_, entry), exact in zip(kept, hits, strict=True)]
    of_digest = {shard.entry.digest: shard for shard in built}
    return tuple(of_digest[task.digest] for task in tasks)


def measured(index: Location, draft: IndexManifest, run: Run, seed: int = 0) -> IndexManifest:
    """As `measured_against`, with the exact hits among all rows of the version, which are read for it."""
    wanted = wanted_hits(index, draft, run, seed)
    ranges = split_rows(draft.rows, min(max(run.at_once, 1), draft.rows))
    found = run(exact_hits, [(_rows_of(index, draft, *bounds), wanted) for bounds in ranges])
    return measured_against(index, draft, run, wanted, merge_exact(found, wanted.k))


def wanted_hits(index: Location, draft: IndexManifest, run: Run, seed: int = 0) -> Wanted:
    """The queries that a version measures its recall with: those of its `target.queries`, or some of its rows."""
    queries = opened_queries(index, draft)
    if queries is None:
        queries = run(hold_out, [(_rows_of(index, draft, 0, draft.rows), seed)])[0]
    return Wanted(queries, measured_ks(draft.recall_k, draft.rows)[-1])


def _rows_of(index: Location, draft: IndexManifest, first: int, last: int) -> TableRows:
    unit, version = draft.metric == "cosine", draft.table_version
    return TableRows(index=index, table_version=version, unit=unit, first=first, last=last)


def measured_against(
    index: Location, draft: IndexManifest, run: Run, wanted: Wanted, exact: ExactHits
) -> IndexManifest:
    """A version with the search parameters that reach its recall target, and the recall that they reach.

    They are measured for `recall_k` hits and for 100, which rerankers and evaluations ask for.

    Args:
        exact: the exact hits that are wanted, among all rows of the version.
    """
    return run(_measure, [(index, draft, wanted.queries, exact, run.threads_alone)])[0]


def _measure(
    index: Location, draft: IndexManifest, queries: HeldOut, exact: ExactHits, num_threads: int
) -> IndexManifest:
    import_faiss().omp_set_num_threads(num_threads)
    opened = Index.of_manifest(index, draft.model_copy(update={"measured": None}))
    ks = measured_ks(draft.recall_k, draft.rows)

    def grid(k: int) -> list[dict[str, int]]:
        shards = 1 if draft.placement else len(draft.shards)
        rescored = draft.exact_dtype is not None
        return parameter_grid(draft.kind, draft.parameters, draft.rows, k, rescored=rescored, shards=shards)

    found = measure_recall(
        lambda vectors, k, parameters: opened.search(vectors, k, search_parameters=parameters).rows,
        queries,
        exact,
        ks,
        target=draft.recall_target,
        grid=grid,
        placed_shards=draft.placement.shards if draft.placement else None,
        vectors=lambda rows: opened.table.vectors(rows, unit=draft.metric == "cosine"),
    )
    asked = found.get(draft.recall_k, found[ks[0]])
    record = Measured(
        version=draft.version,
        k=draft.recall_k,
        target=draft.recall_target,
        recall=asked.recall,
        reached=asked.reached,
        queries=asked.num_queries,
        rows=draft.rows,
        shards=tuple(entry.digest for entry in draft.shards),
        curve=asked.curve,
        placement_curve=asked.placement_curve,
    )
    parameters = {str(k): of_k.search_parameters for k, of_k in found.items()}
    return draft.model_copy(update={"measured": record, "search_parameters": parameters, "changed_rows": 0})


def figures(manifest: IndexManifest, started: float, output: str) -> dict[str, Any]:
    """The JSON line of a job that ended with this version; `started` by `time.perf_counter`."""
    return {
        "version": manifest.version,
        "kind": manifest.kind,
        "shards": len(manifest.shards),
        "rows": manifest.rows,
        "recall": None if manifest.recall is None else round(manifest.recall, 5),
        "recall_target_reached": manifest.target_reached,
        "search_parameters": manifest.search_parameters,
        "seconds": round(time.perf_counter() - started, 3),
        "output": output,
    }


def refuse_duplicate_ids(index: Location, table: DocumentTable, run: Run) -> None:
    """Raises InputError naming an id that stands twice in the table."""
    parts = -(-table.num_rows // _IDS_PER_TASK)
    calls = [(index, table.version, number, parts) for number in range(parts)]
    repeated = [name for found in run(_repeated_ids, calls) for name in found]
    if repeated:
        raise InputError(
            f"id {repeated[0]!r} stands twice in the embeddings ({len(repeated)} such ids or more); ids must be "
            "unique, so give the corpus unique ids and encode it again"
        )


def _repeated_ids(index: Location, table_version: int, part: int, parts: int) -> list[str]:
    """Some ids that stand twice, among those whose hash falls into one part of several."""
    import pandas as pd

    table = DocumentTable.open(index, table_version)
    hashes = np.empty(table.num_rows, np.uint64)
    filled = 0
    for batch in table.scan(["id"]):
        found = pd.util.hash_array(batch.column("id").to_numpy(zero_copy_only=False), categorize=False)
        found = found[found % parts == part]
        hashes[filled : filled + len(found)] = found
        filled += len(found)
    hashes = hashes[:filled]
    hashes.sort()
    suspects = np.unique(hashes[1:][hashes[1:] == hashes[:-1]])
    if not len(suspects):
        return []
    seen: set[str] = set()
    repeated: list[str] = []
    for batch in table.scan(["id"]):
        names = batch.column("id").to_numpy(zero_copy_only=False)
        for name in names[np.isin(pd.util.hash_array(names, categorize=False), suspects)]:
            if name in seen:
                repeated.append(name)
            seen.add(name)
    return repeated


def ingest(
    index: Location,
    source: RowSource,
    first_row: int,
    indexed: Sequence[str],
    run: Run,
    tokens: TokensConfig | None = None,
) -> tuple[DocumentTable, int]:
    """The rows of a source as a version of the table, not yet published, and the number of their first row.

    With `tokens` it has the tokens of each text, made so, and an inverted index over them. A version that a killed job
    over the same source made is taken again.
    """
    digest = digest_of(source.identity())
    note = index / WORK_NAME / digest / "table.json"
    settings = {"indexed": list(indexed), "tokens": None if tokens is None else tokens.model_dump()}
    if note.is_file():
        made = note.read_json()
        # A note of before there were tokens says nothing of them.
        if made["first_row"] >= first_row and {"tokens": None, **made}.items() >= settings.items():
            try:
                table = DocumentTable.open(index, made["version"])
            except FormatError:
                # Garbage collection took it, and the fragments that the other notes name.
                remove_work(index, digest)
            else:
                log(f"version {table.version} of the table holds these rows already")
                return table, made["first_row"]
    documents = source.documents_schema()
    refuse_unindexable(documents, indexed)
    schema = table_schema(documents, source.origin.dim, source.dtype, has_tokens=tokens is not None)
    calls = [(index, source, group, first_row, schema, tokens) for group in source.groups()]
    written = run(_write_group, calls, progress="wrote {} of {} groups of files")
    fragments = [fragment for part in written for fragment in part]
    with writing(index, "index build"):
        table = commit_fragments(index, fragments, schema).indexed(indexed).lexically_indexed()
        # Writers that change the table meanwhile put it back to what is published; this version stays in its history.
        table.pin(work_pin(digest))
        note.write_json({"version": table.version, "first_row": first_row, **settings})
    return table, first_row


def lexical_entry(
    index: Location, table: DocumentTable, tokens: TokensConfig | None, run: Run
) -> LexicalEntry | None:
    """The lexical side of a table that has tokens, made so; None without."""
    return None if tokens is None else run(_counted, [(index, table.version, tokens)])[0]


def _counted(index: Location, table_version: int, tokens: TokensConfig) -> LexicalEntry:
    return first_entry(index, DocumentTable.open(index, table_version), tokens)


def _write_group(
    index: Location,
    source: RowSource,
    group: tuple[int, int],
    first_row: int,
    schema: pa.Schema,
    tokens: TokensConfig | None,
) -> list[str]:
    """Fragments of the table with the rows of some files; those of a killed build are taken again."""
    made_so = "" if tokens is None else f"-tokens-{digest_of(tokens.model_dump())[:16]}"
    name = f"rows-{first_row}-files-{group[0]}-{group[1]}{made_so}.json"
    note = index / WORK_NAME / digest_of(source.identity()) / name
    if note.is_file():
        kept: list[str] = note.read_json()
        if fragments_exist(index, kept):
            return kept

    def batches() -> Any:
        row = first_row + source.first_row(group[0])
        for file in range(*group):
            for documents, vectors in source.stream(file):
                yield table_batch(documents, vectors, row, schema, tokens)
                row += len(vectors)

    fragments = write_fragments(index, batches(), schema)
    note.write_json(fragments)
    return fragments


def work_pin(digest: str) -> str:
    """What keeps the table version of a build that is not published yet; it goes with the build's notes."""
    return f"work-{digest}"


def remove_work(index: Location, digest: str) -> None:
    """Take away the notes of a build that is through."""
    (index / WORK_NAME / digest).delete()


def build_identity(config: IndexBuildConfig) -> str:
    """What names the build of a config among those that a version was built by."""
    source = Embeddings(Location.of(config.embeddings))
    return _identity(config, source, _plan(config, source))


def _identity(config: IndexBuildConfig, source: Embeddings, plan: IndexPlan) -> str:
    """What names this build: rows, what shards are made of them, and the recall that they must reach."""
    settings = config.model_dump(mode="json", exclude={"embeddings", "output", "workers", "replace"})
    # The builds that an index knows of a time without a lexical side are those that ask for nothing special of it.
    if config.lexical and config.tokens == TokensConfig():
        del settings["lexical"], settings["tokens"]
    queries = config.target.queries
    if queries is not None and queries.path_alone is not None:
        # An index knows its builds of a time when queries were a path.
        settings["target"]["queries"] = queries.path_alone
    content = {"rows": source.identity(), "origin": source.origin.model_dump(), "settings": settings}
    return digest_of(json.loads(json.dumps({**content, "kind": plan.kind, "parameters": plan.parameters})))


def refuse_missed_target(manifest: IndexManifest, target: RebuildTargetConfig) -> None:
    """Raises InputError where a version that is not published yet misses its recall and is to be kept back."""
    if manifest.target_reached is not False:
        return
    what = (
        f"recall@{manifest.recall_k} is {manifest.recall:.4f} at {manifest.search_parameters}, below target.recall "
        f"{manifest.recall_target}; another kind may reach it"
    )
    if target.on_target_missed == "keep":
        raise InputError(f"{what}; nothing was published, since on_target_missed is keep")
    log(what)


def _plan(config: IndexBuildConfig, source: Embeddings) -> IndexPlan:
    return IndexRequest(
        rows=source.rows,
        dim=source.origin.dim,
        kind=config.kind,
        shards=config.shards,
        recall=config.target.recall,
        memory_bytes=int(config.target.memory),
        latency_ms=config.target.latency_ms,
        num_workers=config.workers.num,
        threads_per_task=config.workers.num_threads,
        text_bytes=source.text_bytes,
        lexical=config.lexical,
        rescore=config.rescore,
        vector_dtype=source.dtype,
        hnsw=config.hnsw,
        ivf=config.ivf,
    ).plan()
