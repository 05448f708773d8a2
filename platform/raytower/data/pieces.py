"""Surveying an input once, and cutting it into pieces that any worker can read on its own.

`survey` goes through every row in one process, checks all rules and returns pieces; `read_piece` gives the good rows of
one piece. Both use the same parser, so what a worker reads is what was surveyed.
"""

from __future__ import annotations

import dataclasses
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from raytower.config import OnError
from raytower.data import beir
from raytower.data.duplicates import IdHashes
from raytower.data.extras import ExtraTypes, build_table
from raytower.data.layouts import Source, detect_layout
from raytower.data.records import RecordKind, canonical_schema, is_corpus_like
from raytower.data.rejects import Rejects
from raytower.data.row_batch import Rejection
from raytower.data.scanning import Chunk, Extent, ExtentReader, scan
from raytower.data.sources import Found, InputConfig, find_files
from raytower.errors import InputError
from raytower.storage import Location

DEFAULT_ROWS_PER_PIECE = 8192
# lines, tsv and csv go together
_FORMAT_FAMILIES = {"jsonl": "jsonl", "json": "jsonl", "parquet": "columnar", "arrow": "columnar"}
_NAMED_FILES = 5
_last = threading.local()


@dataclass(frozen=True)
class Piece:
    """A run of rows that is read as one table. Picklable; the pieces of an input, in order, hold all its good rows."""

    source: Source | beir.JudgedPairs
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
    """Of a piece that many small files make together: one piece for each. `source` and `extent` are the first one's."""

    @property
    def runs(self) -> tuple[Piece, ...]:
        """What is read one after another for it, each within one file."""
        return self.parts or (self,)


@dataclass(frozen=True)
class Survey:
    """What an input holds."""

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
    """Some documents bring no id; theirs are places in files."""
    quarantine_file: str | None = None
    ignored_files: tuple[str, ...] = ()
    """Files in an input folder that were passed over, each with the reason."""


def survey(
    input: InputConfig,
    kind: RecordKind,
    rows_per_piece: int = DEFAULT_ROWS_PER_PIECE,
    on_error: OnError | None = None,
    quarantine: Location | str | None = None,
) -> Survey:
    """Read every row of the input once, check it, and cut the input into pieces of at most `rows_per_piece` rows.

    These are rows of the file: a row of candidates with several positives gives as many rows of the piece.
    Memory is bounded by one piece, plus eight bytes a row where rows bring ids, plus, for BEIR pairs, the judgements.
    on_error None is `fail` of a command that has no such key. With `quarantine`, rejected rows are listed in a file
    under `quarantine`, published when the survey ends.

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
        _say("passed over", found.ignored)
        layouts = [(file, detect_layout(file, kind, input)) for file in found.files]
        sources = [Source(file, layout) for file, layout in layouts if layout is not None]
        _refuse_mixed_formats(input, sources)
        surveyed = _survey_sources(sources, kind, rows_per_piece, rejects)
        _say_empty(input, found, surveyed)
        return dataclasses.replace(surveyed, ignored_files=found.ignored)


def read_piece(piece: Piece) -> pa.Table:
    """The good rows of one piece, columns as `piece.schema`; the same rows every time.

    Raises:
        InputError: the file is gone, or has changed since it was surveyed.
    """
    if piece.parts:
        return pa.concat_tables(read_pieces(piece.parts))
    key = _sequence_key(piece)
    if key is None or not isinstance(piece.source, Source):
        return next(read_pieces([piece]))
    # Whoever reads pieces one by one mostly goes forward through a file: keep the place in a file that has no seek.
    reader: ExtentReader | None = getattr(_last, "reader", None)
    if reader is None or reader.source != piece.source:
        reader = ExtentReader(piece.source)
    _last.reader = None  # dropped if the read fails half-way
    table = _read(piece, reader)
    _last.reader = reader
    return table


def read_pieces(pieces: Iterable[Piece]) -> Iterator[pa.Table]:
    """The tables of several pieces, one for each. In order, files that cannot be sought in are gone through once."""
    reader: ExtentReader | None = None
    for piece in pieces:
        if isinstance(piece.source, beir.JudgedPairs):
            yield _expect_rows(piece, beir.read_judged_pairs(piece.source))
            continue
        if reader is None or reader.source != piece.source:
            reader = ExtentReader(piece.source)
        yield _read(piece, reader)


def group_pieces(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """Pieces that are best read one after another by the same reader: of one compressed file, or of one row group."""
    groups: list[list[Piece]] = []
    last_key: object = None
    for piece in pieces:
        key = _sequence_key(piece)
        if key is None or key != last_key:
            groups.append([])
        groups[-1].append(piece)
        last_key = key
    return groups


def _read(piece: Piece, reader: ExtentReader) -> pa.Table:
    parsed = reader.read(piece.extent).parsed
    table = build_table(parsed, piece.schema)
    if piece.left_out:
        table = table.filter(pa.array(~np.isin(parsed.lines, piece.left_out)))
    return _expect_rows(piece, table)


def _sequence_key(piece: Piece) -> object:
    if isinstance(piece.source, beir.JudgedPairs):
        return "judged pairs" if piece.source.is_compressed else None
    file = piece.source.file
    if piece.extent.row_group is not None:
        return (file.location.path, piece.extent.row_group)
    return file.location.path if file.compression else None


def _expect_rows(piece: Piece, table: pa.Table) -> pa.Table:
    if len(table) != piece.num_rows:
        place = piece.source.file if isinstance(piece.source, Source) else piece.source.corpus.file
        raise InputError(
            f"{place} has changed since it was surveyed: {len(table)} good rows from line {piece.extent.first_line} "
            f"on, expected {piece.num_rows}; run the job again while the file stays as it is"
        )
    return table


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
    sources: Sequence[Source], kind: RecordKind, rows_per_piece: int, rejects: Rejects
) -> Survey:
    hashes = IdHashes() if any(source.layout.has_ids for source in sources) else None
    types = ExtraTypes()
    derived_ids = False
    drafts: list[Piece] = []
    schema = canonical_schema(kind)
    for source in sources:
        for chunk in scan(source, rows_per_piece):
            rejects.add(source.file, chunk.parsed.rejections, chunk.raw)
            types.observe(chunk.parsed, source.file)
            derived_ids |= chunk.parsed.derived_ids
            if chunk.parsed.num_rows:
                drafts.append(Piece(source, len(drafts), chunk.extent, 0, chunk.parsed.num_rows, schema))
                if hashes is not None:
                    hashes.add(chunk.parsed.columns["id"])
    if hashes is not None:
        drafts = _without_duplicates(drafts, hashes, rejects)
    quarantine_file = rejects.finish()
    pieces = _number(drafts, types.schema(kind))
    if sources and not pieces:
        raise InputError(_no_rows(sources, kind, quarantine_file))
    surveyed = _summarise(pieces, types.schema(kind), sources, rejects.count, quarantine_file)
    return dataclasses.replace(
        surveyed, renamed_columns=tuple(types.renamed.items()), derived_ids=derived_ids
    )


def _without_duplicates(drafts: list[Piece], hashes: IdHashes, rejects: Rejects) -> list[Piece]:
    """Refuse or quarantine rows whose id an earlier row has."""
    chunks = _ChunkReader(drafts)
    left_out: dict[int, list[int]] = {}
    for duplicate in hashes.duplicates(chunks.ids_and_lines):
        first_file = chunks.source(duplicate.first_chunk).file
        reason = f"id {duplicate.id!r} is already the id of {first_file}:{duplicate.first_line}; ids must be unique"
        chunk = chunks.read(duplicate.chunk)
        rejects.add(chunks.source(duplicate.chunk).file, [Rejection(duplicate.line, reason)], chunk.raw)
        left_out.setdefault(duplicate.chunk, []).append(duplicate.line)
    return [
        dataclasses.replace(draft, num_rows=draft.num_rows - len(lines), left_out=tuple(lines))
        for draft, lines in ((draft, left_out.get(number, [])) for number, draft in enumerate(drafts))
    ]


class _ChunkReader:
    """Reads surveyed chunks again, keeping the last one: duplicates come in file order."""

    def __init__(self, drafts: Sequence[Piece]):
        self._drafts = drafts
        self._reader: ExtentReader | None = None
        self._number = -1
        self._chunk: Chunk | None = None

    def source(self, number: int) -> Source:
        source = self._drafts[number].source
        assert isinstance(source, Source)
        return source

    def read(self, number: int) -> Chunk:
        if self._chunk is None or number != self._number:
            source = self.source(number)
            if self._reader is None or self._reader.source != source:
                self._reader = ExtentReader(source)
            self._number, self._chunk = number, self._reader.read(self._drafts[number].extent)
        return self._chunk

    def ids_and_lines(self, number: int) -> tuple[pa.Array, np.ndarray]:
        parsed = self.read(number).parsed
        return parsed.columns["id"], parsed.lines


def _number(drafts: Iterable[Piece], schema: pa.Schema) -> tuple[Piece, ...]:
    """The drafts that have good rows, numbered, each told how many rows come before it."""
    pieces: list[Piece] = []
    first_row = 0
    for draft in drafts:
        if draft.num_rows:
            pieces.append(dataclasses.replace(draft, index=len(pieces), first_row=first_row, schema=schema))
            first_row += draft.num_rows
    return tuple(pieces)


def _no_rows(sources: Sequence[Source], kind: RecordKind, quarantine_file: Location | None) -> str:
    if quarantine_file is None:
        after = " after its header" if sources[0].layout.first_line > 1 else ""
        return f"{sources[0].file} holds no rows{after}; give a file that has rows"
    return (
        f"{sources[0].file} holds no row that keeps the rules of {kind}; {quarantine_file} lists its rows with what is "
        "wrong. Check that the format and the kind are the right ones"
    )


def _say_empty(config: InputConfig, found: Found, surveyed: Survey) -> None:
    """Name the files that gave no row: one empty shard must not stop a job, and must not go unseen either."""
    filled = {str(piece.source.file) for piece in surveyed.pieces if isinstance(piece.source, Source)}
    if not filled:
        raise InputError(f"{found.files[0]} holds no rows; give a file that has rows")
    _say("no row in", [str(file) for file in found.files if str(file) not in filled])


def _say(what: str, names: Sequence[str]) -> None:
    if names:
        more = f" and {len(names) - _NAMED_FILES} more" if len(names) > _NAMED_FILES else ""
        print(f"raytower: {what} {', '.join(names[:_NAMED_FILES])}{more}", file=sys.stderr)


def _survey_beir(config: InputConfig, kind: RecordKind, rows_per_piece: int, rejects: Rejects) -> Survey:
    folder = beir.BeirFolder.of(config.path)
    if is_corpus_like(kind):
        return _survey_sources([folder.corpus(kind)], kind, rows_per_piece, rejects)
    if kind != "pairs":
        raise InputError(
            f"{config.path}: a BEIR folder gives corpus and pairs records, no {kind}; give a file of {kind} records"
        )
    schema = canonical_schema("pairs")
    split = config.split or "train"
    judged = beir.survey_pairs(folder, split, rows_per_piece, rejects)
    quarantine_file = rejects.finish()
    drafts = [
        Piece(pairs, 0, Extent(0, pairs.num_rows, pairs.first_line), 0, pairs.num_rows, schema)
        for pairs in judged
    ]
    pieces = _number(drafts, schema)
    if not pieces:
        raise InputError(
            f"{folder.qrels(split).file} holds no judgement with a score above 0 whose query and document exist; "
            "pairs need some. Set input.split to another split"
        )
    files = [folder.qrels(split), folder.queries(), folder.corpus("lines")]
    return _summarise(pieces, schema, files, rejects.count, quarantine_file)


def _summarise(
    pieces: tuple[Piece, ...],
    schema: pa.Schema,
    sources: Sequence[Source],
    num_rejected: int,
    quarantine_file: Location | None,
) -> Survey:
    return Survey(
        pieces=pieces,
        num_rows=sum(piece.num_rows for piece in pieces),
        num_rejected=num_rejected,
        files=tuple(str(source.file) for source in sources),
        bytes=sum(source.file.size_bytes for source in sources),
        schema=schema,
        quarantine_file=None if quarantine_file is None else str(quarantine_file),
    )
