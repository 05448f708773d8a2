"""`raytower index add | delete | set`: a change of the table, and the version that holds it.

Up to some hundred thousand rows a change runs in this process, without Ray. A change that was made already is known by
what it was, and is not made twice.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from raytower.config import WorkersConfig
from raytower.errors import InputError
from raytower.index.build import figures, measured
from raytower.index.change_config import IndexAddConfig, IndexDeleteConfig, IndexSetConfig
from raytower.index.embeddings import Embeddings
from raytower.index.filters import sql_literal, to_sql
from raytower.index.fold import folded
from raytower.index.lexical import next_entry
from raytower.index.manifest import IndexManifest, Operation, Origin
from raytower.index.shard import Shard
from raytower.index.shard_build import digest_of
from raytower.index.table import DocumentTable, table_batch, table_schema, unified
from raytower.index.tasks import Run, on_ray
from raytower.index.versions import (
    Writer,
    changing,
    following,
    open_manifest,
    publish,
    refuse_damaged,
)
from raytower.progress import log
from raytower.storage import Location

# A change of more rows runs on Ray's workers.
_ROWS_IN_PROCESS = 100_000
# Recall is measured again once more than this share of the rows came or went.
_MEASURED_SHARE = 0.1
_SAME_ORIGIN = ("fingerprint", "metric", "dim", "prefix", "max_length", "engine", "compute_dtype")
_NAMES_SHOWN = 3


def add_to_index(config: IndexAddConfig) -> dict[str, Any]:
    """Publish a version that holds the documents of an embeddings folder besides what is published.

    Returns:
        what `index build` returns, and added, replaced.

    Raises:
        InputError: another encoder, prefix, length or dimension; columns whose types do not fit; ids that occur twice,
            or are there already without `upsert`. FormatError: damaged files.
        RaytowerError: another writer holds the index.
    """
    started = time.perf_counter()
    index, source = Location.of(config.index), Embeddings(Location.of(config.embeddings))
    refuse_other_origin(source.origin, open_manifest(index), config.embeddings)
    identity = digest_of({"add": source.identity(), "upsert": config.upsert})
    with changing(index, "index add") as writer:
        if identity in writer.manifest.applied and not config.again:
            log(
                f"{config.embeddings} was added to {config.index} before; nothing is done (again: true adds it anew)"
            )
            return {**figures(writer.manifest, started, config.index), "added": 0, "replaced": 0}
        if source.rows == 0:
            raise InputError(f"{config.embeddings!r} holds no rows; there is nothing to add")
        _refuse_ids(writer, source, config)
        files = range(len(source.manifest.files))
        stream = (batch for file in files for batch in source.stream(file))
        table, replaced = with_documents(
            writer, source.documents_schema(), stream, config.embeddings, upsert=config.upsert
        )
        run = _run(source.rows, config.workers, index)
        manifest = publish_change(writer, table, "add", identity, came=source.rows, went=replaced, run=run)
    return {**figures(manifest, started, config.index), "added": source.rows, "replaced": replaced}


def delete_from_index(config: IndexDeleteConfig) -> dict[str, Any]:
    """Publish a version without some documents.

    Returns:
        what `index build` returns, and deleted, unknown (ids that were not there), repeated (ids given twice).

    Raises:
        InputError: an id that the index does not hold under on_unknown fail, unless this very deletion was made
            before; no ids; a filter that does not fit. RaytowerError: another writer holds the index.
    """
    started = time.perf_counter()
    index = Location.of(config.index)
    given = _given_ids(config)
    wanted = list(dict.fromkeys(given))
    identity = digest_of({"delete": wanted, "filter": config.filter})
    with changing(index, "index delete") as writer:
        manifest, table = writer.manifest, writer.table
        if config.filter is not None:
            condition = _condition(config.filter, table)
            going, unknown = len(table.matching(condition)), 0
        else:
            found = _found_ids(table, wanted)
            going, unknown = len(found), len(wanted) - len(found)
            if unknown and config.on_unknown == "fail" and identity not in manifest.applied:
                raise InputError(_unknown_ids(wanted, found, manifest))
        if going == manifest.rows:
            raise InputError(
                f"this deletes all {manifest.rows} documents of index version {manifest.version}; an index holds at "
                "least one: remove the index itself instead"
            )
        if going:
            if config.filter is None:
                table = table.without(pa.array(wanted, pa.string()))
            else:
                table = table.without_matching(condition)
            run = _run(going, config.workers, index)
            manifest = publish_change(writer, table, "delete", identity, came=0, went=going, run=run)
    return {
        **figures(manifest, started, config.index),
        "deleted": going,
        "unknown": unknown,
        "repeated": len(given) - len(wanted),
    }


def set_in_index(config: IndexSetConfig) -> dict[str, Any]:
    """Publish a version with other values in some columns.

    Returns:
        what `index build` returns, and changed, unknown.

    Raises:
        InputError: a column that there is not, the text or the id, a value of another type, an unknown id under
            on_unknown fail. RaytowerError: another writer holds the index.
    """
    started = time.perf_counter()
    index = Location.of(config.index)
    with changing(index, "index set") as writer:
        table, unknown = writer.table, 0
        if config.input is None:
            _refuse_fixed(config.values, table)
            assert config.filter is not None
            condition = _condition(config.filter, table)
            changed = len(table.matching(condition))
            literals = {
                name: sql_literal(table.schema.field(name), value, f"values.{name}")
                for name, value in config.values.items()
            }
            table = table.with_value_where(literals, condition) if changed else table
            identity = digest_of({"set": config.values, "filter": config.filter})
        else:
            values = read_values(config.input.path, table)
            identity = digest_of({"set": values.to_pylist()})
            ids = values["id"].to_pylist()
            found = _found_ids(table, ids)
            changed, unknown = len(found), len(ids) - len(found)
            if unknown and config.on_unknown == "fail":
                raise InputError(_unknown_ids(ids, found, writer.manifest))
            table = table.with_values(values) if changed else table
        manifest = writer.manifest
        if changed and manifest.identity == identity:
            log(f"version {manifest.version} of {config.index} is this very change; nothing is done")
            changed = 0
        if changed:
            manifest = publish_change(writer, table, "set", identity, came=0, went=0, run=Run())
    return {**figures(manifest, started, config.index), "changed": changed, "unknown": unknown}


def plan_add(config: IndexAddConfig) -> dict[str, Any]:
    """What an addition would do. Raises InputError and FormatError as `add_to_index`, the ids aside."""
    manifest = open_manifest(config.index)
    source = Embeddings(Location.of(config.embeddings))
    refuse_other_origin(source.origin, manifest, config.embeddings)
    return {
        "parent": manifest.version,
        "rows_before": manifest.rows,
        "rows_added": source.rows,
        "on_ray": source.rows > _ROWS_IN_PROCESS,
    }


def plan_delete(config: IndexDeleteConfig) -> dict[str, Any]:
    """What a deletion would do; ids are not looked up."""
    manifest = open_manifest(config.index)
    plan: dict[str, Any] = {"parent": manifest.version, "rows_before": manifest.rows}
    if config.filter is not None:
        table = DocumentTable.open(Location.of(config.index), manifest.table_version)
        return {**plan, "matching": len(table.matching(_condition(config.filter, table)))}
    return {**plan, "ids": len(set(_given_ids(config)))}


def plan_set(config: IndexSetConfig) -> dict[str, Any]:
    """What a change of values would do."""
    manifest = open_manifest(config.index)
    table = DocumentTable.open(Location.of(config.index), manifest.table_version)
    if config.filter is None:
        assert config.input is not None
        return {"parent": manifest.version, "rows": read_values(config.input.path, table).num_rows}
    _refuse_fixed(config.values, table)
    return {"parent": manifest.version, "matching": len(table.matching(_condition(config.filter, table)))}


def publish_change(
    writer: Writer,
    table: DocumentTable,
    operation: Operation,
    identity: str,
    *,
    came: int,
    went: int,
    run: Run,
) -> IndexManifest:
    """Fold what is to be folded, measure what is to be measured, and publish the table as the next version."""
    before = writer.manifest
    refuse_damaged(writer.index, before, writer.table)
    # A column that was widened lost its index.
    table = table.indexed(before.indexed).lexically_indexed()
    lexical = before.lexical and next_entry(writer.index, before.lexical, writer.table, table)
    draft = following(
        before,
        operation,
        identity,
        applied=(*(name for name in before.applied if name != identity), identity),
        table_version=table.version,
        next_row=before.next_row + came,
        rows=table.num_rows,
        changed_rows=before.changed_rows + came + went,
        lexical=lexical,
    )
    draft = draft.model_copy(update={"shards": folded(writer.index, draft, table, run)})
    if draft.changed_rows > _MEASURED_SHARE * draft.rows:
        draft = measured(writer.index, draft, run)
    else:
        # What cannot be opened must not be published.
        for entry in (entry for entry in draft.shards if entry not in before.shards):
            Shard.open(writer.index, entry, draft.dim, table.row_map)
        if draft.shards == before.shards:  # what came lies outside them
            table.vectors(np.arange(before.next_row, draft.next_row), unit=False)
    writer.lease.check()
    publish(writer.index, draft, table)
    return draft


def refuse_other_origin(found: Origin, manifest: IndexManifest, embeddings: str) -> None:
    """Raises InputError, naming both sides, where vectors were made in another way than those of the index."""
    for name in _SAME_ORIGIN:
        ours, theirs = getattr(manifest, name), getattr(found, name)
        if ours != theirs:
            raise InputError(
                f"{embeddings!r} has {name} {theirs!r}, index version {manifest.version} has {ours!r}; vectors made in "
                f"different ways cannot be compared: encode with {manifest.encoder!r}, prefix {manifest.prefix!r}, "
                f"max_length {manifest.max_length}, engine {manifest.engine} and dtype {manifest.compute_dtype}"
            )


def read_ids(path: str) -> Iterator[str]:
    """Ids of a file: a line each, or the `id` of JSONL or Parquet rows.

    Raises InputError for an empty line, a row without an id, or no UTF-8.
    """
    place = Location.of(path)
    if place.name.endswith((".parquet", ".jsonl")):
        yield from _read_rows(place)["id"].to_pylist()
        return
    try:
        lines = place.read_bytes().decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{place} is not UTF-8 text: {error}; give a text file with an id a line") from error
    if not lines[-1]:
        lines.pop()
    for number, line in enumerate(lines, start=1):
        name = line.removesuffix("\r")
        if not name.strip():
            raise InputError(f"{place} line {number} is empty; every line is an id")
        yield name


def read_values(path: str, table: DocumentTable) -> pa.Table:
    """Ids and the values to be set, of the table's types. Raises InputError as `set_in_index`."""
    place = Location.of(path)
    rows = _read_rows(place, same_keys=True)
    names = [name for name in rows.column_names if name != "id"]
    _refuse_fixed(dict.fromkeys(names), table)
    if len(set(rows["id"].to_pylist())) != rows.num_rows:
        raise InputError(f"{place} holds an id twice; give each document one row")
    if not names:
        raise InputError(f"{place} holds ids and nothing to set; give it the columns that are to change")
    columns = {"id": rows["id"]}
    for name in names:
        kind = table.schema.field(name).type
        try:
            columns[name] = rows[name].cast(kind)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise InputError(
                f"{place}: column {name!r} is {rows[name].type} there and {kind} in the index: {error}"
            ) from error
    return pa.table(columns)


def _read_rows(place: Location, *, same_keys: bool = False) -> pa.Table:
    if place.name.endswith(".parquet"):
        with place.open_read() as stream:
            rows = pq.read_table(stream)
    else:
        parsed = []
        for number, line in enumerate(place.read_bytes().split(b"\n"), start=1):
            if line.strip():
                try:
                    parsed.append(json.loads(line))
                except ValueError as error:
                    raise InputError(f"{place} line {number} is no JSON: {error}") from error
                if same_keys and isinstance(parsed[-1], dict) and set(parsed[-1]) != set(parsed[0]):
                    raise InputError(
                        f"{place} line {number} has the keys {sorted(parsed[-1])}, its first line "
                        f"{sorted(parsed[0])}; give every line the same keys, null where a value is to be taken away"
                    )
        try:
            rows = pa.Table.from_pylist(parsed)
        except (pa.ArrowInvalid, pa.ArrowTypeError, AttributeError) as error:
            raise InputError(
                f"{place}: its rows are no table: {error}; every line is an object of plain values"
            ) from error
    if "id" not in rows.column_names or rows["id"].null_count:
        raise InputError(f"{place} has rows without an id; every row needs one")
    return rows.set_column(rows.column_names.index("id"), "id", rows["id"].cast(pa.string()))


def with_documents(
    writer: Writer,
    schema: pa.Schema,
    stream: Iterable[tuple[pa.Table, NDArray[Any]]],
    what: str,
    *,
    upsert: bool,
) -> tuple[DocumentTable, int]:
    """The table with more documents (their columns, and vectors (rows, dim)), and how many they replace.

    Raises InputError for a column whose type fits none of the index's, before anything is written.
    """
    manifest = writer.manifest
    table = writer.table.widened(unified(writer.table.schema, schema, what))
    tokens = manifest.lexical.tokens if manifest.lexical else None
    target = table_schema(table.schema, manifest.dim, manifest.vector_dtype, has_tokens=tokens is not None)

    def batches() -> Iterator[pa.RecordBatch]:
        row = manifest.next_row
        for documents, vectors in stream:
            yield table_batch(documents, vectors, row, target, tokens)
            row += len(vectors)

    return table.upserted(batches(), target) if upsert else (table.appended(batches(), target), 0)


def _refuse_ids(writer: Writer, source: Embeddings, config: IndexAddConfig) -> None:
    """Refuse ids that stand twice in an addition and, without `upsert`, those that are there already."""
    if config.upsert and source.manifest.derived_ids:
        raise InputError(
            f"{config.embeddings!r} was encoded from a corpus without ids, so its ids are places in files, which name "
            "other documents each time; give the corpus a column id, or make the index equal to a folder by `index "
            "sync`"
        )
    ids = source.ids()
    if pc.count_distinct(ids).as_py() < len(ids):
        counted = pc.value_counts(ids)
        twice = counted.filter(pc.greater(counted.field("counts"), 1)).field("values")[0].as_py()
        raise InputError(
            f"id {twice!r} stands twice in {config.embeddings!r}; ids must be unique: encode it again"
        )
    if config.upsert:
        return
    found = _found_ids(writer.table, ids)
    if found:
        remedy = (
            "they are places in files, so give the corpus a column id"
            if source.manifest.derived_ids
            else "set upsert: true to replace those documents, or leave them out"
        )
        raise InputError(
            f"{len(found)} ids of {config.embeddings!r} are in index version {writer.manifest.version} already, such "
            f"as {_shown(found)}; {remedy}"
        )


def _refuse_fixed(values: Mapping[str, Any], table: DocumentTable) -> None:
    known = [name for name in table.schema.names if name not in ("id", "text")]
    for name in values:
        if name in ("id", "text"):
            raise InputError(
                f"{name} cannot be set: the vector was made from it; encode the document and add it with upsert"
            )
        if name not in known:
            raise InputError(
                f"there is no column {name!r} to set; columns are {', '.join(map(repr, known)) or 'none'}"
            )


def _condition(filter: Mapping[str, Any] | str, table: DocumentTable) -> str:
    return filter if isinstance(filter, str) else to_sql(filter, table.schema)


def _given_ids(config: IndexDeleteConfig) -> list[str]:
    """All ids to delete; those of a file are read. Raises InputError where neither ids nor a filter name documents."""
    given = [*config.ids, *(read_ids(config.input.path) if config.input is not None else ())]
    if config.filter is None and not given:
        assert config.input is not None
        raise InputError(f"{config.input.path!r} holds no ids; there is nothing to delete")
    return given


def _found_ids(table: DocumentTable, wanted: Sequence[str] | pa.Array) -> list[str]:
    """Those of some ids that the table holds, in any order."""
    ids = wanted if isinstance(wanted, pa.Array) else pa.array(wanted, pa.string())
    return [name for batch in table.find("id", ids, ["id"]) for name in batch.column(0).to_pylist()]


def _unknown_ids(wanted: list[str], found: list[str], manifest: IndexManifest) -> str:
    unknown = sorted(set(wanted).difference(found))
    return (
        f"{len(unknown)} of {len(wanted)} ids are not in index version {manifest.version}: {_shown(unknown)}; they "
        "never were, or are deleted already: correct them, or set on_unknown: ignore"
    )


def _shown(names: list[str]) -> str:
    return ", ".join(map(repr, names[:_NAMES_SHOWN])) + (" and others" if len(names) > _NAMES_SHOWN else "")


def _run(rows: int, workers: WorkersConfig, index: Location) -> Run:
    if rows > _ROWS_IN_PROCESS:
        return on_ray(workers, index)
    return Run(threads=max(int(np.ceil(workers.num_cpus)), 1))
