"""Run files: the ranked lists of a retrieval, made by `evaluate`, `search` or anybody's system.

Three forms are read, each known by its first line:

- TREC's run: `query Q0 document rank score tag`, parted by white space. Files with the tag `raytower` have white space
  and `%` inside ids percent-encoded.
- TSV without a header: `query <tab> text <tab> score`, texts in both columns.
- JSON lines: `query_id` or `query` (the text) or both, `id` or `text` or both, and `score`; `rank` may be there.

The order of a list is that of its scores, of equal scores that of the file. Ranks are compared with it, and those that
differ are counted, not followed: trec_eval never reads them either.
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args
from urllib.parse import unquote

import numpy as np

from raytower.data.layouts import read_head, split_first_line
from raytower.data.qrels import OURS, read_lines
from raytower.data.sources import SourceFile, single_file
from raytower.errors import InputError
from raytower.evaluation.config import RunFormat
from raytower.storage import Location

_FORMS = {
    "trec": "`query Q0 document rank score tag`, parted by white space",
    "tsv": "`query <tab> text <tab> score`",
    "jsonl": "an object with query_id or query, id or text, and a number as score",
}
_TREC_COLUMNS = 6
_TSV_COLUMNS = 3
_MOST_RANKS = 2**31


@dataclass(frozen=True)
class RankedList:
    """The hits of one query, best first."""

    documents: list[str]
    """Ids, or texts where the run is read by text."""
    scores: list[float]


@dataclass
class Run:
    """What a run file holds."""

    lists: dict[str, RankedList] = field(default_factory=dict)
    """By the id of the query, or by its text where the run is read by text."""
    num_tied: int = 0
    """Hits with the score of the hit before them."""
    num_wrong_ranks: int = 0
    """Hits whose written rank is not their place by score; ranks may count from 0 or from 1."""
    num_repeated: int = 0
    """Rows that were left out: their document stands in the list already, or the whole query was asked before."""


class _Row(NamedTuple):
    query_id: str | None
    query: str | None
    document_id: str | None
    text: str | None
    score: float
    rank: int | None


class _Collected:
    """The rows of one query, as they are written."""

    def __init__(self) -> None:
        self.documents: list[str] = []
        self.scores = array("d")
        self.ranks = array("q")
        self.seen: set[str] = set()


def read_run(path: str, format: RunFormat, by: Literal["id", "text"]) -> Run:
    """Read a run file; memory holds its ids or texts once, and a score and a rank a row.

    A document that stands in a list twice is left out the second time, and counted. By text, a text may stand there
    twice, since an index may hold it twice: its rows count as `ranking_metrics` says, unless they have one id. A query
    whose rows come again after those of another was asked twice; the later rows are left out, and counted.

    Args:
        path: the file, which may be compressed.
        format: the form of its lines; auto goes by the first line.
        by: whether queries and documents are told by their ids or by their texts.

    Raises:
        InputError: no such file, an empty one, a line of another form (its number is named), a score that is no finite
            number, or ids where texts are needed, or the other way round.
    """
    file = single_file(Location.of(path))
    form = _detect(file) if format == "auto" else format
    collected: dict[str, _Collected] = {}
    known: dict[str, str] = {}  # each name once in memory
    run = Run()
    name = str(file)
    last: str | None = None
    is_again = False
    for number, line in read_lines(file):
        row = _PARSERS[form](line, f"{name}:{number}")
        query = row.query_id if by == "id" else row.query
        document = row.document_id if by == "id" else row.text
        if query is None or document is None:
            raise InputError(f"{file}:{number}: {_wrong_kind(form, by)}")
        if query != last:
            is_again = by == "text" and query in collected
            last = query
        rows = collected.setdefault(query, _Collected())
        identity = document if by == "id" else row.document_id
        if is_again or (identity is not None and identity in rows.seen):
            run.num_repeated += 1
            continue
        if identity is not None:
            rows.seen.add(known.setdefault(identity, identity))
        rows.documents.append(known.setdefault(document, document))
        rows.scores.append(row.score)
        rows.ranks.append(-1 if row.rank is None else row.rank)
    if not collected:
        raise InputError(f"{file}: no rows; a line of a run file is {'; or '.join(_FORMS.values())}")
    for query, rows in collected.items():
        run.lists[query] = _ordered(rows, run)
    return run


def _ordered(rows: _Collected, run: Run) -> RankedList:
    """The rows of a query by score, and as written where scores are equal; ties and wrong ranks are counted."""
    scores, ranks = np.array(rows.scores), np.array(rows.ranks)
    order = np.argsort(-scores, kind="stable")
    scores, ranks = scores[order], ranks[order]
    run.num_tied += int(np.count_nonzero(scores[1:] == scores[:-1]))
    if ranks.min() >= 0:
        first = min(int(ranks.min()), 1)
        run.num_wrong_ranks += int(np.count_nonzero(ranks != np.arange(first, first + len(ranks))))
    return RankedList([rows.documents[place] for place in order.tolist()], scores.tolist())


def _detect(file: SourceFile) -> str:
    """The form of a run file by its first line. Raises InputError where it is none of the three."""
    first, _, _ = split_first_line(read_head(file))
    if first.lstrip().startswith("{"):
        return "jsonl"
    if first.count("\t") == _TSV_COLUMNS - 1:
        return "tsv"
    if len(first.split()) == _TREC_COLUMNS:
        return "trec"
    raise InputError(
        f"{file}:1: {first[:120]!r} begins no run file; a line is {'; or '.join(_FORMS.values())}; name the form by "
        "run.format, or give another file"
    )


def _parse_trec(line: str, place: str) -> _Row:
    columns = line.split()
    if len(columns) != _TREC_COLUMNS:
        raise _no_row(line, place, "trec")
    query, _, document, rank, score, tag = columns
    if tag == OURS:
        query, document = unquote(query), unquote(document)
    return _Row(query, None, document, None, _number(score, line, place, "trec"), _rank(rank, place))


def _parse_tsv(line: str, place: str) -> _Row:
    columns = line.split("\t")
    if len(columns) != _TSV_COLUMNS:
        raise _no_row(line, place, "tsv")
    query, text, score = columns
    return _Row(None, query, None, text, _number(score, line, place, "tsv"), None)


def _parse_json(line: str, place: str) -> _Row:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise InputError(f"{place}: not valid JSON: {error}; a line is {_FORMS['jsonl']}") from error
    if not isinstance(row, dict) or isinstance(row.get("score"), (bool, str, list, dict, type(None))):
        raise _no_row(line, place, "jsonl")
    names = [row.get(name) for name in ("query_id", "query", "id", "text")]
    if any(isinstance(name, (list, dict, bool)) for name in names):
        raise _no_row(line, place, "jsonl")
    query_id, query, document_id, text = (None if name is None else str(name) for name in names)
    score = _number(row["score"], line, place, "jsonl")
    rank = row.get("rank")
    return _Row(query_id, query, document_id, text, score, None if rank is None else _rank(rank, place))


_PARSERS: dict[str, Callable[[str, str], _Row]] = {
    "trec": _parse_trec,
    "tsv": _parse_tsv,
    "jsonl": _parse_json,
}
assert set(_PARSERS) == set(get_args(RunFormat)) - {"auto"}


def _number(value: Any, line: str, place: str, form: str) -> float:
    try:
        number = float(value)
    except ValueError:
        raise _no_row(line, place, form) from None
    except OverflowError:  # a whole number of JSON beyond the range of floats
        number = math.inf
    if not math.isfinite(number):
        raise InputError(
            f"{place}: score {str(value)[:40]!r} is not finite; rankings need numbers that can be compared"
        )
    return number


def _rank(value: Any, place: str) -> int:
    try:
        rank = int(value)
    except (ValueError, TypeError, OverflowError):
        rank = -1
    if not 0 <= rank < _MOST_RANKS:
        raise InputError(
            f"{place}: rank {str(value)[:40]!r} is no whole number from 0 to {_MOST_RANKS - 1}; write the place in "
            "the list"
        )
    return rank


def _no_row(line: str, place: str, form: str) -> InputError:
    return InputError(f"{place}: {line[:120]!r} is no row of this run file; a line is {_FORMS[form]}")


def _wrong_kind(form: str, by: str) -> str:
    if by == "id":
        return (
            "the row has no ids of a query and a document, by which these queries judge; give a TREC run or JSON lines "
            "with query_id and id, or judge by pairs of texts"
        )
    return (
        "the row has no texts of a query and a document, by which pairs judge; give "
        + (
            "the qrels of this run's ids, a BEIR folder or a TREC file, as queries, or "
            if form != "tsv"
            else ""
        )
        + "a TSV, or JSON lines with query and text"
    )


def batches(run: Run, keys: list[str], rows_per_batch: int) -> Iterator[tuple[slice, list[RankedList]]]:
    """The lists of some queries in their order, so many at once; an empty list where the run has none."""
    empty = RankedList([], [])
    for start in range(0, len(keys), rows_per_batch):
        part = slice(start, min(start + rows_per_batch, len(keys)))
        yield part, [run.lists.get(key, empty) for key in keys[part]]
