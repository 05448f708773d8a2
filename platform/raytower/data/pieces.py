"""Surveying an input once, and cutting it into pieces that any worker can read on its own.

`survey` goes through every row in one process, checks all rules and returns pieces; `read_piece` gives the good rows of
one piece. Both use the same parser, so what a worker reads is what was surveyed.
"""

from __future__ import annotations

import dataclasses
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raytower.config import OnError
from raytower.data import beir
from raytower.data.config import InputConfig
from raytower.data.copied import CopiedRows
from raytower.data.extras import ExtraTypes, build_table
from raytower.data.layouts import Source, detect_layout
from raytower.data.parquet import open_reader
from raytower.data.records import RecordKind, canonical_schema, is_corpus_like
from raytower.data.rejects import Rejects
from raytower.data.row_batch import Chunk, Rejection
from raytower.data.slices import Extent
from raytower.data.sources import find_files
from raytower.errors import InputError
from raytower.progress import log
from raytower.storage import Location

DEFAULT_ROWS_PER_PIECE = 8192
# lines, tsv and csv go together
_FORMAT_FAMILIES = {"jsonl": "jsonl", "json": "jsonl", "parquet": "columnar", "arrow": "columnar"}
_NAMED_FILES = 5
_NAMED_COLUMNS = 8
_BUCKETS = 16
_last = threading.local()


@dataclass(frozen=True)
class Picked:
    """Which rows of a piece's table are read: a bit for each, since millions may be."""

    bits: bytes
    of_rows: int
    """Good rows of the whole table."""

    @classmethod
    def of(cls, is_read: NDArray[np.bool_]) -> Picked:
        """`is_read` (N,) says it of each row of the whole table."""
        return cls(np.packbits(is_read).tobytes(), len(is_read))

    @property
    def is_read(self) -> NDArray[np.bool_]:
        """(N,) for each row of the whole table."""
        return np.unpackbits(np.frombuffer(self.bits, np.uint8), count=self.of_rows).astype(bool)

    def take(self, table: pa.Table) -> pa.Table:
        """The rows that are read, of the whole table."""
        return table.filter(pa.array(self.is_read))


@dataclass(frozen=True)
class Piece:
    """A run of rows that is read as one table. Picklable; the pieces of an input, in order, hold all its good rows."""

    source: Source | beir.JudgedPairs | CopiedRows
    index: int
    """Number of the piece within the input, from 0."""
    extent: Extent
    """Which bytes or rows of the source to read."""
    first_row: int
    """Good rows of the input before this piece."""
    num_rows: int
    """Good rows in this piece; at least 1."""
    schema: pa.Schema
    left_out: tuple[int, ...] = ()
    """Lines that parse well and yet are rejected: later rows with an id that an earlier row has."""
    parts: tuple[Piece, ...] = ()
    """If the piece joins many small files: one piece per file, and `source` and `extent` are the first one's."""
    picked: Picked | None = None
    """Which of these rows are read; None reads all. `num_rows` counts those that are."""
    label: str | None = None
    """The label of all these rows, whose file holds texts alone."""

    @property
    def runs(self) -> tuple[Piece, ...]:
        """The pieces to read one after another, each within one file: the parts, or the piece itself."""
        return self.parts or (self,)


@dataclass(frozen=True)
class Survey:
    """The result of a survey: an input's pieces, counts and schema."""

    pieces: tuple[Piece, ...]
    num_rows: int
    """Good rows: the sum over the pieces."""
    num_rejected: int
    """Rows in the quarantine file."""
    files: tuple[str, ...]
    bytes: int
    """Size of the files as stored."""
    schema: pa.Schema
    renamed_columns: tuple[tuple[str, str], ...] = ()
    """Columns that pass through under another name than the input gives them, each with that name."""
    derived_ids: bool = False
    """Some documents bring no id and got `<file stem>:<line>`."""
    quarantine_file: str | None = None
    set_aside: tuple[Piece, ...] = ()
    """Pieces with rows of the input that are not among those of `pieces`: dev rows of a training."""
    unread_columns: tuple[str, ...] = ()
    """Columns or keys that the rows have and their kind does not read, sorted; of a corpus, which passes columns on,
    none."""
    num_repeated: int = 0
    """Documents of candidates that were left out because their row has them already."""
    content: str | None = None
    """Names the rows by a hash of the files and of the way of reading them, where the survey was remembered."""


Remember = Callable[[Sequence[Source], int, Callable[[], Survey]], Survey]
"""The survey of files in pieces of so many rows, by the function if it is not known."""


def survey(
    input: InputConfig,
    kind: RecordKind,
    rows_per_piece: int = DEFAULT_ROWS_PER_PIECE,
    on_error: OnError | None = None,
    quarantine: Location | str | None = None,
    *,
    say: bool = True,
    remember: Remember | None = None,
    may_be_empty: bool = False,
) -> Survey:
    """Read every row of the input once, check it, and cut the input into pieces of at most `rows_per_piece` rows.

    `rows_per_piece` counts rows of the file; a candidates row with 3 positives gives 3 rows of the piece.
    Memory is bounded by one piece, plus eight bytes a row where rows bring ids, plus, for BEIR pairs, the judgements.
    on_error None means `fail` in a command without that key. Under `quarantine`, rejected rows are listed in a file
    in the folder `quarantine`, published when the survey ends. `say` names files that give no row on stderr.
    `may_be_empty` gives a survey without pieces where no file has a good row. `remember` is asked for what was surveyed
    before; not for a BEIR folder's pairs, of which there are few.

    Raises:
        InputError: nothing to read; under `fail`, the first row that breaks a rule or repeats an id, naming file, line
            and rule; under `quarantine`, a file that holds nothing but rejected rows.
    """
    if rows_per_piece < 1:
        raise InputError(f"rows_per_piece is {rows_per_piece}; a piece holds at least 1 row")
    folder = None if quarantine is None else Location.of(quarantine)
    with Rejects(on_error, folder, input.path, kind) as rejects:
        if beir.is_beir(input):
            return _survey_beir(input, kind, rows_per_piece, rejects)
        found = find_files(input.path, input.format)
        if say:
            say_files("passed over", found.ignored)
        layouts = [(file, detect_layout(file, kind, input)) for file in found.files]
        sources = [Source(file, layout) for file, layout in layouts if layout is not None]
        if not sources and not may_be_empty:
            raise InputError(f"{found.files[0]} holds no rows; give a file that has rows")
        _refuse_mixed_formats(input, sources)

        def scan() -> Survey:
            return _survey_sources(sources, kind, rows_per_piece, rejects, may_be_empty)

        surveyed = scan() if remember is None else remember(sources, rows_per_piece, scan)
        if not surveyed.num_rejected:
            rejects.finish()  # takes away what an earlier run has listed
        filled = {str(piece.source.file) for piece in surveyed.pieces if isinstance(piece.source, Source)}
        # One empty file must not stop a job, but the user must hear of it.
        if say:
            say_files("no row in", [str(file) for file in found.files if str(file) not in filled])
        return surveyed


def files_read(input: InputConfig, kind: RecordKind) -> list[Location]:
    """The files that a survey reads: not a BEIR folder's other splits, say, and nothing that is no data.

    Raises:
        InputError: there is no such input.
    """
    if beir.is_beir(input):
        return [source.file.location for source in _beir_sources(input, kind)]
    return [file.location for file in find_files(input.path, input.format).files]


def read_piece(piece: Piece) -> pa.Table:
    """The good rows of one piece, columns as `piece.schema`; the same rows every time.

    Raises:
        InputError: the file is gone, or has changed since it was surveyed.
    """
    if piece.picked is not None:
        whole = dataclasses.replace(piece, picked=None, num_rows=piece.picked.of_rows)
        return piece.picked.take(read_piece(whole))
    if piece.label is not None:
        texts = read_piece(dataclasses.replace(piece, label=None, schema=canonical_schema("lines")))["text"]
        labels = pa.repeat(piece.label, len(texts))
        return pa.table([texts, labels], schema=piece.schema)
    if piece.parts:
        return pa.concat_tables(read_pieces(piece.parts))
    if isinstance(piece.source, beir.JudgedPairs):
        return beir.read_judged_pairs(piece.source)
    if isinstance(piece.source, CopiedRows):
        return piece.source.read(piece.extent.start, piece.extent.end)
    assert isinstance(piece.source, Source)
    chunk = _read_chunk(piece)
    table = pa.concat_tables([build_table(rows, piece.schema) for rows in chunk.batches])
    if piece.left_out:
        table = table.filter(pa.array(~np.isin(chunk.lines, piece.left_out)))
    if len(table) != piece.num_rows:
        rule = f"{len(table)} good rows from line {piece.extent.first_line} on, expected {piece.num_rows}"
        raise piece.source.file.changed(rule)
    return table


def read_pieces(pieces: Iterable[Piece]) -> Iterator[pa.Table]:
    """The tables of several pieces, one for each. Given in order, a compressed file is read through once."""
    return map(read_piece, pieces)


def _read_chunk(piece: Piece) -> Chunk:
    # Pieces are mostly read in file order. A compressed file cannot seek, so its reader is kept with its position.
    assert isinstance(piece.source, Source)
    reader, _last.reader = getattr(_last, "reader", None), None  # dropped if the read fails half-way
    if reader is None or reader.source != piece.source:
        reader = open_reader(piece.source)
    chunk: Chunk = reader.read(piece.extent)
    if piece.source.file.compression or piece.source.layout.is_columnar:
        _last.reader = reader
    return chunk


def _refuse_mixed_formats(config: InputConfig, sources: Sequence[Source]) -> None:
    families = [_FORMAT_FAMILIES.get(source.layout.format, "text") for source in sources]
    for source, family in zip(sources, families, strict=True):
        if family != families[0]:
            raise InputError(
                f"{config.path!r} mixes formats: {sources[0].file} is {sources[0].layout.format}, {source.file} is "
                f"{source.layout.format}; name the files of one format with a "
                f"glob{config.remedy('or set input.format')}"
            )


def _survey_sources(
    sources: Sequence[Source],
    kind: RecordKind,
    rows_per_piece: int,
    rejects: Rejects,
    may_be_empty: bool = False,
) -> Survey:
    have_ids = any(source.layout.has_ids for source in sources)
    hashes: list[np.ndarray] = []
    types = ExtraTypes()
    derived_ids = False
    unread: set[str] = set()
    num_repeated = 0
    drafts: list[Piece] = []
    for source in sources:
        for chunk in open_reader(source).scan(rows_per_piece):
            for rows in chunk.batches:
                rejects.add(source.file, rows.rejections, chunk.raw)
                types.observe(rows, source.file)
                derived_ids |= rows.derived_ids
                unread |= rows.unread
                num_repeated += rows.num_repeated
            if num_rows := len(chunk.lines):
                drafts.append(Piece(source, 0, chunk.extent, 0, num_rows, canonical_schema(kind)))
                if have_ids:
                    # Python keys the hash of strings anew in each process; a survey runs in one.
                    hashes.append(np.fromiter(map(hash, chunk.values("id")), np.int64, num_rows))
    drafts = list(_without_duplicates(drafts, hashes, rejects)) if hashes else drafts
    own = sources[0].layout.schema if sources else canonical_schema(kind)
    surveyed = _finish(drafts, types.schema(own), sources, rejects)
    if not surveyed.pieces and not may_be_empty:
        raise InputError(_no_rows(sources, kind, surveyed.quarantine_file))
    return dataclasses.replace(
        surveyed,
        renamed_columns=tuple(types.renamed.items()),
        derived_ids=derived_ids,
        unread_columns=() if kind == "corpus" else tuple(sorted(unread)),
        num_repeated=num_repeated,
    )


def _without_duplicates(
    drafts: Sequence[Piece], hashes: Sequence[np.ndarray], rejects: Rejects
) -> Iterator[Piece]:
    """The drafts without rows whose id an earlier row has; these are refused or quarantined.

    Only drafts with a repeated hash are read again. Then the ids themselves are compared: two ids may share a hash.
    """
    repeated = _repeated(hashes)
    first_places: dict[str, str] = {}
    for draft, hashes_of_ids in zip(drafts, hashes, strict=True):
        suspects = np.flatnonzero(np.isin(hashes_of_ids, repeated))
        left_out: list[int] = []
        if len(suspects):
            chunk = _read_chunk(draft)
            assert isinstance(draft.source, Source)
            file = draft.source.file
            ids, lines = chunk.values("id"), chunk.lines.tolist()
            for identifier, line in ((ids[position], lines[position]) for position in suspects):
                first = first_places.setdefault(identifier, f"{file}:{line}")
                if first != f"{file}:{line}":
                    reason = f"id {identifier!r} is already the id of {first}; ids must be unique"
                    rejects.add(file, [Rejection(line, reason)], chunk.raw)
                    left_out.append(line)
        yield dataclasses.replace(draft, num_rows=draft.num_rows - len(left_out), left_out=tuple(left_out))


def _repeated(chunks: Sequence[np.ndarray]) -> np.ndarray:
    """Hashes that occur more than once. They are sorted bucket by bucket: sorting all at once would need three times
    their memory."""
    found = []
    for bucket in range(_BUCKETS):
        hashes = np.sort(np.concatenate([chunk[chunk % _BUCKETS == bucket] for chunk in chunks]))
        found.append(hashes[1:][hashes[1:] == hashes[:-1]])
    return np.concatenate(found)


def _finish(
    drafts: Iterable[Piece], schema: pa.Schema, sources: Sequence[Source], rejects: Rejects
) -> Survey:
    """Publish what was rejected, and number the drafts that have good rows."""
    quarantine_file = rejects.finish()
    pieces: list[Piece] = []
    num_rows = 0
    for draft in drafts:
        if draft.num_rows:
            pieces.append(dataclasses.replace(draft, index=len(pieces), first_row=num_rows, schema=schema))
            num_rows += draft.num_rows
    return Survey(
        pieces=tuple(pieces),
        num_rows=num_rows,
        num_rejected=rejects.count,
        files=tuple(str(source.file) for source in sources),
        bytes=sum(source.file.size_bytes for source in sources),
        schema=schema,
        quarantine_file=None if quarantine_file is None else str(quarantine_file),
    )


def _beir_sources(config: InputConfig, kind: RecordKind) -> tuple[Source, ...]:
    """What is read of a BEIR folder: its corpus, or for pairs the judgements of a split, queries and corpus.

    Raises:
        InputError: a file is missing, or the kind is another.
    """
    folder = beir.BeirFolder.of(config.path)
    if is_corpus_like(kind):
        return (folder.corpus(kind),)
    if kind != "pairs":
        raise InputError(
            f"{config.path}: a BEIR folder gives corpus and pairs records, no {kind}; give a file of {kind} records"
        )
    qrels = folder.qrels(config.split or "train", config.split_key)
    return (qrels, folder.queries(), folder.corpus("lines"))


def _no_rows(sources: Sequence[Source], kind: RecordKind, quarantine_file: str | None) -> str:
    if quarantine_file is None:
        after = " after its header" if sources[0].layout.first_line > 1 else ""
        return f"{sources[0].file} holds no rows{after}; give a file that has rows"
    return (
        f"{sources[0].file} holds no row that keeps the rules of {kind}; {quarantine_file} lists its rows with what is "
        "wrong. Check that the format and the kind are the right ones"
    )


def say_files(what: str, names: Sequence[str]) -> None:
    """Name files on stderr, the first few of them; nothing where there are none."""
    if names:
        more = f" and {len(names) - _NAMED_FILES} more" if len(names) > _NAMED_FILES else ""
        print(f"raytower: {what} {', '.join(names[:_NAMED_FILES])}{more}", file=sys.stderr)


def say_unread(path: str, kind: RecordKind, surveyed: Survey) -> None:
    """Name the columns of an input that its kind does not read; nothing where there are none."""
    if surveyed.unread_columns:
        names = ", ".join(map(repr, surveyed.unread_columns[:_NAMED_COLUMNS]))
        more = len(surveyed.unread_columns) - _NAMED_COLUMNS
        log(f"{path}: read as {kind}, of which {names}{f' and {more} more' if more > 0 else ''} are no part")


def _survey_beir(config: InputConfig, kind: RecordKind, rows_per_piece: int, rejects: Rejects) -> Survey:
    sources = _beir_sources(config, kind)
    if is_corpus_like(kind):
        return _survey_sources(sources, kind, rows_per_piece, rejects)
    schema = canonical_schema("pairs")
    qrels, queries, corpus = sources
    judged = beir.survey_pairs(qrels, queries, corpus, rows_per_piece, rejects)
    drafts = [
        Piece(pairs, 0, Extent(0, len(pairs.query_ids), 0), 0, len(pairs.query_ids), schema)
        for pairs in judged
    ]
    surveyed = _finish(drafts, schema, sources, rejects)
    if not surveyed.pieces:
        raise InputError(
            f"{sources[0].file} holds no judgement with a score above 0 whose query and document exist; "
            f"pairs need some{f'. Set {config.split_key} to another split' if config.split_key else ''}"
        )
    return surveyed
