"""BEIR folders: corpus.jsonl (_id, title, text), queries.jsonl (_id, text) and qrels/<split>.tsv (query-id, corpus-id,
score, with that header).

Judged pairs are joined without holding the corpus: the survey notes where the judged queries and documents lie in
their files, and a worker reads just those lines.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from raytower.data.layouts import Layout, Source, read_head, split_first_line
from raytower.data.records import RecordField, RecordKind, canonical_schema, fields_of
from raytower.data.rejects import Rejects
from raytower.data.row_batch import Rejection
from raytower.data.rows import parse_slice
from raytower.data.scanning import Chunk, scan
from raytower.data.slices import RangeReader, Slice
from raytower.data.sources import COMPRESSION_SUFFIXES, InputConfig, SourceFile, is_glob, single_file
from raytower.errors import InputError
from raytower.storage import Location

QRELS_HEADER = ("query-id", "corpus-id", "score")
_CHUNK_ROWS = 8192
# Lines nearer to each other than this are fetched by one read, as long as the read stays below the limit.
_GAP_BYTES = 64 * 1024
_RUN_BYTES = 8 * 1024 * 1024
_IDENTIFIER = RecordField("id", ("_id", "id"), "id")


def is_beir(config: InputConfig) -> bool:
    """Whether the input is a BEIR folder: so configured, or, under auto, a folder with a BEIR folder's files."""
    if config.format == "beir":
        return True
    if config.format != "auto" or is_glob(config.path):
        return False
    root = Location.of(config.path)
    if not root.is_dir():
        return False

    def has(*names: str) -> bool:
        return any((root / name).exists() for name in names)

    return has(*_names_of("corpus.jsonl")) and has("qrels", *_names_of("queries.jsonl"))


@dataclass(frozen=True)
class BeirFolder:
    """The files of one BEIR data set; each may be compressed."""

    root: Location

    @staticmethod
    def of(path: str) -> BeirFolder:
        """Raises InputError where there is no such folder."""
        root = Location.of(path)
        if not root.is_dir():
            raise InputError(
                f"format beir needs a folder with corpus.jsonl, queries.jsonl and qrels/, and {path!r} is no folder; "
                "check the path"
            )
        return BeirFolder(root)

    def corpus(self, kind: RecordKind) -> Source:
        """corpus.jsonl as records of `kind` (corpus or lines); title and text joined, either may be empty."""
        file = self._file(self.root, "corpus.jsonl")
        return _text_source(file, kind, ("title", "text"))

    def queries(self) -> Source:
        """queries.jsonl as records of ids and texts."""
        return _text_source(self._file(self.root, "queries.jsonl"), "lines", ("text",))

    def qrels(self, split: str) -> Source:
        """qrels/<split>.tsv as scored records whose query and document are ids.

        Raises:
            InputError: there is no such split, or the file's first line is not BEIR's header.
        """
        file = self._file(self.root / "qrels", f"{split}.tsv", self._splits())
        line, _, after_line = split_first_line(read_head(file))
        columns = tuple(line.split("\t"))
        if not set(QRELS_HEADER) <= set(columns):
            raise InputError(
                f"{file}:1: no header; the first line of a qrels file is {'<TAB>'.join(QRELS_HEADER)}, and here it is "
                f"{'<TAB>'.join(columns)[:120]!r}; add the header"
            )
        fields = (
            RecordField("query", ("query-id",)),
            RecordField("document", ("corpus-id",)),
            RecordField("label", ("score",), "number"),
        )
        return Source(file, Layout("scored", "tsv", fields, columns, body_start=after_line, first_line=2))

    def _splits(self) -> str:
        found = [re.sub(r"\.tsv(\.\w+)?$", "", place.name) for place in (self.root / "qrels").children()]
        return f"; input.split may be one of: {', '.join(found)}" if found else ""

    def _file(self, folder: Location, name: str, remedy: str = "") -> SourceFile:
        places = [place for place in folder.children() if place.name in _names_of(name)]
        if not places:
            raise InputError(f"BEIR folder {self.root}: no {(folder / name).path} (nor compressed){remedy}")
        return single_file(places[0])


def read_qrels(path: str, split: str = "test") -> dict[str, dict[str, float]]:
    """All judgements of a split, zeros too: query id → document id → score, in file order.

    Raises:
        InputError: the file is missing, has no header, or a row breaks a rule or judges a document twice.
    """
    judged: dict[str, dict[str, float]] = {}
    with Rejects(None, None, path, "qrels") as rejects:
        for judgement in _judgements(BeirFolder.of(path).qrels(split), rejects):
            judged.setdefault(judgement.query_id, {})[judgement.document_id] = judgement.score
    return judged


def read_queries(path: str) -> dict[str, str]:
    """Query id → text, in file order. Raises InputError for a row that breaks a rule or repeats an id."""
    queries: dict[str, str] = {}
    lines: dict[str, int] = {}
    source = BeirFolder.of(path).queries()
    with Rejects(None, None, path, "queries") as rejects:
        for chunk in scan(source, _CHUNK_ROWS):
            rejects.add(source.file, chunk.parsed.rejections, chunk.raw)
            for identifier, text, line in _id_text_line(chunk):
                if identifier in queries:
                    rejects.add(
                        source.file, [_repeated(source, identifier, line, lines[identifier])], chunk.raw
                    )
                queries[identifier], lines[identifier] = text, line
    return queries


@dataclass(frozen=True)
class JudgedPairs:
    """Judged pairs of one piece, and where their texts lie.

    Spans are int64 [pairs, 2]: the bytes at which a line starts and ends.
    """

    queries: Source
    corpus: Source
    first_line: int
    """Line of the first of them in the qrels file."""
    query_ids: tuple[str, ...]
    document_ids: tuple[str, ...]
    query_spans: np.ndarray = field(compare=False, repr=False)
    document_spans: np.ndarray = field(compare=False, repr=False)

    @property
    def num_rows(self) -> int:
        return len(self.query_ids)

    @property
    def is_compressed(self) -> bool:
        return self.corpus.file.compression is not None or self.queries.file.compression is not None


def survey_pairs(folder: BeirFolder, split: str, rows_per_piece: int, rejects: Rejects) -> list[JudgedPairs]:
    """The judgements with a score above 0, cut into pieces. Memory: the judgements, and a span for each judged text.

    Every row of the three files is checked; a judgement whose query or document does not exist is rejected too.
    """
    qrels, queries, corpus = folder.qrels(split), folder.queries(), folder.corpus("lines")
    judgements = [judgement for judgement in _judgements(qrels, rejects) if judgement.score > 0]
    query_places = _locate(queries, {judgement.query_id for judgement in judgements}, rejects)
    document_places = _locate(corpus, {judgement.document_id for judgement in judgements}, rejects)
    unknown: dict[int, str] = {}
    good = []
    for judgement in judgements:
        if judgement.query_id not in query_places:
            unknown[judgement.line] = f"query-id {judgement.query_id!r} is not in {queries.file}"
        elif judgement.document_id not in document_places:
            unknown[judgement.line] = f"corpus-id {judgement.document_id!r} is not in {corpus.file}"
        else:
            good.append(judgement)
    _reject_lines(qrels, unknown, rejects)
    return [
        JudgedPairs(
            queries=queries,
            corpus=corpus,
            first_line=some[0].line,
            query_ids=tuple(judgement.query_id for judgement in some),
            document_ids=tuple(judgement.document_id for judgement in some),
            query_spans=np.array(
                [query_places[judgement.query_id][:2] for judgement in some], dtype=np.int64
            ),
            document_spans=np.array(
                [document_places[judgement.document_id][:2] for judgement in some], dtype=np.int64
            ),
        )
        for some in (good[start : start + rows_per_piece] for start in range(0, len(good), rows_per_piece))
    ]


def read_judged_pairs(pairs: JudgedPairs) -> pa.Table:
    """The pairs with their texts, in qrels order. Raises InputError where a file has changed since it was surveyed."""
    columns = {
        "query": _fetch(pairs.queries, pairs.query_ids, pairs.query_spans),
        "document": _fetch(pairs.corpus, pairs.document_ids, pairs.document_spans),
        "query_id": list(pairs.query_ids),
        "document_id": list(pairs.document_ids),
    }
    return pa.table(columns, schema=canonical_schema("pairs"))


@dataclass(frozen=True, slots=True)
class _Judgement:
    query_id: str
    document_id: str
    score: float
    line: int


def _judgements(source: Source, rejects: Rejects) -> Iterator[_Judgement]:
    seen: dict[tuple[str, str], tuple[int, float]] = {}
    for chunk in scan(source, _CHUNK_ROWS):
        rejects.add(source.file, chunk.parsed.rejections, chunk.raw)
        columns = [chunk.parsed.columns[name].to_pylist() for name in ("query", "document", "label")]
        for query_id, document_id, score, line in zip(*columns, chunk.parsed.lines.tolist(), strict=True):
            first, known_score = seen.setdefault((query_id, document_id), (line, score))
            if known_score != score:
                reason = (
                    f"query-id {query_id!r} and corpus-id {document_id!r} are judged {known_score:g} in line {first} "
                    f"and {score:g} here"
                )
                rejects.add(source.file, [Rejection(line, reason)], chunk.raw)
            elif first == line:  # the same judgement once more says nothing new
                yield _Judgement(query_id, document_id, score, line)


def _locate(source: Source, wanted: set[str], rejects: Rejects) -> dict[str, tuple[int, int, int]]:
    """For each wanted id: start byte, end byte and number of its line. The whole file is checked on the way."""
    places: dict[str, tuple[int, int, int]] = {}
    for chunk in scan(source, _CHUNK_ROWS):
        rejects.add(source.file, chunk.parsed.rejections, chunk.raw)
        assert isinstance(chunk.content, Slice)
        newlines = np.flatnonzero(np.frombuffer(chunk.content.data, np.uint8) == 10)
        # Line i of the chunk is [bounds[i], bounds[i + 1] - 1): without its newline.
        bounds = np.concatenate(([0], newlines + 1, [len(chunk.content.data) + 1])) + chunk.extent.start
        for identifier, _, line in _id_text_line(chunk):
            if identifier not in wanted:
                continue
            if identifier in places:
                rejects.add(
                    source.file, [_repeated(source, identifier, line, places[identifier][2])], chunk.raw
                )
                continue
            number = line - chunk.extent.first_line
            places[identifier] = (int(bounds[number]), int(bounds[number + 1]) - 1, line)
    return places


def _fetch(source: Source, ids: Sequence[str], spans: np.ndarray) -> list[str]:
    """The texts of the lines at `spans` (int64 [n, 2]), whose ids must be `ids`."""
    lines: list[bytes] = []
    with RangeReader(source.file) as reader:
        for run in _runs(np.unique(spans, axis=0)):
            start = int(run[0, 0])
            data = reader.read(start, int(run[-1, 1]) - start)
            lines += [data[begin - start : end - start] for begin, end in run.tolist()]
    parsed = parse_slice(Slice(0, 1, b"\n".join(lines)), source)
    texts = dict(zip(parsed.columns["id"].to_pylist(), parsed.columns["text"].to_pylist(), strict=True))
    missing = next((identifier for identifier in ids if identifier not in texts), None)
    if missing is not None:
        raise InputError(
            f"{source.file} has changed since it was surveyed: id {missing!r} is no longer where it was; run the job "
            "again while the file stays as it is"
        )
    return [texts[identifier] for identifier in ids]


def _runs(spans: np.ndarray) -> Iterator[np.ndarray]:
    """Cut sorted spans into runs that are near enough to each other to be fetched by one read."""
    begin = 0
    for number in range(1, len(spans) + 1):
        is_last = number == len(spans)
        if (
            is_last
            or spans[number, 0] - spans[number - 1, 1] > _GAP_BYTES
            or spans[number, 1] - spans[begin, 0] > _RUN_BYTES
        ):
            yield spans[begin:number]
            begin = number


def _reject_lines(source: Source, reasons: dict[int, str], rejects: Rejects) -> None:
    if not reasons:
        return
    for chunk in scan(source, _CHUNK_ROWS):
        lines = [line for line in chunk.parsed.lines.tolist() if line in reasons]
        rejects.add(source.file, [Rejection(line, reasons[line]) for line in lines], chunk.raw)


def _text_source(file: SourceFile, kind: RecordKind, text_fields: tuple[str, ...]) -> Source:
    _, body_start, _ = split_first_line(read_head(file))
    _, *texts = fields_of(kind, text_fields, None, text_may_be_blank=len(text_fields) > 1)
    return Source(file, Layout(kind, "jsonl", (_IDENTIFIER, *texts), body_start=body_start))


def _id_text_line(chunk: Chunk) -> Iterator[tuple[str, str, int]]:
    columns = chunk.parsed.columns
    return zip(
        columns["id"].to_pylist(), columns["text"].to_pylist(), chunk.parsed.lines.tolist(), strict=True
    )


def _repeated(source: Source, identifier: str, line: int, first: int) -> Rejection:
    return Rejection(
        line, f"id {identifier!r} is already the id of {source.file}:{first}; ids must be unique"
    )


def _names_of(name: str) -> tuple[str, ...]:
    return (name, *(name + suffix for suffix in COMPRESSION_SUFFIXES))
