"""`raytower encode`: a corpus into a folder of Parquet files with vectors, and its manifest last.

A file appears when it is whole, with a record of its bytes, so a second start of a killed job keeps what is sound and
encodes what is missing. One job at a time writes to an output.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import ray
import ray.data
import torch
from ray.exceptions import RayError

from raytower.config import WorkersConfig
from raytower.data.layouts import Source
from raytower.data.pieces import Piece, Survey, read_piece
from raytower.data.pieces import survey as survey_input
from raytower.data.rejects import quarantine_of
from raytower.data.sources import refuse_output_inside
from raytower.encoding.config import EncodeConfig
from raytower.encoding.manifest import MANIFEST_NAME, EmbeddingsManifest
from raytower.encoding.parts import PartFigures, part_name
from raytower.encoding.plan import (
    CorpusSize,
    ModelSize,
    WorkerShape,
    choose_rows_per_file,
    join_pieces,
    plan_encode,
)
from raytower.encoding.progress import progress
from raytower.encoding.records import collect_records, find_parts, remove_left_overs
from raytower.encoding.worker import EncodedPiece, PieceEncoder, read_answer
from raytower.errors import FormatError, OtherOutputError, RaytowerError
from raytower.models.compute import check_max_length
from raytower.models.device import default_block_rows, default_tokens_per_batch
from raytower.models.directory import resolve_model
from raytower.models.encoder import Encoder
from raytower.models.onnx_export import graph_for
from raytower.models.tokenising import tokenise
from raytower.models.trained_prefixes import own_prefix
from raytower.only_job import only_job
from raytower.progress import log
from raytower.runtime import check_room, ensure_ray, find_nodes, hold_on_head
from raytower.shared_storage import check_shared
from raytower.storage import (
    Lease,
    Location,
    absolute_if_local,
    output_folder,
)
from raytower.workers import fit_workers

JOB_NAME = "job.json"
# Counts up when the same settings would give other vectors, ids or files.
JOB_FORMAT = 2
_LOCK_NAME = ".encode.lock"
# Small pieces are parsed faster than large ones, and are joined to files of any size.
_SURVEY_ROWS = 1024
# Ray Data keeps some state for each block; a folder of very many small files gives several to one.
_MAX_BLOCKS = 4096
_READING_THREADS = 8
_TIMED = ("reading", "tokenising", "forward", "writing")
_SAMPLE_PIECES = 4
_SAMPLE_TEXTS = 256
# Two workers of half the cores encode faster than one of all (benchmarks/README.md): they exchange no gradients.
_WORKERS_PER_CPU_NODE = 2


@dataclass(frozen=True)
class _Job:
    """One run: what it encodes, with what, and where to. `pieces` are all of the corpus, one for each output file.

    `config` has the numbers of `workers`.
    """

    config: EncodeConfig
    workers: WorkersConfig
    encoder: Encoder
    prefix: str
    survey: Survey
    pieces: tuple[Piece, ...]
    rows_per_file: int

    @property
    def output(self) -> Location:
        return Location.of(self.config.output)


def encode(config: EncodeConfig) -> dict[str, Any]:
    """Encode the corpus; files that an earlier, killed run of the same job finished are kept.

    Returns:
        rows, tokens (of the whole folder), seconds, startup_seconds (until the first text was begun), output,
        fingerprint, texts_per_second and tokens_per_second (of this run, start-up counted), padding_share,
        reading_share, tokenising_share, forward_share, writing_share (of the workers' time), tokens_per_batch (what
        memory allowed in the end), files_encoded, rejected_rows.

    Raises:
        InputError: bad rows under on_error=fail, duplicate ids, an output of another job, an unknown model.
        MissingExtraError: engine onnx without ONNX Runtime.
        RaytowerError: vectors that are not finite, no memory or no room left, or workers that failed.
    """
    started_at, started = time.time(), time.perf_counter()
    answers: list[EncodedPiece] = []
    with _surveyed(config) as job, _only_job(job) as lease:
        _claim(job)
        _publish_quarantine(job)
        kept = find_parts(job.output / JOB_NAME, {part_name(piece): piece.num_rows for piece in job.pieces})
        missing = [piece for piece in job.pieces if part_name(piece) not in kept]
        is_finished = (job.output / MANIFEST_NAME).exists()
        if is_finished and not missing:
            log(f"{config.output} is finished; nothing to do")
        elif is_finished:
            log(f"{len(missing)} of {len(job.pieces)} files are missing or damaged; they are encoded again")
        elif kept:
            log(f"{len(kept)} of {len(job.pieces)} files are finished already")
        if missing:
            remove_left_overs(job.output, records=False)
            if config.engine == "onnx":
                # Now, for workers to find it: what goes wrong is said once.
                graph_for(job.encoder, config.dtype, resolve_model(config.encoder))
            ensure_ray(job.workers.num_cpus)
            check_room(job.workers)
            check_shared(job.output)
            answers = _run(job, missing)
        if lease is not None:
            lease.check()
        encoded = {answer.part.file.name: answer.part for answer in answers}
        tokens = _finish(job, {**kept, **encoded})
    figures = {
        "rows": job.survey.num_rows,
        "tokens": tokens,
        **_speeds(answers, started_at, time.perf_counter() - started),
        "output": config.output,
        "fingerprint": job.encoder.fingerprint,
        "files_encoded": len(encoded),
        "rejected_rows": job.survey.num_rejected,
    }
    if answers:
        log(_summary(figures))
    return figures


def plan(config: EncodeConfig) -> dict[str, Any]:
    """The plan for --dry-run: rows, files, batches, predicted memory and disk. Nothing is written."""
    with _surveyed(config) as job:
        made = plan_encode(_corpus_size(job), _model_size(job.encoder), _worker_shape(job))
    return {
        **made,
        "fingerprint": job.encoder.fingerprint,
        "rejected_rows": job.survey.num_rejected,
    }


def pieces_in_flight(workers: WorkersConfig) -> int:
    """Pieces that one worker holds at once: a GPU must not wait while the next one is read and tokenised."""
    return 2 if workers.num_gpus > 0 else 1


# --- what is to be done --------------------------------------------------------------------------------------------


@contextmanager
def _surveyed(config: EncodeConfig) -> Iterator[_Job]:
    """The job, after every row was read. Rejected rows are listed in a folder that goes with the block."""
    output_folder(config.output, JOB_NAME)
    encoder = Encoder.load(config.encoder)
    if "max_length" not in config.model_fields_set:  # `up` has no such key to be told of
        config = config.model_copy(update={"max_length": min(config.max_length, encoder.max_positions)})
    check_max_length(config.max_length, encoder.max_positions)
    prefix = config.prefix if config.prefix is not None else own_prefix(encoder, "document", config.encoder)
    workers = fit_workers(
        config.workers, find_nodes, per_cpu_node=_WORKERS_PER_CPU_NODE, use_gpus=config.engine == "torch"
    )
    config = config.model_copy(update={"workers": config.workers.model_copy(update=workers.model_dump())})
    rejected = Path(tempfile.mkdtemp(prefix="raytower-rejected-"))
    try:
        survey, pieces, rows_per_file = _survey(config, workers, Location.of(rejected))
    except BaseException:
        with contextlib.suppress(OSError):  # holds the list that the error names
            rejected.rmdir()
        raise
    for column, name in survey.renamed_columns:
        log(
            f"column {column!r} passes through as {name!r}: the index keeps the name for itself or cannot store it"
        )
    try:
        yield _Job(config, workers, encoder, prefix, survey, pieces, rows_per_file)
    finally:
        shutil.rmtree(rejected, ignore_errors=True)


def _survey(
    config: EncodeConfig, workers: WorkersConfig, rejected: Location
) -> tuple[Survey, tuple[Piece, ...], int]:
    refuse_output_inside(config.output, config.input.path, is_folder=True)

    def read(rows: int, say: bool = True) -> Survey:
        # Steps that fill a file evenly: whoever names the size and whoever leaves it to be chosen get the same files.
        step = rows // -(-rows // _SURVEY_ROWS)
        quarantine = rejected if config.on_error == "quarantine" else None
        return survey_input(config.input, "corpus", step, config.on_error, quarantine, say=say)

    rows = config.rows_per_file or _recorded_rows_per_file(Location.of(config.output))
    found = read(rows or _SURVEY_ROWS)
    if rows is None:
        rows = choose_rows_per_file(found.num_rows, workers.num)
        # A small corpus is read again: small pieces from the start would cost a large one up to twice the time.
        found = found if rows >= _SURVEY_ROWS else read(rows, say=False)
    return found, join_pieces(found.pieces, rows), rows


def _recorded_rows_per_file(output: Location) -> int | None:
    """The size of an earlier start of this job, which may have had another number of workers."""
    place = output / JOB_NAME
    rows = place.read_json().get("rows_per_file") if place.is_file() else None
    return rows if isinstance(rows, int) and rows > 0 else None


def _only_job(job: _Job) -> AbstractContextManager[Lease | None]:
    return only_job(
        job.output / _LOCK_NAME,
        job.config.output,
        owner="an encoding job",
        doing="written by another encoding job",
    )


def _claim(job: _Job) -> None:
    """Make a new folder this job's. Raises InputError where it is another's."""
    place, spec = job.output / JOB_NAME, _job_spec(job)
    if (output_folder(job.config.output, JOB_NAME) / JOB_NAME).is_file():
        _refuse_another_job(job, place.read_json(), spec)
    else:
        place.write_json(spec)


def _refuse_another_job(job: _Job, found: dict[str, Any], spec: dict[str, Any]) -> None:
    remedy = "choose a new output, or remove the old one"
    if found.get("format_version") != JOB_FORMAT:
        is_same_model = found.get("fingerprint") == job.encoder.former_fingerprint
        raise OtherOutputError(
            f"output {job.config.output!r} was begun by another version of raytower: {JOB_NAME} has format "
            f"{found.get('format_version', 1)}, this version writes {JOB_FORMAT}. Format 1 left the model's "
            "config.json, query prompt and similarity, and the names of input folders, out of what it compared. "
            "Its encoder has "
            f"{'the same' if is_same_model else 'other'} weights and tokenizer by the older fingerprint; {remedy}"
        )
    different = [key for key in spec if found.get(key) != spec[key]]
    if different:
        sides = "; ".join(f"{key} is {found.get(key)!r} there and {spec[key]!r} now" for key in different)
        raise OtherOutputError(
            f"output {job.config.output!r} belongs to another encoding job: {sides}; {remedy}"
        )


def _publish_quarantine(job: _Job) -> None:
    """Put the list of rejected rows, if there are any, beside the output, now that it is known to be this job's."""
    if job.survey.quarantine_file is not None:
        source = Location.of(job.survey.quarantine_file)
        (quarantine_of(job.output) / source.name).write_bytes(source.read_bytes())


def _what_makes_vectors(job: _Job) -> dict[str, Any]:
    """What job.json and the manifest both say of the vectors."""
    return {
        "fingerprint": job.encoder.fingerprint,
        "prefix": job.prefix,
        "query_prefix": job.encoder.prefix_for("query"),
        "similarity": job.encoder.settings.similarity,
        "max_length": job.config.max_length,
        "engine": job.config.engine,
        "compute_dtype": job.config.dtype,
    }


def _job_spec(job: _Job) -> dict[str, Any]:
    """What decides the content of the files; a second run must match it."""
    config = job.config
    return {
        "format_version": JOB_FORMAT,
        **_what_makes_vectors(job),
        "embedding_dtype": config.embedding_dtype,
        "input": config.input.model_dump(mode="json"),
        "input_rows": job.survey.num_rows,
        "input_bytes": job.survey.bytes,
        "input_sha256": _content_hash(job.pieces),
        "rows_per_file": job.rows_per_file,
    }


def _content_hash(pieces: Sequence[Piece]) -> str:
    """Hash over names and content of the corpus's files, so that an edited corpus is never mixed with an older one.

    Folders count from the one that holds all files: ids may come from the names below it, columns also from above.
    """
    files = {
        run.source.file.location.path: run.source.file
        for piece in pieces
        for run in piece.runs
        if isinstance(run.source, Source)
    }
    top = os.path.commonpath([PurePosixPath(path).parent for path in files])
    digest = hashlib.sha256()
    with ThreadPoolExecutor(_READING_THREADS) as threads:
        hashes = threads.map(lambda file: file.location.sha256(), files.values())
        for (path, file), sha256 in zip(files.items(), hashes, strict=True):
            digest.update(
                json.dumps([file.stem, os.path.relpath(path, top), file.partitions, sha256]).encode()
            )
    return digest.hexdigest()


# --- doing it ------------------------------------------------------------------------------------------------------


def _run(job: _Job, missing: Sequence[Piece]) -> list[EncodedPiece]:
    """Encode the pieces in `missing`."""
    hold_on_head()
    config = job.config
    paths = {name: absolute_if_local(getattr(config, name)) for name in ("encoder", "output")}
    pieces = ray.put(list(job.pieces))
    try:
        with progress(sum(piece.num_rows for piece in missing)) as board:
            items = ray.data.from_items(
                [{"piece": piece.index} for piece in missing],
                override_num_blocks=min(len(missing), _MAX_BLOCKS),
            )
            dataset = items.map_batches(
                PieceEncoder,
                batch_size=1,
                compute=_pool(job.workers, config.workers.min, len(missing)),
                num_cpus=job.workers.num_cpus,
                num_gpus=job.workers.num_gpus or None,
                **job.workers.ray_options,
                fn_constructor_args=(
                    config.model_copy(update=paths), job.encoder.fingerprint, job.prefix, pieces, board
                ),
            )  # fmt: skip
            return [read_answer(row["answer"]) for row in dataset.iter_rows()]
    except RayError as error:
        raise RaytowerError(f"encoding failed: {error}") from error


def _pool(workers: WorkersConfig, least: int, num_pieces: int) -> ray.data.ActorPoolStrategy:
    size = min(workers.num, num_pieces)
    in_flight = pieces_in_flight(workers)
    # Never a fixed pool: one that can hold every surviving CPU hangs after a node is lost.
    return ray.data.ActorPoolStrategy(
        min_size=min(least, size),
        max_size=size,
        max_concurrent_calls_per_actor=in_flight,
        enable_true_multi_threading=in_flight > 1,
    )


def _finish(job: _Job, figures: dict[str, PartFigures]) -> int:
    """Write the manifest, every file being there; returns the tokens of the folder."""
    parts = [figures[part_name(piece)] for piece in job.pieces]
    tokens = sum(part.tokens for part in parts)
    config = job.config
    manifest = EmbeddingsManifest(
        **_what_makes_vectors(job),
        encoder=absolute_if_local(config.encoder),
        dim=job.encoder.dim,
        dtype=config.embedding_dtype,
        normalised=job.encoder.normalised,
        rows=job.survey.num_rows,
        tokens=tokens,
        derived_ids=job.survey.derived_ids,
        files=tuple(part.file for part in parts),
    )
    if not _is_written(manifest, job.output):
        collect_records(job.output / JOB_NAME, parts)
        manifest.write(job.output)
    remove_left_overs(job.output, records=True)
    return tokens


def _is_written(manifest: EmbeddingsManifest, output: Location) -> bool:
    try:
        return EmbeddingsManifest.read(output) == manifest
    except FormatError:  # none, or a damaged one
        return False


def _speeds(answers: Sequence[EncodedPiece], started_at: float, seconds: float) -> dict[str, Any]:
    """What this run of `seconds`, begun at epoch second `started_at`, did in its time."""
    parts = [answer.part for answer in answers]
    tokens = sum(part.tokens for part in parts)
    padded_tokens = sum(part.padded_tokens for part in parts)
    startup = min((answer.started_at for answer in answers), default=started_at) - started_at
    return {
        "seconds": round(seconds, 3),
        "startup_seconds": round(max(min(startup, seconds), 0.0), 3),
        "texts_per_second": round(sum(part.file.rows for part in parts) / seconds, 1),
        "tokens_per_second": round(tokens / seconds, 1),
        "padding_share": round(1 - tokens / padded_tokens, 4) if padded_tokens else 0.0,
        **_time_shares(answers),
        "tokens_per_batch": min((answer.tokens_per_batch for answer in answers), default=None),
    }


def _time_shares(answers: Sequence[EncodedPiece]) -> dict[str, float]:
    """Share of the workers' time by what it was spent on; tokenising and writing run beside the forward."""
    total = sum(answer.seconds["total"] for answer in answers) or float("inf")
    spent = {name: sum(answer.seconds[name] for answer in answers) for name in _TIMED}
    return {f"{name}_share": round(seconds / total, 4) for name, seconds in spent.items()}


def _summary(figures: dict[str, Any]) -> str:
    shares = ", ".join(f"{name} {figures[f'{name}_share']:.1%}" for name in _TIMED)
    return (
        f"encoded {figures['files_encoded']:,} files in {figures['seconds']:,.0f} s; "
        f"padding {figures['padding_share']:.1%} of the tokens computed; "
        f"of the workers' time: {shares} (tokenising and writing run beside the forward); "
        f"tokens_per_batch {figures['tokens_per_batch']:,}"
    )


# --- planning ------------------------------------------------------------------------------------------------------


def _corpus_size(job: _Job) -> CorpusSize:
    extents = [run.extent for piece in job.pieces for run in piece.runs]
    # Of text an extent counts decompressed bytes; of Parquet rows, whose bytes are known only as stored.
    is_parquet = any(extent.row_group is not None for extent in extents)
    text_bytes = job.survey.bytes if is_parquet else sum(extent.end - extent.start for extent in extents)
    return CorpusSize(
        rows=job.survey.num_rows,
        text_bytes=text_bytes,
        files=len(job.pieces),
        rows_per_file=job.rows_per_file,
        tokens_per_text=_mean_tokens(job),
    )


def _mean_tokens(job: _Job) -> float:
    """Tokens of a text, from the first texts of a few pieces spread over the corpus."""
    max_length = job.config.max_length
    lengths: list[int] = []
    for piece in job.pieces[:: max(len(job.pieces) // _SAMPLE_PIECES, 1)][:_SAMPLE_PIECES]:
        texts = read_piece(piece)["text"].slice(0, _SAMPLE_TEXTS).to_pylist()
        prepared = job.encoder.prepared(texts, job.prefix)
        lengths += tokenise(job.encoder.tokenizer, [prepared], max_length).lengths.tolist()
    return float(np.mean(lengths))


def _model_size(encoder: Encoder) -> ModelSize:
    tables = [module for module in encoder.modules() if isinstance(module, torch.nn.Embedding)]
    config = encoder.backbone.config
    width = encoder.width
    return ModelSize(
        parameters=sum(parameter.numel() for parameter in encoder.parameters()),
        embedding_parameters=sum(table.weight.numel() for table in tables),
        dim=encoder.dim,
        width=width,
        intermediate=int(getattr(config, "intermediate_size", 4 * width)),
    )


def _worker_shape(job: _Job) -> WorkerShape:
    config = job.config
    device = torch.device("cuda" if job.workers.num_gpus > 0 else "cpu")
    return WorkerShape(
        workers=job.workers.num,
        engine=config.engine,
        dtype=config.dtype,
        tokens_per_batch=config.tokens_per_batch or default_tokens_per_batch(device),
        block_rows=default_block_rows(device),
        vector_bytes=np.dtype(config.embedding_dtype).itemsize,
        on_gpu=device.type == "cuda",
        pieces_in_flight=pieces_in_flight(job.workers),
    )
