"""Which parts of an output are finished and sound.

A worker puts a record (rows, bytes, sha256) beside each part whose bytes are final, so that a damaged part is never
taken for what was written. When the folder is finished, job.json takes the records' place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

from raytower.encoding.parts import PartFigures, is_left_over
from raytower.storage import Location

_THREADS = 8
_KEY = "parts"


def write_record(output: Location, figures: PartFigures) -> None:
    """Put the record of a part beside it, once the part has its name."""
    (output / _record_name(figures.file.name)).write_json(asdict(figures))


def collect_records(job_file: Location, parts: Sequence[PartFigures]) -> None:
    """Put the records of all parts into job.json."""
    job_file.write_json({**job_file.read_json(), _KEY: [asdict(part) for part in parts]})


def find_parts(job_file: Location, rows: Mapping[str, int]) -> dict[str, PartFigures]:
    """Of the parts in `rows` (name to number of rows) those that are as they were written, by name.

    Size and rows are compared. The bytes are read again only of a part that changed after it was recorded.
    """
    output = job_file.parent
    there = {info.base_name: info for info in output.infos()}
    collected = {item["file"]["name"]: item for item in job_file.read_json().get(_KEY, [])}

    def sound(name: str) -> PartFigures | None:
        own, info = there.get(_record_name(name)), there.get(name)
        values = (output / own.base_name).read_json() if own else collected.get(name)
        if values is None or info is None:
            return None
        figures = PartFigures.of(values)
        if info.size != figures.file.bytes or figures.file.rows != rows[name]:
            return None
        recorded_ns = (own or there[job_file.name]).mtime_ns or 0
        is_older = info.mtime_ns is not None and info.mtime_ns < recorded_ns
        return figures if is_older or (output / name).sha256() == figures.file.sha256 else None

    with ThreadPoolExecutor(_THREADS) as threads:
        found = zip(rows, threads.map(sound, rows), strict=True)
        return {name: figures for name, figures in found if figures is not None}


def remove_left_overs(output: Location, *, records: bool) -> None:
    """Remove what killed workers had begun to write and, of a finished folder, the records."""
    for child in output.children():
        is_record = child.name.startswith(".part-") and child.name.endswith(".json")
        if is_left_over(child.name) or (records and is_record):
            child.delete()


def _record_name(name: str) -> str:
    return f".{name}.json"
