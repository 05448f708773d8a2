"""Judgements in TREC's form: lines of `query iteration document judgement`, parted by white space.

Nothing that measures rankings reads the second column. raytower writes its name there, which says that white space and
`%` inside the ids are percent-encoded (`%20`), since the form has no other way to hold them.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping
from urllib.parse import unquote

from raytower.data.layouts import read_head, split_first_line
from raytower.data.sources import SourceFile, single_file
from raytower.errors import InputError
from raytower.storage import Location

OURS = "raytower"
_WHOLE_NUMBER = re.compile(r"[+-]?[0-9]+")
_COLUMNS = 4
_UNSAFE_IN_ID = re.compile(r"[\s%]")


def read_lines(file: SourceFile) -> Iterator[tuple[int, str]]:
    """The lines of a text file that hold anything, decompressed, each with its number from 1.

    Raises:
        InputError: the file cannot be read, or is no UTF-8.
    """
    number = 0
    try:
        # pyarrow's streams are files by their methods, and io.BufferedReader asks for no more.
        with file.open() as stream, io.BufferedReader(stream) as lines:
            for number, line in enumerate(lines, start=1):
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                if text.strip():
                    yield number, text
    except UnicodeDecodeError as error:
        raise InputError(f"{file}:{number}: not UTF-8: {error}; save the file as UTF-8") from error
    except OSError as error:
        raise InputError(f"{file}:{number + 1}: cannot be read: {error}") from error


def is_trec_qrels(path: str) -> bool:
    """Whether the first line of a file reads as a judgement: four columns, the last a whole number, the second too.

    A line with one tab is a pair of texts, whatever words it has.
    """
    place = Location.of(path)
    if not place.is_file():
        return False
    first, _, _ = split_first_line(read_head(single_file(place)))
    columns = first.split()
    return (
        len(columns) == _COLUMNS
        and first.strip().count("\t") in (0, _COLUMNS - 1)
        and (columns[1] in (OURS, "Q0") or _WHOLE_NUMBER.fullmatch(columns[1]) is not None)
        and _WHOLE_NUMBER.fullmatch(columns[3]) is not None
    )


def read_trec_qrels(path: str) -> dict[str, dict[str, float]]:
    """All judgements, those of 0 and less too: query id → document id → judgement, in file order.

    Raises:
        InputError: no such file, no judgements in it, a line of another form, or a document judged twice differently.
    """
    file = single_file(Location.of(path))
    judged: dict[str, dict[str, float]] = {}
    for number, line in read_lines(file):
        columns = line.split()
        if len(columns) != _COLUMNS or not _WHOLE_NUMBER.fullmatch(columns[3]):
            raise InputError(
                f"{file}:{number}: {line[:120]!r} is no judgement; a line of TREC's qrels is `query iteration document "
                "judgement`, parted by white space, the judgement a whole number"
            )
        query_id, iteration, document_id, value = columns
        if iteration == OURS:
            query_id, document_id = unquote(query_id), unquote(document_id)
        known = judged.setdefault(query_id, {}).setdefault(document_id, float(value))
        if known != float(value):
            raise InputError(
                f"{file}:{number}: document {document_id!r} is judged {value} for query {query_id!r} here, and "
                f"{known:g} in an earlier line; keep one of the two"
            )
    if not judged:
        raise InputError(f"{file}: no judgements; the file is empty")
    return judged


def trec_id(name: str) -> str:
    """An id as it is written into a column of TREC's files: white space and `%` percent-encoded.

    Raises:
        InputError: an empty id.
    """
    if not name:
        raise InputError("an id is empty; a run file cannot hold it, give every query and document an id")
    if not _UNSAFE_IN_ID.search(name):
        return name
    return _UNSAFE_IN_ID.sub(lambda match: "".join(f"%{byte:02X}" for byte in match[0].encode()), name)


def parted(judged: Mapping[str, float]) -> tuple[dict[str, float], dict[str, float]]:
    """The judgements of one query that are above 0, and the others."""
    above = {document: value for document, value in judged.items() if value > 0}
    return above, {document: value for document, value in judged.items() if value <= 0}
