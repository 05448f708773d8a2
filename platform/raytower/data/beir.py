"""BEIR folders: corpus.jsonl (_id, title, text), queries.jsonl (_id, text) and qrels/<split>.tsv (query-id, corpus-id,
score, with that header).

Judged pairs are joined without holding the corpus: the survey notes where the judged queries and documents lie in
their files, and a worker reads just those lines.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from raytower.data.config import InputConfig
from raytower.data.layouts import Layout, Source, read_head, split_first_line
from raytower.data.parquet import open_reader
from raytower.data.records import RecordField, RecordKind, canonical_schema, fields_of
from raytower.data.rejects import Rejects
from raytower.data.row_batch import Chunk, Rejection
from raytower.data.rows import parse_slice
from raytower.data.slices import RangeReader, Slice
from raytower.data.sources import COMPRESSION_SUFFIXES, SourceFile, is_glob, single_file
from raytower.errors import InputError
from raytower.storage import Location

QRELS_HEADER = ("query-id", "corpus-id", "score")
_CHUNK_ROWS = 8192
# Lines nearer to each other than this are fetched by one read, as long as the read stays below the limit.
_GAP_BYTES = 64 * 1024
_RUN_BYTES = 8 * 1024 * 1024
_IDENTIFIER = RecordField("id", ("_id", "id"), "id")


def is_beir(config: InputConfig) -> bool:
    """Whether the input is a BEIR folder: format is beir, or it is auto and the folder holds BEIR's files."""
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
        return self._texts("corpus.jsonl", kind, ("title", "text"))

    def queries(self) -> Source:
        """queries.jsonl as records of ids and texts."""
        return self._texts("queries.jsonl", "lines", ("text",))

    def qrels(self, split: str, key: str) -> Source:
        """qrels/<split>.tsv as scored records whose query and document are ids; `key` chooses the split.

        Raises:
            InputError: there is no such split, or the file's first line is not BEIR's header.
        """
        found = [re.sub(r"\.tsv(\.\w+)?$", "", place.name) for place in (self.root / "qrels").children()]
        choice = f"{key} may be" if key else "the splits that it has are"
        remedy = f"; {choice} one of: {', '.join(sorted(found))}" if found else ""
        file = self._file(self.root / "qrels", f"{split}.tsv", remedy)
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

    def _texts(self, name: str, kind: RecordKind, text_fields: tuple[str, ...]) -> Source:
        file = self._file(self.root, name)
        _, body_start, _ = split_first_line(read_head(file))
        _, *texts = fields_of(kind, text_fields, None, text_may_be_blank=len(text_fields) > 1)
        return Source(file, Layout(kind, "jsonl", (_IDENTIFIER, *texts), body_start=body_start))

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
        for judgement in _judgements(BeirFolder.of(path).qrels(split, "queries.split"), rejects):
            judged.setdefault(judgement.query_id, {})[judgement.document_id] = judgement.score
    return judged


def read_queries(path: str) -> dict[str, str]:
    """Query id → text, in file order. Raises InputError for a row that breaks a rule or repeats an id."""
    source = BeirFolder.of(path).queries()
    with Rejects(None, None, path, "queries") as rejects:
        found = _first_of_each(source, lambda identifier: True, rejects)
        return {identifier: text for _, identifier, text, _ in found}


@dataclass(frozen=True)
class JudgedPairs:
    """Judged pairs of one piece, and where their texts lie.

    Spans are int64 [pairs, 2]: the bytes at which a line starts and ends.
    """

    queries: Source
    corpus: Source
    query_ids: tuple[str, ...]
    document_ids: tuple[str, ...]
    query_spans: np.ndarray = field(compare=False, repr=False)
    document_spans: np.ndarray = field(compare=False, repr=False)


def survey_pairs(
    qrels: Source, queries: Source, corpus: Source, rows_per_piece: int, rejects: Rejects
) -> Iterator[JudgedPairs]:
    """The judgements with a score above 0, cut into pieces. Memory: the judgements, and a span for each judged text.

    Every row of the three files is checked; a judgement whose query or document does not exist is rejected too.
    """
    judgements = [judgement for judgement in _judgements(qrels, rejects) if judgement.score > 0]
    query_spans = _locate(queries, {judgement.query_id for judgement in judgements}, rejects)
    document_spans = _locate(corpus, {judgement.document_id for judgement in judgements}, rejects)
    unknown: dict[int, str] = {}
    good = []
    for judgement in judgements:
        if judgement.query_id not in query_spans:
            unknown[judgement.line] = f"query-id {judgement.query_id!r} is not in {queries.file}"
        elif judgement.document_id not in document_spans:
            unknown[judgement.line] = f"corpus-id {judgement.document_id!r} is not in {corpus.file}"
        else:
            good.append(judgement)
    for chunk in open_reader(qrels).scan(_CHUNK_ROWS) if unknown else ():
        lines = [line for line in chunk.lines.tolist() if line in unknown]
        rejects.add(qrels.file, [Rejection(line, unknown[line]) for line in lines], chunk.raw)
    for start in range(0, len(good), rows_per_piece):
        query_ids, document_ids, _, _ = zip(*good[start : start + rows_per_piece], strict=True)
        yield JudgedPairs(
            queries,
            corpus,
            query_ids,
            document_ids,
            np.array([query_spans[identifier] for identifier in query_ids], dtype=np.int64),
            np.array([document_spans[identifier] for identifier in document_ids], dtype=np.int64),
        )


def read_judged_pairs(pairs: JudgedPairs) -> pa.Table:
    """The pairs with their texts, in qrels order. Raises InputError where a file has changed since it was surveyed."""
    columns = {
        "query": _fetch(pairs.queries, pairs.query_ids, pairs.query_spans),
        "document": _fetch(pairs.corpus, pairs.document_ids, pairs.document_spans),
        "query_id": list(pairs.query_ids),
        "document_id": list(pairs.document_ids),
    }
    return pa.table(columns, schema=canonical_schema("pairs"))


class _Judgement(NamedTuple):
    query_id: str
    document_id: str
    score: float
    line: int


def _judgements(source: Source, rejects: Rejects) -> Iterator[_Judgement]:
    seen: dict[tuple[str, str], tuple[int, float]] = {}
    for chunk, query_id, document_id, score, line in _rows(source, ("query", "document", "label"), rejects):
        first, known_score = seen.setdefault((query_id, document_id), (line, score))
        if known_score != score:
            reason = (
                f"query-id {query_id!r} and corpus-id {document_id!r} are judged {known_score:g} in line {first} "
                f"and {score:g} here"
            )
            rejects.add(source.file, [Rejection(line, reason)], chunk.raw)
        elif first == line:  # a repeated equal judgement adds nothing
            yield _Judgement(query_id, document_id, score, line)


def _rows(source: Source, columns: Sequence[str], rejects: Rejects) -> Iterator[tuple[Any, ...]]:
    """Every good row: its chunk, its values in `columns`, and its line."""
    for chunk in open_reader(source).scan(_CHUNK_ROWS):
        for rows in chunk.batches:
            rejects.add(source.file, rows.rejections, chunk.raw)
        yield from zip(itertools.repeat(chunk), *map(chunk.values, columns), chunk.lines.tolist())


def _first_of_each(
    source: Source, is_wanted: Callable[[str], bool], rejects: Rejects
) -> Iterator[tuple[Chunk, str, str, int]]:
    """Chunk, id, text and line of each wanted id; the rows that repeat one are rejected. The whole file is checked."""
    lines: dict[str, int] = {}
    for chunk, identifier, text, line in _rows(source, ("id", "text"), rejects):
        if is_wanted(identifier):
            first = lines.setdefault(identifier, line)
            if first == line:
                yield chunk, identifier, text, line
            else:
                reason = f"id {identifier!r} is already the id of {source.file}:{first}; ids must be unique"
                rejects.add(source.file, [Rejection(line, reason)], chunk.raw)


def _locate(source: Source, wanted: set[str], rejects: Rejects) -> dict[str, tuple[int, int]]:
    """For each wanted id, the bytes at which its line starts and ends, newline included."""
    spans: dict[str, tuple[int, int]] = {}
    # A chunk's wanted lines come one after another, so its edges are computed once and kept.
    edges_of: tuple[Chunk | None, list[int]] = (None, [])
    for chunk, identifier, _, line in _first_of_each(source, wanted.__contains__, rejects):
        if chunk is not edges_of[0]:
            assert isinstance(chunk.content, Slice)
            edges_of = chunk, chunk.content.edges()
        start, number = chunk.extent.start, line - chunk.extent.first_line
        spans[identifier] = (start + edges_of[1][number], start + edges_of[1][number + 1])
    return spans


def _fetch(source: Source, ids: Sequence[str], spans: np.ndarray) -> list[str]:
    """The texts of the lines at `spans`, int64 [n, 2], whose ids must be `ids`. Near lines share one read."""
    runs: list[list[tuple[int, int]]] = []
    for start, end in np.unique(spans, axis=0).tolist():
        if not runs or start - runs[-1][-1][1] > _GAP_BYTES or end - runs[-1][0][0] > _RUN_BYTES:
            runs.append([])
        runs[-1].append((start, end))
    lines: list[bytes] = []
    with RangeReader(source.file) as reader:
        for run in runs:
            first = run[0][0]
            data = reader.read(first, run[-1][1] - first)
            lines += [data[start - first : end - first] for start, end in run]
    found = parse_slice(Slice(0, 1, b"".join(lines)), source).columns
    texts = dict(zip(found["id"].to_pylist(), found["text"].to_pylist(), strict=True))
    missing = next((identifier for identifier in ids if identifier not in texts), None)
    if missing is not None:
        raise source.file.changed(f"id {missing!r} is no longer where it was")
    return [texts[identifier] for identifier in ids]


def _names_of(name: str) -> tuple[str, ...]:
    return (name, *(name + suffix for suffix in COMPRESSION_SUFFIXES))
