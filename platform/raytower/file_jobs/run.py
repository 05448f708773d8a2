"""Doing the shares of a job: each becomes a part beside the output, and the output appears of all of them.

A job may write further files beside its output, such as rows of another kind; of these a share has parts too.

A part appears when it is whole, and its figures after it. A job that was killed and is started again keeps its parts
where everything that decides them is the same. One job at a time writes to an output.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import IO, Any, Protocol, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raytower.config import FittedWorkersConfig, WorkersConfig
from raytower.data.pieces import Survey, read_piece
from raytower.errors import import_extra
from raytower.file_jobs.plan import NUMBER, Share, choose_workers
from raytower.only_job import only_job
from raytower.progress import Progress, log
from raytower.storage import Location

Sink: TypeAlias = "pa.NativeFile | IO[bytes]"
_COPY_BYTES = 2**20


class ShareWorker(Protocol):
    """What does the shares of a job, with its models loaded."""

    def __call__(self, table: pa.Table, sink: Sink) -> dict[str, Any]:
        """Write the part of the rows of `table`, and return its figures, which JSON can hold.

        The table of a numbered share has a column NUMBER. The worker of a job with files beside its output is given a
        sink for each of them after `sink`.
        """


Join: TypeAlias = Callable[[Sequence[Location], Sink], None]
"""Writes a file of its parts, which are given in the order of the shares."""


@dataclass(frozen=True)
class FileBeside:
    """A further file that a job writes."""

    place: Location
    join: Join


@dataclass(frozen=True)
class FileJob:
    """What is to be done, and where to."""

    output: Location
    """The file that is written; what other processes find, too."""
    shares: Sequence[Share]
    open_worker: Callable[..., ShareWorker]
    """A function of a module, called once in each process that works, with `arguments`."""
    arguments: tuple[Any, ...]
    content: Mapping[str, Any]
    """All that decides what is written, as JSON can hold it: a second start keeps parts of the same alone."""
    texts_per_row: int = 1
    """Texts or pairs of a row that pass through models."""
    verb: str = "done"
    unit: str = "rows"
    beside: Sequence[FileBeside] = ()
    """Appear before the output, so that who finds it finds them."""

    @cached_property
    def identity(self) -> str:
        shape = [
            (share.start, share.num_rows, [piece.index for piece in share.pieces]) for share in self.shares
        ]
        content = json.dumps([self.content, shape], sort_keys=True, default=str)
        return hashlib.sha256(content.encode()).hexdigest()

    @property
    def num_rows(self) -> int:
        return sum(share.num_rows for share in self.shares)

    @property
    def folder(self) -> Location:
        """Where parts lie until the output is whole. Hidden, so that no job takes it for data."""
        return self.output.parent / f".{self.output.name}.parts"

    def part(self, number: int) -> Location:
        return self.folder / f"part-{number:08d}"

    def parts(self, number: int) -> tuple[Location, ...]:
        """The part of the output of a share, and those of the files beside it."""
        part = self.part(number)
        others = (part.parent / f"{part.name}-{place}" for place in range(1, len(self.beside) + 1))
        return (part, *others)


def content_of(survey: Survey) -> list[str]:
    """Checksums of an input's files, for `FileJob.content`."""
    return [Location.of(file).sha256() for file in survey.files]


def workers_for(
    asked: FittedWorkersConfig, num_rows: int, texts_per_row: int, num_shares: int, *, use_gpus: bool = True
) -> WorkersConfig | None:
    """`choose_workers` of the cluster that is joined, or of this machine. None: this process alone.

    Raises:
        InputError: no machine of the cluster is there that could decide, and `workers.num` is null.
    """

    def find_nodes() -> Any:
        import_extra("ray")
        from raytower.runtime import find_nodes

        return find_nodes()

    # As `ensure_ray` goes by, which where Ray is not installed cannot be asked.
    joins_cluster = bool(os.environ.get("RAY_ADDRESS") or os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR"))
    return choose_workers(
        asked,
        num_rows * texts_per_row,
        num_shares,
        joins_cluster=joins_cluster,
        find_nodes=find_nodes,
        use_gpus=use_gpus,
    )


def run_shares(job: FileJob, workers: WorkersConfig | None, join: Join) -> tuple[list[dict[str, Any]], int]:
    """Do what is missing, write the output; the figures of each share in order, and how many rows were done now.

    Args:
        job: what is to be done.
        workers: Ray tasks, so many at once; None does one share after the other in this process.
        join: writes the output of its parts, which are given in order.

    Raises:
        InputError: as the worker; another job writes to the output; or the input has changed since it was surveyed.
        RaytowerError: as the worker; or a task failed.
    """
    with only_job(job.output.parent / f".{job.output.name}.lock", str(job.output)):
        figures = _kept(job)
        if figures:
            log(f"{len(figures)} of {len(job.shares)} parts of {job.output} are finished already")
        missing = [number for number in range(len(job.shares)) if number not in figures]
        num_rows = sum(job.shares[number].num_rows for number in missing)
        progress = Progress(job.verb, job.unit, num_rows)
        for number, found in _do_here(job, missing) if workers is None else _do_on_ray(job, missing, workers):
            figures[number] = found
            progress.advance(job.shares[number].num_rows)
        parts = [job.parts(number) for number in range(len(job.shares))]
        for place, file in enumerate(job.beside, start=1):
            with file.place.open_write() as sink:
                file.join([each[place] for each in parts], sink)
        with job.output.open_write() as sink:
            join([part for part, *_ in parts], sink)
        job.folder.delete()
    return [figures[number] for number in range(len(job.shares))], num_rows


def join_bytes(parts: Sequence[Location], sink: Sink, head: bytes = b"") -> None:
    """`head` and the bytes of all parts, one after the other."""
    sink.write(head)
    for part in parts:
        with part.open_read() as stream:
            shutil.copyfileobj(stream, sink, _COPY_BYTES)


def join_parquet(parts: Sequence[Location], sink: Sink) -> None:
    """The rows of all parts, which are Parquet files of one schema, as one."""
    writer: pq.ParquetWriter | None = None
    for part in parts:
        with part.open_read() as stream:
            table = pq.read_table(stream)
        writer = writer or pq.ParquetWriter(sink, table.schema, compression="zstd")
        writer.write_table(table)
    assert writer is not None, "a job has at least one share"
    writer.close()


# --- parts ---------------------------------------------------------------------------------------------------------


def _kept(job: FileJob) -> dict[int, dict[str, Any]]:
    """Figures of the parts that an earlier, killed run of the same job has left; those of another one are removed."""
    place = job.folder / "job.json"
    if place.is_file() and place.read_json() == {"identity": job.identity}:
        there = {info.base_name: info.size for info in job.folder.infos()}
        kept = {}
        for number in range(len(job.shares)):
            parts, record = job.parts(number), _record(job.part(number))
            if record.name not in there or any(part.name not in there for part in parts):
                continue
            found = record.read_json()
            if [found["bytes"], *found.get("beside", [])] == [there[part.name] for part in parts]:
                kept[number] = found["figures"]
        return kept
    if job.folder.exists():
        log(f"parts of {job.output} were begun with other settings, models or rows; they are done anew")
        job.folder.delete()
    place.write_json({"identity": job.identity})
    return {}


def _record(part: Location) -> Location:
    return part.parent / f"{part.name}.json"


def _do(worker: ShareWorker, share: Share, parts: Sequence[Location]) -> dict[str, Any]:
    table = _rows_of(share)
    with ExitStack() as files:
        figures = worker(table, *(files.enter_context(part.open_write()) for part in parts))
    num_bytes, *beside = (part.size_bytes() for part in parts)
    record = {"bytes": num_bytes, "figures": figures, **({"beside": beside} if beside else {})}
    _record(parts[0]).write_json(record)
    return figures


def _rows_of(share: Share) -> pa.Table:
    numbers = pa.array(np.arange(share.first_row, share.first_row + share.num_rows))
    if not share.pieces:
        return pa.table({NUMBER: numbers})
    table = pa.concat_tables([read_piece(piece) for piece in share.pieces])
    rows = table.slice(share.start, share.num_rows)
    return rows.append_column(NUMBER, numbers) if share.is_numbered else rows


def _do_here(job: FileJob, missing: Sequence[int]) -> Iterator[tuple[int, dict[str, Any]]]:
    if missing:
        worker = job.open_worker(*job.arguments)
        for number in missing:
            yield number, _do(worker, job.shares[number], job.parts(number))


# --- on Ray --------------------------------------------------------------------------------------------------------

_opened: dict[str, ShareWorker] = {}
"""In a process of Ray: what does the shares of one job there, by the job's identity."""


def _do_in_task(
    identity: str,
    open_worker: Callable[..., ShareWorker],
    arguments: tuple[Any, ...],
    workers: WorkersConfig,
    share: Share,
    parts: Sequence[Location],
) -> dict[str, Any]:
    if identity not in _opened:
        from raytower.models.directory import set_num_threads

        set_num_threads(workers.num_threads)
        if not workers.num_gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # else engines would take a GPU that they see
        # The tokenizer's threads are counted once, when it first runs, and would else be all of the node's cores.
        os.environ["RAYON_NUM_THREADS"] = str(workers.num_threads)
        _opened.clear()
        _opened[identity] = open_worker(*arguments)
    return _do(_opened[identity], share, parts)


def _do_on_ray(
    job: FileJob, missing: Sequence[int], workers: WorkersConfig
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The shares as tasks, `workers.num` at a time. Ray gives tasks to processes that have done such ones before."""
    if not missing:
        return
    ray = import_extra("ray")
    from raytower.runtime import check_room, ensure_ray, run_tasks
    from raytower.shared_storage import check_shared

    ensure_ray(workers.num_cpus)
    check_room(workers)
    check_shared(job.folder)
    task = ray.remote(
        num_cpus=workers.num_cpus,
        num_gpus=workers.num_gpus,
        **workers.ray_options,
        max_calls=0,  # else Ray ends a process with a GPU after each task, and models are loaded anew
    )(_do_in_task)
    # Arguments travel once, and not with every task.
    shared = (job.identity, job.open_worker, ray.put(job.arguments), workers)
    yield from run_tasks(
        lambda number: task.remote(*shared, job.shares[number], job.parts(number)),
        missing,
        workers.num,
        "the job",
    )
