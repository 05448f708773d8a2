"""`raytower index sync`: an index made equal to a folder of texts, encoding only what is new or changed."""

from __future__ import annotations

import dataclasses
import json
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from raytower.config import WorkersConfig
from raytower.data.config import InputConfig
from raytower.data.pieces import Survey, read_pieces, survey
from raytower.data.rejects import quarantine_of
from raytower.encoding.config import EncodeConfig
from raytower.errors import InputError, import_extra
from raytower.index.build import figures
from raytower.index.change import publish_change, refuse_other_origin, with_documents
from raytower.index.change_config import IndexSyncConfig
from raytower.index.embeddings import Embeddings
from raytower.index.manifest import SYNC_NAME, IndexManifest
from raytower.index.reader import check_fingerprint
from raytower.index.shard_build import digest_of
from raytower.index.table import DocumentTable, unified
from raytower.index.tasks import Run, on_ray
from raytower.index.versions import changing, open_manifest
from raytower.models.encoder import Encoder
from raytower.models.forward import ForwardEngine
from raytower.progress import log
from raytower.storage import Location

# So few texts are encoded in this process in less time than workers take to start.
TEXTS_IN_PROCESS = 10_000
_BLOCK_ROWS = 1_024
_HASH_KEYS = ("raytower-sync-01", "raytower-sync-02")
# Ids, and what is compared, as two hashes each: 128 bits never meet by chance.
_Hashes = NDArray[np.uint64]


class ReadyEncoder(Protocol):
    """An encoder at work, such as a `ForwardEngine`."""

    @property
    def fingerprint(self) -> str: ...

    def encode(self, texts: Sequence[str], prefix: str = "") -> NDArray[np.float32]:
        """Vectors of the texts, (len(texts), dim), with `prefix` put before each text."""


@dataclass
class Difference:
    """What makes an index and an input equal. Rows of the input by piece; ids of the documents that go."""

    encoded: list[pa.Table] = field(default_factory=list)
    """Documents whose text is new or changed."""
    values: list[pa.Table] = field(default_factory=list)
    """Documents with other values beside the same text."""
    gone: pa.Array = dataclasses.field(default_factory=lambda: pa.array([], pa.string()))
    added: int = 0
    changed: int = 0

    @property
    def counts(self) -> dict[str, int]:
        return {
            "added": self.added,
            "changed": self.changed,
            "set": sum(table.num_rows for table in self.values),
            "deleted": len(self.gone),
        }

    @property
    def is_empty(self) -> bool:
        return not self.encoded and not self.values and not len(self.gone)


def sync_index(config: IndexSyncConfig, engine: ReadyEncoder | None = None) -> dict[str, Any]:
    """Publish a version that equals the input; where it equals already, nothing is done.

    `engine` is the encoder where this process has it at work, set up as it was for the vectors of the index; without
    it the encoder is loaded.

    Returns:
        what `index build` returns, and added, changed (texts), set (other columns), deleted, encoded, rejected_rows.

    Raises:
        InputError: bad rows under on_error fail, columns whose types do not fit, more than max_gone gone.
        FormatError: another encoder than the index's. RaytowerError: another writer holds the index.
    """
    started = time.perf_counter()
    index = Location.of(config.index)
    encoder = _encoder(config, open_manifest(index), engine)
    found = survey(config.input, "corpus", on_error=config.on_error, quarantine=quarantine_of(index))
    with changing(index, "index sync") as writer:
        manifest = writer.manifest
        schema = unified(writer.table.schema, found.schema, config.input.path)
        difference = compare(found, writer.table, config.gone)
        _refuse_much_gone(config, difference, manifest)
        came = difference.added + difference.changed
        shown = {**difference.counts, "encoded": came, "rejected_rows": found.num_rejected}
        log(", ".join(f"{name} {count}" for name, count in shown.items()))
        if not difference.is_empty:
            table, replaced = writer.table, 0
            with _workplace(index) as folder:
                if difference.encoded:
                    found_schema, stream = _encoded(config, manifest, encoder, difference.encoded, folder)
                    table, replaced = with_documents(
                        writer, found_schema, stream, config.input.path, upsert=True
                    )
            if difference.values:
                table = table.widened(schema)
                for values in difference.values:
                    table = table.with_values(_typed(values.drop_columns(["text"]), table.schema))
            if len(difference.gone):
                table = table.without(difference.gone)
            # GPUs are for encoding.
            given = config.workers.model_dump(exclude={"num_gpus", "min"}, exclude_none=True)
            workers = WorkersConfig(**given)
            run = on_ray(workers, index) if came > 10 * TEXTS_IN_PROCESS else Run()
            identity = digest_of({"sync": [manifest.version, table.version]})
            went = replaced + len(difference.gone)
            manifest = publish_change(writer, table, "sync", identity, came=came, went=went, run=run)
    return {**figures(manifest, started, config.index), **shown}


@contextmanager
def _workplace(index: Location) -> Iterator[Location]:
    """A folder in the index, where every node sees it, for what the encoding job reads and writes; gone at the end.

    There is one writer, so that what lies there before was left by one that was killed; or by one that was frozen until
    its lease was lost, which may yet write there. So each has a folder of its own, and removes no other at its end.
    """
    above = index / SYNC_NAME
    above.delete()
    folder = above / uuid.uuid4().hex
    try:
        yield folder
    finally:
        folder.delete()
        if not above.children():
            above.delete()


def plan_sync(config: IndexSyncConfig) -> dict[str, Any]:
    """What a sync would do."""
    index = Location.of(config.index)
    manifest = open_manifest(index)
    _encoder(config, manifest)
    found = survey(config.input, "corpus", on_error="fail")
    table = DocumentTable.open(index, manifest.table_version)
    unified(table.schema, found.schema, config.input.path)
    difference = compare(found, table, config.gone)
    return {
        "parent": manifest.version,
        "rows_before": manifest.rows,
        "input_rows": found.num_rows,
        **difference.counts,
    }


def compare(found: Survey, table: DocumentTable, gone: Literal["delete", "keep"] = "delete") -> Difference:
    """How an input differs from a table: a join on hashes of the ids, 56 bytes a document while it lasts."""
    others = [name for name in found.schema.names if name not in ("id", "text")]
    known = _Known.of(table, [name for name in others if name in table.schema.names])
    difference = Difference()
    for documents in read_pieces(found.pieces):
        shared = _typed(documents.select(["id", "text", *known.columns]), table.schema)
        hashes = _hashes(shared, known.columns)
        places = known.find(hashes)
        _, _, same_text, same_values = (known.hashes[places] == hashes).T
        is_new = places < 0
        encoded = is_new | ~same_text
        # A column that the index lacks counts where it holds something.
        brings = _brings(documents, [name for name in others if name not in known.columns])
        values = ~encoded & (~same_values | brings)
        difference.added += int(is_new.sum())
        difference.changed += int((encoded & ~is_new).sum())
        if encoded.any():
            difference.encoded.append(documents.filter(pa.array(encoded)))
        if values.any():
            difference.values.append(documents.filter(pa.array(values)))
        known.seen[places[~is_new]] = True
    if gone == "delete" and not known.seen.all():
        difference.gone = _ids_of(table, known)
    return difference


@dataclass(frozen=True)
class _Known:
    """The documents of a table, by their `_hashes` (documents, 4): sorted by the first, a place for each."""

    hashes: _Hashes
    seen: NDArray[np.bool_]
    columns: list[str]

    @classmethod
    def of(cls, table: DocumentTable, columns: list[str]) -> _Known:
        parts = [_hashes(pa.table(batch), columns) for batch in table.scan(["id", "text", *columns])]
        joined = np.concatenate([np.empty((0, 4), np.uint64), *parts])
        # Column by column: the first is searched in.
        hashes = np.asfortranarray(joined[np.argsort(joined[:, 0], kind="stable")])
        return cls(hashes, np.zeros(len(hashes), np.bool_), columns)

    def find(self, hashes: _Hashes) -> NDArray[np.int64]:
        """The place of each id (N, 2 or more), -1 where the table lacks it."""
        if not len(self.hashes):
            return np.full(len(hashes), -1)
        places = np.minimum(np.searchsorted(self.hashes[:, 0], hashes[:, 0]), len(self.hashes) - 1)
        return np.where((self.hashes[places, :2] == hashes[:, :2]).all(axis=1), places, -1)


def _hashes(documents: pa.Table, columns: list[str]) -> _Hashes:
    """(N, 4): two of each document's id, one of its text, one of its values in some columns."""
    values = documents.select(columns).to_pylist() if columns else [None] * documents.num_rows
    rows = np.array([json.dumps(row, sort_keys=True, default=str) for row in values], dtype=object)
    others = [_hash(texts, _HASH_KEYS[0]) for texts in (documents["text"].to_numpy(), rows)]
    return np.column_stack([_id_hashes(documents["id"]), *others])


def _id_hashes(ids: pa.ChunkedArray) -> _Hashes:
    return np.column_stack([_hash(ids.to_numpy(), key) for key in _HASH_KEYS])


def _hash(texts: NDArray[Any], key: str) -> _Hashes:
    hashed: _Hashes = pd.util.hash_array(texts, hash_key=key, categorize=False)
    return hashed


def _brings(documents: pa.Table, columns: list[str]) -> NDArray[np.bool_]:
    valid = [documents[name].is_valid().to_numpy() for name in columns]
    return np.logical_or.reduce([np.zeros(documents.num_rows, np.bool_), *valid])


def _typed(documents: pa.Table, schema: pa.Schema) -> pa.Table:
    """The columns of a table in the types that the index has for them."""
    wanted = pa.schema([schema.field(name) for name in documents.column_names])
    try:
        return documents.cast(wanted)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return documents  # of a wider type: it differs, and is widened when it is written


def _ids_of(table: DocumentTable, known: _Known) -> pa.Array:
    """The ids of the documents that were not seen."""
    parts = []
    for batch in table.scan(["id"]):
        places = known.find(_id_hashes(pa.chunked_array([batch.column("id")])))
        parts.append(batch.column("id").filter(pa.array(~known.seen[places])))
    return pa.concat_arrays(parts)


def _encoder(
    config: IndexSyncConfig, manifest: IndexManifest, engine: ReadyEncoder | None = None
) -> Encoder | ReadyEncoder:
    encoder = engine or Encoder.load(config.encoder or manifest.encoder)
    check_fingerprint(manifest, encoder.fingerprint)
    return encoder


def _refuse_much_gone(config: IndexSyncConfig, difference: Difference, manifest: IndexManifest) -> None:
    if len(difference.gone) > config.max_gone * manifest.rows:
        raise InputError(
            f"{len(difference.gone)} of {manifest.rows} documents are not in {config.input.path!r}, more than max_gone "
            f"{config.max_gone:g}; nothing was changed: check that the input is whole, raise "
            "max_gone, or set gone: keep"
        )


def _encoded(
    config: IndexSyncConfig,
    manifest: IndexManifest,
    encoder: Encoder | ReadyEncoder,
    tables: list[pa.Table],
    folder: Location,
) -> tuple[pa.Schema, Iterator[tuple[pa.Table, NDArray[np.float32]]]]:
    """Documents with their vectors, made as those of the index were: here for few, by the encoding job for many."""
    made_so: dict[str, Any] = {
        "engine": manifest.engine,
        "dtype": manifest.compute_dtype,
        "max_length": manifest.max_length,
        "tokens_per_batch": config.tokens_per_batch,
    }
    if sum(table.num_rows for table in tables) <= TEXTS_IN_PROCESS:
        if isinstance(encoder, Encoder):
            encoder = ForwardEngine(encoder, **made_so)
        return tables[0].schema, _encoded_here(encoder, manifest, tables)
    import_extra("ray")
    from raytower.encoding.job import encode

    corpus = folder / "corpus.parquet"
    with corpus.open_write() as stream, pq.ParquetWriter(stream, tables[0].schema) as writer:
        for table in tables:
            writer.write_table(table)
    made = EncodeConfig(
        encoder=config.encoder or manifest.encoder,
        input=InputConfig(path=str(corpus), format="parquet", text_fields=["text"], id_field="id"),
        output=str(folder / "embeddings"),
        prefix=manifest.prefix,
        embedding_dtype=manifest.vector_dtype,
        workers=config.workers,
        **made_so,
    )
    encode(made)
    source = Embeddings(Location.of(made.output))
    refuse_other_origin(source.origin, manifest, config.input.path)
    files = range(len(source.manifest.files))
    return source.documents_schema(), (batch for file in files for batch in source.stream(file))


def _encoded_here(
    engine: ReadyEncoder, manifest: IndexManifest, tables: list[pa.Table]
) -> Iterator[tuple[pa.Table, NDArray[np.float32]]]:
    for table in tables:
        for start in range(0, table.num_rows, _BLOCK_ROWS):
            block = table.slice(start, _BLOCK_ROWS)
            vectors = engine.encode(block["text"].to_pylist(), manifest.prefix)
            if manifest.metric == "cosine":
                vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
            yield block, vectors
