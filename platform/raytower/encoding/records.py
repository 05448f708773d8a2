"""Which parts of an output are finished and sound.

A worker puts a record (rows, bytes, sha256) beside each part whose bytes are final, so that a damaged part is never
taken for what was written. When the folder is finished, job.json takes the records' place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

from raytower.encoding.manifest import EmbeddingsFile
from raytower.encoding.parts import PartFigures, is_left_over
from raytower.storage import Location

_THREADS = 8
_KEY = "parts"


@dataclass(frozen=True)
class _Record:
    figures: PartFigures
    written_ns: int


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

    def record_of(name: str) -> _Record | None:
        own = there.get(_record_name(name))
        values = (output / own.base_name).read_json() if own else collected.get(name)
        if values is None:
            return None
        figures = PartFigures(**{**values, "file": EmbeddingsFile(**values["file"])})
        return _Record(figures, (own or there[job_file.name]).mtime_ns or 0)

    def sound(name: str) -> PartFigures | None:
        record, info = record_of(name), there.get(name)
        if record is None or info is None:
            return None
        file = record.figures.file
        if info.size != file.bytes or file.rows != rows[name]:
            return None
        is_older = info.mtime_ns is not None and info.mtime_ns < record.written_ns
        return record.figures if is_older or (output / name).sha256() == file.sha256 else None

    with ThreadPoolExecutor(_THREADS) as threads:
        found = zip(rows, threads.map(sound, rows), strict=True)
        return {name: figures for name, figures in found if figures is not None}


def remove_left_overs(output: Location, *, records: bool) -> None:
    """Remove what killed workers had begun to write and, of a finished folder, the records."""
    for child in output.children():
        if is_left_over(child.name) or (records and _is_record(child.name)):
            child.delete()


def _record_name(name: str) -> str:
    return f".{name}.json"


def _is_record(name: str) -> bool:
    return name.startswith(".part-") and name.endswith(".json")
