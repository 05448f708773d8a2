"""Ranked lists as rows of a file: TSV without a header, JSON lines, Parquet, or a TREC run."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raytower.annotation.rows_out import tsv_cell
from raytower.errors import InputError
from raytower.evaluation.reports import RunWriter
from raytower.file_jobs.run import Sink, join_bytes, join_parquet
from raytower.retrieval.config import RankedFileType
from raytower.storage import Location, check_output

_TYPE_BY_SUFFIX: dict[str, RankedFileType] = {
    ".tsv": "tsv",
    ".txt": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".trec": "trec",
    ".run": "trec",
}
_SCHEMA = pa.schema(
    [
        ("query_id", pa.string()),
        ("query", pa.string()),
        ("rank", pa.int32()),
        ("id", pa.string()),
        ("score", pa.float64()),
        ("text", pa.string()),
    ]
)
# Of documents of which some have one.
_TITLE = pa.field("title", pa.string())
# Of a reranked list: what it was recalled with, and the reranker's raw logit.
_SCORES = pa.schema([("recall_score", pa.float64()), ("rerank_score", pa.float64())])
_FIRST_LINE_BYTES = 2**20
_RUN_TAG = "raytower"
_OUR_SCORE = re.compile(r"-?\d+\.\d{6}")  # as `tsv_cell` writes it


@dataclass(frozen=True, slots=True)
class RankedText:
    """One text of a list; `rank` counts from 1, and `score` is what the list is in order of."""

    query_id: str | None
    query: str
    rank: int
    id: str | None
    score: float
    text: str
    recall_score: float | None = None
    rerank_score: float | None = None
    title: str | None = None


class RankedWriter:
    """Writes lists of one type into a part of the output. `close` ends it."""

    def __init__(
        self, sink: Sink, file_type: RankedFileType, *, reranked: bool, titled: bool = False
    ) -> None:
        """`reranked` adds recall_score and rerank_score to JSON lines and Parquet, `titled` the documents' titles."""
        self._sink = sink
        self._file_type = file_type
        own = [*_SCHEMA, *([_TITLE] if titled else [])]
        self._schema = pa.schema([*own, *_SCORES] if reranked else own)
        self._run = RunWriter(sink, _RUN_TAG) if file_type == "trec" else None
        self._parquet = pq.ParquetWriter(sink, self._schema) if file_type == "parquet" else None

    def write(self, lists: Sequence[Sequence[RankedText]]) -> None:
        """The lists of some queries.

        Raises:
            InputError: for a TSV a query or text with a tab or a line break; for a run a query or text without an id.
        """
        rows = [row for ranked in lists for row in ranked]
        if self._run is not None:
            for ranked in filter(None, lists):
                self._run.write(_named(ranked[0].query_id), [(_named(row.id), row.score) for row in ranked])
        elif self._parquet is not None:
            columns = {name: [getattr(row, name) for row in rows] for name in self._schema.names}
            self._parquet.write_table(pa.table(columns, schema=self._schema))
        else:
            line = _tsv_line if self._file_type == "tsv" else partial(_json_line, names=self._schema.names)
            self._sink.write("".join(map(line, rows)).encode())

    def close(self) -> None:
        if self._parquet is not None:
            self._parquet.close()


def join_parts(parts: Sequence[Location], sink: Sink, file_type: RankedFileType) -> None:
    """The output of the parts of its shares, in order."""
    (join_parquet if file_type == "parquet" else join_bytes)(parts, sink)


def ranked_file_type(output: str, asked: RankedFileType | None) -> RankedFileType:
    """The type of an output, after a look at what is there: `asked`, or what the ending of its name means.

    Raises:
        InputError: the ending means no type, or another one than is asked for; the place cannot be written; or a
            file of something else is there.
    """
    place = check_output(output, is_folder=False)
    suffix = PurePosixPath(place.path).suffix
    meant = _TYPE_BY_SUFFIX.get(suffix)
    if asked is None and meant is None:
        raise InputError(
            f"output {output!r} ends with {suffix or 'no ending'!r}, which tells no type (known: "
            f"{', '.join(_TYPE_BY_SUFFIX)}); name such a file, or set file_type"
        )
    if asked is not None and meant not in (None, asked):
        raise InputError(
            f"output {output!r} ends with {suffix}, which is {meant}, and file_type is {asked}: the next job would "
            f"read it as {meant}; name a .{asked} file, or leave file_type out"
        )
    file_type = asked or meant
    assert file_type is not None
    if place.exists() and not _is_ours(place, file_type):
        raise InputError(
            f"output {output!r} exists and is no {file_type} result of this job; remove it, or name another file"
        )
    return file_type


def _is_ours(place: Location, file_type: RankedFileType) -> bool:
    """Whether a file is empty, or begins as those that are written here."""
    with place.open_read() as stream:
        if file_type == "parquet":
            if not stream.size():
                return True
            try:
                return set(pq.read_schema(stream).names) >= set(_SCHEMA.names)
            except pa.ArrowInvalid:
                return False
        line = stream.read(_FIRST_LINE_BYTES).decode("utf-8", errors="replace").partition("\n")[0]
    if not line:
        return True
    if file_type == "trec":
        cells = line.split(" ")
        return len(cells) == 6 and cells[-1] == _RUN_TAG
    if file_type == "tsv":
        cells = line.split("\t")
        # By its decimals: scored pairs without a header, which somebody wrote, look alike else.
        return len(cells) == 3 and _OUR_SCORE.fullmatch(cells[2]) is not None
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(row, dict) and row.keys() >= set(_SCHEMA.names)


def _tsv_line(row: RankedText) -> str:
    cells = (tsv_cell("query", row.query), tsv_cell("text", row.text), tsv_cell("score", row.score))
    return "\t".join(cells) + "\n"


def _json_line(row: RankedText, names: Sequence[str]) -> str:
    values: dict[str, Any] = asdict(row)
    return json.dumps({name: values[name] for name in names}, ensure_ascii=False, allow_nan=False) + "\n"


def _named(identifier: str | None) -> str:
    if identifier is None:
        raise InputError(
            "a TREC run names queries and texts by their ids, and the input has none; write .tsv or .jsonl, or give "
            "the input query_id and document_id"
        )
    return identifier
