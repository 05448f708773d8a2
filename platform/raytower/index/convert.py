"""`raytower index convert`: an index of format 2, whose shards keep their own documents, becomes format 3 in place.

Format 2 named its published version in index/CURRENT; versions/v000003/ holds its manifest, shards with documents, and
the numbers of deleted rows. It did not say by which engine and in which precision vectors were made: they are taken for
torch and float32, the defaults of encoding, so that `add` refuses vectors that were made otherwise.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import BaseModel, StringConstraints, ValidationError

from raytower.errors import FormatError, InputError
from raytower.index.build import (
    figures,
    ingest,
    lexical_entry,
    measured,
    refuse_missed_target,
    remove_work,
)
from raytower.index.compact import plan_anew, shards_anew
from raytower.index.config import BuiltKind, ExactDtype, IndexConvertConfig, TokensConfig
from raytower.index.faiss_import import import_faiss
from raytower.index.manifest import (
    EXACT_NAME,
    TABLE_NAME,
    VECTORS_NAME,
    VERSIONS_NAME,
    FileEntry,
    IndexManifest,
    Origin,
)
from raytower.index.shard import local_file
from raytower.index.shard_build import digest_of
from raytower.index.table import is_own
from raytower.index.target_queries import kept_queries
from raytower.index.tasks import Run, on_ray
from raytower.index.versions import (
    CURRENT_NAME,
    next_version,
    open_manifest,
    publish,
    published_version,
    writing,
)
from raytower.progress import log
from raytower.storage import Location

_DOCUMENTS_NAME = "documents.arrow"
_BATCH_ROWS = 4_096
_Name = Annotated[str, StringConstraints(pattern=r"^\w[\w-]*$")]  # becomes a path


class _Deleted(BaseModel):
    version: _Name
    rows: int
    file: FileEntry


class _Shard(BaseModel):
    version: _Name
    name: _Name
    rows: int
    kind: BuiltKind
    files: dict[str, FileEntry]
    deleted: _Deleted | None

    @property
    def live_rows(self) -> int:
        return self.rows - (self.deleted.rows if self.deleted else 0)


class Format2(BaseModel, arbitrary_types_allowed=True):
    """The version that an index of format 2 has published, as rows for the table; its files are the shards."""

    index: Location
    origin: Origin
    kind: BuiltKind
    parameters: dict[str, int]
    exact_dtype: ExactDtype | None
    placement: Any
    shards: tuple[_Shard, ...]
    recall_k: int
    recall_target: float

    @classmethod
    def open(cls, index: Location) -> Format2:
        """Raises InputError: nothing of format 2 is there, or only codes are. FormatError: a damaged manifest."""
        if not (index / CURRENT_NAME).is_file():
            raise InputError(f"{index} has no {CURRENT_NAME}, so it holds no index of format 2 to convert")
        version = (index / CURRENT_NAME).read_bytes().decode(errors="replace").strip()
        place = index / VERSIONS_NAME / version / "manifest.json"
        try:
            values = place.read_json()
            if values["format_version"] != 2:
                raise FormatError(f"{place} has format {values['format_version']!r}; only 2 is converted")
            origin = {name: values.get(name) for name in Origin.model_fields}
            made = {"engine": "torch", "compute_dtype": "float32"}
            former = cls.model_validate({**values, "index": index, "origin": {**origin, **made}})
        except (KeyError, TypeError, InputError, ValidationError) as error:
            raise FormatError(f"{place} is damaged or missing: {error}; build from embeddings") from error
        for shard in former.shards:
            if shard.kind in ("ivf_sq8", "ivf_pq") and EXACT_NAME not in shard.files and shard.live_rows:
                raise InputError(
                    f"shard {shard.version}/{shard.name} of {index} keeps codes and no whole vectors, which "
                    "format 3 is made of: build the index from its embeddings: `raytower index build`"
                )
        return former

    @property
    def rows(self) -> int:
        return self.first_row(len(self.shards))

    @property
    def dtype(self) -> ExactDtype:
        exact = all(EXACT_NAME in shard.files for shard in self.shards)
        return (self.exact_dtype if exact else None) or "float32"

    def identity(self) -> list[Any]:
        return [shard.model_dump(mode="json") for shard in self.shards]

    def groups(self) -> list[tuple[int, int]]:
        return [(number, number + 1) for number, shard in enumerate(self.shards) if shard.live_rows]

    def first_row(self, file: int) -> int:
        return sum(shard.live_rows for shard in self.shards[:file])

    def _folder(self, shard: _Shard) -> Location:
        return self.index / VERSIONS_NAME / shard.version / shard.name

    @cached_property
    def schema(self) -> pa.Schema:
        """The documents' columns by their old names, joined as format 2 did: null in one shard, float in another."""
        schemas = []
        for shard in self.shards:
            with (self._folder(shard) / _DOCUMENTS_NAME).open_read() as stream:
                schemas.append(pa.ipc.open_file(stream).schema.remove_metadata())
        return pa.unify_schemas(schemas, promote_options="permissive")

    @property
    def renamed(self) -> dict[str, str]:
        """New names of the columns whose names format 3 keeps for itself, or does not allow."""
        renamed: dict[str, str] = {}
        for name in self.schema.names:
            new = re.sub(r"[`.\0]", "_", name)
            if is_own(name) or new != name or not name:
                new = f"source_{new}"
                while new in self.schema.names or new in renamed.values():
                    new = f"source_{new}"
                renamed[name] = new
        return renamed

    def documents_schema(self) -> pa.Schema:
        return pa.schema([field.with_name(self.renamed.get(field.name, field.name)) for field in self.schema])

    def stream(self, file: int) -> Iterator[tuple[pa.Table, NDArray[Any]]]:
        """Documents that are not deleted and their vectors (rows, dim). Raises FormatError: a file was changed."""
        shard = self.shards[file]
        folder = self._folder(shard)
        paths = {name: _proved(folder / name, entry) for name, entry in shard.files.items()}
        live = np.ones(shard.rows, np.bool_)
        if shard.deleted:
            tombstones = self.index / VERSIONS_NAME / shard.deleted.version / "deleted"
            place = tombstones / f"{shard.version}-{shard.name}.npy"
            live[np.load(_proved(place, shard.deleted.file))] = False
        faiss = import_faiss()
        index = faiss.read_index(str(paths[VECTORS_NAME]), faiss.IO_FLAG_MMAP_IFC)
        exact = np.load(paths[EXACT_NAME], mmap_mode="r") if EXACT_NAME in paths else None
        renamed, start = self.renamed, 0
        reader = pa.ipc.open_file(pa.memory_map(str(paths[_DOCUMENTS_NAME])))
        for record in map(reader.get_batch, range(reader.num_record_batches)):
            record = record.rename_columns([renamed.get(name, name) for name in record.schema.names])
            for first in range(0, record.num_rows, _BATCH_ROWS):
                part = pa.table(record.slice(first, _BATCH_ROWS))
                kept = np.flatnonzero(live[start : start + part.num_rows])
                rows = start + kept
                if len(rows):
                    vectors = _whole(shard.kind, index, rows) if exact is None else exact[rows]
                    yield part.take(pa.array(kept)), vectors
                start += part.num_rows


def _whole(kind: BuiltKind, index: Any, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    """Whole vectors (N, D) of some rows of an index that keeps them."""
    if kind == "ivf_flat":
        index.make_direct_map()  # where each row stands in its list, found once
    whole = import_faiss().downcast_index(index.refine_index) if kind == "hnsw" else index
    vectors: NDArray[np.float32] = whole.reconstruct_batch(rows)
    return vectors


def _proved(place: Location, file: FileEntry) -> Path:
    """A local path with this very file. Raises FormatError where it is missing or was changed."""
    path = local_file(place, file)
    Location.of(path).prove(file.sha256, "build the index from its embeddings")
    return path


def convert_index(config: IndexConvertConfig, run: Run | None = None) -> dict[str, Any]:
    """Put the documents and vectors of the published version into a table, build shards over it and publish both.

    An index that was converted already is left as it is. What a killed conversion finished is taken up again.

    Returns:
        what `index build` returns, and converted.

    Raises:
        InputError: what does not fit, as shards of codes only, or a target that is missed under on_target_missed keep.
        FormatError: damage. RaytowerError: a task failed.
    """
    started, index = time.perf_counter(), Location.of(config.index)
    done = _newest(index)
    if done is not None:
        log(f"{index} is of format 3 already, at version {done.version}; nothing to convert")
    manifest = done or _converted(config, Format2.open(index), run or on_ray(config.workers, index))
    if config.remove_old:
        (index / CURRENT_NAME).delete()  # first: a killed removal leaves nothing that looks like an index
        for place in (index / VERSIONS_NAME).children():
            if re.fullmatch(r"v\d{6,}", place.name):
                place.delete()
    return {**figures(manifest, started, config.index), "converted": done is None}


def plan_convert(config: IndexConvertConfig) -> dict[str, Any]:
    """The plan for --dry-run. Raises as `convert_index`."""
    done = _newest(Location.of(config.index))
    if done is not None:
        return {"version": done.version, "converted": False}
    former = Format2.open(Location.of(config.index))
    plan = plan_anew(config, _draft(former))
    return {"converted": True, "rows": plan.rows, "kind": plan.kind, "shards": plan.shards}


def _newest(index: Location) -> IndexManifest | None:
    """The newest version of format 3. Raises InputError where it did not come of the files of format 2 beside it."""
    if not published_version(index):
        return None
    newest = open_manifest(index)
    if (index / CURRENT_NAME).is_file() and _draft(Format2.open(index)).identity not in newest.built:
        raise InputError(
            f"{index} holds version {newest.version} of format 3, not made of what its {CURRENT_NAME} names; "
            f"remove one of them: {CURRENT_NAME} and versions/v*, or versions/*.json and {TABLE_NAME}"
        )
    return newest


def _draft(former: Format2) -> IndexManifest:
    """The version to be, before there is a table and shards over it."""
    identity = digest_of({"convert": former.identity()})
    kept = former.model_dump(include={"kind", "parameters", "exact_dtype", "recall_k", "recall_target"})
    empty = {"applied": (), "shards": (), "indexed": (), "changed_rows": 0, "search_parameters": {"1": {}}}
    nothing = dict.fromkeys(("parent", "placement", "queries", "measured"))
    content = {**former.origin.model_dump(), **kept, **empty, **nothing}
    return IndexManifest(
        **content,
        version=next_version(None),
        operation="convert",
        identity=identity,
        built=(identity,),
        table_version=1,
        next_row=former.rows,
        rows=former.rows,
        kind_reason="",
        vector_dtype=former.dtype,
    )


def _converted(config: IndexConvertConfig, former: Format2, run: Run) -> IndexManifest:
    index, draft = former.index, _draft(former)
    config = config.model_copy(
        update={"placement": config.placement or ("cluster" if former.placement else "rows")}
    )
    target = config.target
    asked: dict[str, Any] = {
        "recall_k": target.k or draft.recall_k,
        "recall_target": target.recall or draft.recall_target,
        "queries": None if target.queries is None else kept_queries(index, draft.origin, target.queries),
    }
    plan_anew(config, draft)  # what does not fit is said before work
    for old, new in former.renamed.items():
        log(f"column {old!r} becomes {new!r}: format 3 does not allow that name")
    tokens = None if config.lexical is False else config.tokens or TokensConfig()
    table, _ = ingest(index, former, 0, [], run, tokens)
    asked["lexical"] = lexical_entry(index, table, tokens, run)
    draft = draft.model_copy(update={"table_version": table.version, **asked})
    draft = draft.model_copy(update=shards_anew(config, draft, run))
    manifest = measured(index, draft, run, config.seed)
    refuse_missed_target(manifest, target)
    with writing(index, "index convert"):
        publish(index, manifest)
    remove_work(index, digest_of(former.identity()))
    return manifest
