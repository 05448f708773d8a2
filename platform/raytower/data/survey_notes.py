"""Surveys, and what was counted in all their rows, remembered in the cache for jobs that are started again.

A note is found by the content of the files, by all that decides how they are read, and by the code of this version. So
it outlives a copy or a renaming of the folder, and never a change.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa

import raytower
from raytower.data.layouts import Source
from raytower.data.pieces import Piece, Survey
from raytower.data.slices import Extent
from raytower.storage import Location, cache_dir, known_sha256

# A survey of less takes as long as hashing it does.
_NOTED_BYTES = 16 * 2**20
_SCALARS = ("derived_ids", "renamed_columns", "unread_columns", "num_repeated")
_FACTS = b"raytower.survey"
_TABLE = pa.schema(
    [
        ("source", pa.int32()),
        ("start", pa.int64()),
        ("end", pa.int64()),
        ("first_line", pa.int64()),
        ("row_group", pa.int32()),
        ("num_rows", pa.int64()),
        ("left_out", pa.list_(pa.int64())),
    ]
)


def remembered(sources: Sequence[Source], rows_per_piece: int, scan: Callable[[], Survey]) -> Survey:
    """The survey of these files in this order, in pieces of so many rows: from its note, else by `scan`, with a note.

    Surveys with rejected rows are made each time, since these have to be listed.

    Raises:
        InputError, StorageError: a file cannot be read; and what `scan` raises.
    """
    if _num_bytes(sources) < _NOTED_BYTES:
        return scan()
    content = _content_of(sources, rows_per_piece)
    note = cache_dir() / "surveys" / f"{content}.arrow"
    # A note that cannot be read is made anew.
    with suppress(OSError, ValueError, KeyError, TypeError), pa.ipc.open_file(note.read_bytes()) as reader:
        return dataclasses.replace(_survey_of(reader.read_all(), sources), content=content)
    surveyed = scan()
    # Of a file that was written meanwhile nobody knows which of its contents was surveyed.
    if surveyed.num_rejected or _content_of(sources, rows_per_piece) != content:
        return surveyed
    table = _table_of(surveyed, sources)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    with suppress(OSError):  # a cache that cannot be written costs the time of the next survey
        Location.of(note).write_bytes(sink.getvalue())
    return dataclasses.replace(surveyed, content=content)


def counted(surveyed: Survey, what: str, count: Callable[[], Any]) -> Any:
    """What `count` found in all rows of a survey, as JSON gives it back: from its note, or with a note.

    `what` names it, with all that it depends on beside the rows.
    """
    if surveyed.content is None:
        return count()
    key = hashlib.sha256(f"{surveyed.content} {what}".encode()).hexdigest()[:32]
    note = Location.of(cache_dir() / "surveys" / f"{key}.json")
    with suppress(OSError, ValueError):
        return json.loads(note.local_path.read_bytes())
    found = json.loads(json.dumps(count()))
    with suppress(OSError):
        note.write_json(found)
    return found


def _content_of(sources: Sequence[Source], rows_per_piece: int) -> str:
    """A hash of all that decides the survey of these files."""
    files = [
        [source.file.stem, source.file.partitions, repr(source.layout), known_sha256(source.file.location)]
        for source in sources
    ]
    key = json.dumps([_code(), rows_per_piece, files])
    return hashlib.sha256(key.encode()).hexdigest()[:32]


def _num_bytes(sources: Sequence[Source]) -> int:
    return sum(source.file.size_bytes for source in sources)


@cache
def _code() -> str:
    """Hash of raytower's code, which may survey and count otherwise in another version."""
    digest = hashlib.sha256()
    package = Path(raytower.__file__).parent
    for file in sorted(package.rglob("*.py")):
        digest.update(str(file.relative_to(package)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def _table_of(surveyed: Survey, sources: Sequence[Source]) -> pa.Table:
    number = {source.file.location.path: place for place, source in enumerate(sources)}
    rows: list[dict[str, Any]] = []
    for piece in surveyed.pieces:
        assert isinstance(piece.source, Source)
        rows.append(
            {
                **dataclasses.asdict(piece.extent),
                "source": number[piece.source.file.location.path],
                "num_rows": piece.num_rows,
                "left_out": list(piece.left_out),
            }
        )
    facts = {name: getattr(surveyed, name) for name in _SCALARS}
    schema = surveyed.schema.serialize().to_pybytes().hex()
    noted = _TABLE.with_metadata({_FACTS: json.dumps({**facts, "schema": schema})})
    return pa.Table.from_pylist(rows, schema=noted)


def _survey_of(table: pa.Table, sources: Sequence[Source]) -> Survey:
    facts = json.loads(table.schema.metadata[_FACTS])
    schema = pa.ipc.read_schema(pa.py_buffer(bytes.fromhex(facts["schema"])))
    columns = table.to_pydict()
    pieces: list[Piece] = []
    num_rows = 0
    for source, start, end, first_line, row_group, rows, left_out in zip(*columns.values(), strict=True):
        extent = Extent(start, end, first_line, row_group)
        pieces.append(Piece(sources[source], len(pieces), extent, num_rows, rows, schema, tuple(left_out)))
        num_rows += rows
    return Survey(
        pieces=tuple(pieces),
        num_rows=num_rows,
        num_rejected=0,
        files=tuple(str(source.file) for source in sources),
        bytes=_num_bytes(sources),
        schema=schema,
        derived_ids=facts["derived_ids"],
        renamed_columns=tuple((old, new) for old, new in facts["renamed_columns"]),
        unread_columns=tuple(facts["unread_columns"]),
        num_repeated=facts["num_repeated"],
    )
