"""Texts of this process into an index: built by the first call, made equal to the texts by each later one."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from raytower.config import make_config
from raytower.data.config import InputConfig
from raytower.data.extras import stored_name
from raytower.data.pieces import Survey, read_piece, survey
from raytower.data.visible import describe_unseen, shows_nothing
from raytower.encoding.config import EncodeConfig
from raytower.encoding.manifest import EmbeddingsFile, EmbeddingsManifest
from raytower.encoding.parts import part_name, write_part
from raytower.errors import InputError, import_extra
from raytower.index.build import build_index
from raytower.index.change import refuse_other_origin
from raytower.index.change_config import IndexSyncConfig
from raytower.index.config import IndexBuildConfig, IndexKind
from raytower.index.faiss_import import import_faiss
from raytower.index.sync import TEXTS_IN_PROCESS, sync_index
from raytower.index.tasks import Run
from raytower.index.versions import index_folder, open_manifest, published_version
from raytower.library.inputs import items_of, name_of, shown, texts_of
from raytower.library.models import ENCODER, Encoder, load_encoder
from raytower.storage import Location, absolute_if_local


def index_texts(
    texts: Iterable[str | Mapping[str, Any]],
    encoder: Encoder | str | Path,
    output: str | Path,
    *,
    prefix: str | None = None,
    kind: IndexKind = "auto",
    indexed: Sequence[str] = (),
    gone: Literal["delete", "keep"] = "delete",
    max_gone: float = 0.5,
) -> dict[str, Any]:
    """Put texts into the index at `output`, which `open_index` opens.

    The first call builds it. A later one makes it equal to the texts, as `raytower index sync` does, encodes only what
    is new or changed, and does not disturb readers of the version before. This process encodes up to 10,000 texts;
    Ray's workers encode and index more (extra [ray]). Steps are logged on stderr.

    Args:
        texts: strings, whose ids are their positions ("0", "1", …); or mappings with `text`, `id` (the position where
            there is none) and any other columns, which filters may ask. A column has one type.
        encoder: what makes the vectors; an `Encoder`, or the name of one. The index remembers it by name.
        output: a folder or a URI of remote storage.
        prefix: put before each text when it is encoded; None is the encoder's own for documents.
        kind: of the index, see docs/index.md; auto chooses by number of documents.
        indexed: columns that filters ask often; each gets a scalar index.
        gone: whether documents that are no longer among the texts are deleted.
        max_gone: the share of the index that one call may delete, from 0 to 1.

    Returns:
        `version`, `kind`, `rows` and what else `raytower index build` says; `added`, `changed` (texts), `set` (other
        columns), `deleted`, `encoded`.

    Raises:
        InputError: no texts, a blank one, an id that stands twice, wrong types, more than `max_gone` gone; an
            encoder, prefix, kind or indexed columns other than the index has; an output that is a file, or a folder
            of something else. Nothing is changed then.
        MissingExtraError: FAISS is not installed, or Ray, for more than 10,000 texts.
        RaytowerError: another writer holds the index.

    >>> encoder = raytower.load_encoder(encoder_dir)
    >>> texts = [{"id": "refund", "text": "How to get a refund"}, {"id": "hours", "text": "Opening hours"}]
    >>> raytower.index_texts(texts, encoder, output_dir)["version"]
    '000001'
    >>> texts.append({"id": "address", "text": "Where to find us"})
    >>> figures = raytower.index_texts(texts, encoder, output_dir)
    >>> figures["version"], figures["rows"], figures["encoded"]
    ('000002', 3, 1)
    """
    documents = _documents(texts)
    asked = texts_of(indexed, "indexed")
    job = _job(encoder, prefix, output)
    with tempfile.TemporaryDirectory(prefix="raytower-texts-") as name, _faiss_threads_kept() as num_threads:
        corpus = Path(name) / "texts.parquet"
        pq.write_table(documents, corpus)
        with _said_of_texts(corpus):
            if published_version(index_folder(job.output)) is not None:
                _refuse_other_settings(job, kind, asked)
                return job.sync(corpus, gone, max_gone)
            job.sync_config(corpus, gone, max_gone)  # what a later call will be told is wrong is wrong now
            return job.build(corpus, Path(name) / "embeddings", kind, asked, num_threads)


@dataclass(frozen=True)
class _Job:
    """What makes the vectors, and where they go."""

    encoder: Encoder
    prefix: str
    output: str

    @property
    def made(self) -> dict[str, Any]:
        """What vectors must share to be compared."""
        engine, dtype = self.encoder.compute
        return {
            "fingerprint": self.encoder.fingerprint,
            "prefix": self.prefix,
            "max_length": self.encoder.engine.max_length,
            "engine": engine,
            "compute_dtype": dtype,
        }

    def build(
        self, corpus: Path, embeddings: Path, kind: IndexKind, indexed: Sequence[str], num_threads: int
    ) -> dict[str, Any]:
        """The first version of the index."""
        found = survey(_input(corpus), "corpus")
        values = {
            "embeddings": str(embeddings),
            "output": self.output,
            "kind": kind,
            "indexed": list(indexed),
        }
        config = make_config(IndexBuildConfig, values, source="index_texts")
        if found.num_rows > TEXTS_IN_PROCESS:
            import_extra("ray")
            from raytower.encoding.job import encode

            encode(self._encode_config(corpus, embeddings))
            figures = build_index(config)
        else:
            self._encode_here(found, Location.of(embeddings))
            figures = build_index(config, Run(threads=num_threads))
        came = found.num_rows
        return {**figures, "added": came, "changed": 0, "set": 0, "deleted": 0, "encoded": came}

    def sync(self, corpus: Path, gone: Literal["delete", "keep"], max_gone: float) -> dict[str, Any]:
        """The version of the index that equals the texts."""
        figures = sync_index(self.sync_config(corpus, gone, max_gone), self.encoder.shared)
        del figures["rejected_rows"]
        return figures

    def sync_config(self, corpus: Path, gone: Literal["delete", "keep"], max_gone: float) -> IndexSyncConfig:
        values = {"index": self.output, "encoder": self.encoder.name, "gone": gone, "max_gone": max_gone}
        return make_config(IndexSyncConfig, {**values, "input": _input(corpus)}, source="index_texts")

    def _encode_here(self, found: Survey, folder: Location) -> None:
        """The embeddings folder of a corpus, made in this process."""
        files = []
        for piece in found.pieces:
            table, part = read_piece(piece), folder / part_name(piece)
            write_part(part, table, self.encoder.shared.encode(table["text"].to_pylist(), self.prefix), {})
            size, sha256 = part.size_bytes(), part.sha256()
            files.append(EmbeddingsFile(name=part.name, rows=table.num_rows, bytes=size, sha256=sha256))
        model = self.encoder.engine.encoder
        EmbeddingsManifest(
            **self.made,
            encoder=absolute_if_local(self.encoder.name),
            dim=self.encoder.dim,
            dtype="float32",
            normalised=model.normalised,
            similarity=model.settings.similarity,
            query_prefix=self.encoder.prefix("query"),
            rows=found.num_rows,
            files=tuple(files),
        ).write(folder)

    def _encode_config(self, corpus: Path, embeddings: Path) -> EncodeConfig:
        """The same by `raytower encode`."""
        engine, dtype = self.encoder.compute
        values = {
            "encoder": self.encoder.name,
            "input": _input(corpus),
            "output": str(embeddings),
            "prefix": self.prefix,
            "max_length": self.encoder.engine.max_length,
            "engine": engine,
            "dtype": dtype,
        }
        return make_config(EncodeConfig, values, source="index_texts")


def _job(encoder: Any, prefix: Any, output: Any) -> _Job:
    """Raises InputError where one of them is of another kind than `index_texts` takes."""
    place = name_of(output, "output", "a folder or a URI for the index")
    if prefix is not None and not isinstance(prefix, str):
        raise InputError(f"prefix is {shown(prefix)}; it must be a text, or None for the encoder's own")
    ready = encoder if isinstance(encoder, Encoder) else load_encoder(name_of(encoder, "encoder", ENCODER))
    return _Job(ready, ready.prefix("document") if prefix is None else prefix, place)


def _input(corpus: Path) -> InputConfig:
    return InputConfig(path=str(corpus), format="parquet", text_fields=["text"], id_field="id")


def _documents(texts: Iterable[str | Mapping[str, Any]]) -> pa.Table:
    """Texts as rows with id, text and the other columns. Raises InputError as `index_texts`."""
    items = items_of(texts)
    if items is None:
        raise InputError(
            f"texts is {shown(texts)}; it must be a list of strings or of mappings with a text (of a data frame "
            'that is `.to_dict("records")`)'
        )
    rows = [_row(item, place) for place, item in enumerate(items)]
    if not rows:
        raise InputError("texts is empty; an index holds at least one text")
    first: dict[str, int] = {}
    for place, row in enumerate(rows):
        if first.setdefault(row["id"], place) != place:
            raise InputError(
                f"texts[{place}] has the id {row['id']!r}, which texts[{first[row['id']]}] has already; ids must be "
                "unique"
            )
    names = dict.fromkeys(name for row in rows for name in row)
    table = pa.table({name: _column(name, [row.get(name) for row in rows]) for name in names})
    for place in shows_nothing(table["text"]).nonzero()[0].tolist():
        raise InputError(
            f"texts[{place}]: {describe_unseen('text', rows[place]['text'])}; leave it out, or give it a text"
        )
    return table


def _row(item: Any, place: int) -> dict[str, Any]:
    if isinstance(item, str):
        return {"id": str(place), "text": item}
    if not isinstance(item, Mapping):
        raise InputError(f"texts[{place}] is {shown(item)}; it must be a string, or a mapping with a text")
    row = {"id": str(place), **item}
    for name in ("id", "text"):
        if not isinstance(row.get(name), str):
            raise InputError(f"texts[{place}] has the {name} {shown(row.get(name))}; it must be a string")
    for name in row:
        if name not in ("id", "text") and (not isinstance(name, str) or stored_name(name) != name):
            raise InputError(
                f"texts[{place}] has a column {name!r}, a name that the index keeps for itself or cannot store; "
                "rename it"
            )
    return row


def _column(name: str, values: list[Any]) -> pa.Array:
    try:
        column = pa.array(values, pa.string() if name in ("id", "text") else None)
        # What Parquet, in which the texts travel, does not hold: objects without members, intervals of months.
        pq.write_table(pa.table({name: column[:1]}), pa.BufferOutputStream())
    except (ValueError, TypeError, OverflowError, NotImplementedError) as error:  # Arrow's own are of these
        raise InputError(
            f"column {name!r} of the texts cannot be stored: {error}; give it one type in all texts"
        ) from error
    return column


def _refuse_other_settings(job: _Job, kind: IndexKind, indexed: Sequence[str]) -> None:
    """Raises InputError where an index has been made in another way than is asked for now."""
    manifest = open_manifest(job.output)
    refuse_other_origin(manifest.origin.model_copy(update=job.made), manifest, job.encoder.name)
    remedy = f"leave it out, choose another output, or build {job.output!r} anew by `raytower index build`"
    if kind not in ("auto", manifest.kind):
        raise InputError(f"kind is {kind!r}, but {job.output!r} was built as {manifest.kind!r}; {remedy}")
    if not set(indexed) <= set(manifest.indexed):
        raise InputError(
            f"indexed is {list(indexed)}, but {job.output!r} was built with {list(manifest.indexed)}; {remedy}"
        )


@contextmanager
def _said_of_texts(corpus: Path) -> Iterator[None]:
    """What is wrong with the file that the texts travel in is said of them: `texts:3`, counted from 1."""
    try:
        yield
    except InputError as error:
        raise type(error)(
            str(error).replace(repr(str(corpus)), "texts").replace(str(corpus), "texts")
        ) from error


@contextmanager
def _faiss_threads_kept() -> Iterator[int]:
    """FAISS's number of threads, which steps of a build set for this process, and which is put back after them."""
    faiss = import_faiss()
    before = faiss.omp_get_max_threads()
    try:
        yield before
    finally:
        faiss.omp_set_num_threads(before)
