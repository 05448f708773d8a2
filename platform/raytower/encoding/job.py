"""`raytower encode`: a corpus into a folder of Parquet files with vectors, and its manifest last."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import ray
import ray.data

from raytower.config import OnError
from raytower.data.pieces import Piece, Survey
from raytower.data.pieces import survey as survey_input
from raytower.encoding.config import EncodeConfig
from raytower.encoding.manifest import MANIFEST_NAME, EmbeddingsFile, EmbeddingsManifest
from raytower.encoding.plan import EncodePlan, choose_rows_per_file, plan_encode
from raytower.encoding.worker import PADDED_KEY, TOKENS_KEY, PieceEncoder, WorkerSettings, part_name
from raytower.errors import InputError, RaytowerError, find_cause
from raytower.models.encoder import Encoder
from raytower.models.forward import check_max_length
from raytower.runtime import ensure_ray, log
from raytower.storage import Location, absolute_if_local

JOB_NAME = "job.json"
_SURVEY_ROWS = 65_536
_PARAMETER_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_LOG_EVERY_SECONDS = 5.0


def encode(config: EncodeConfig) -> dict[str, Any]:
    """Encode the corpus; files that an earlier, killed run of the same job finished are kept.

    Returns:
        rows, tokens, seconds, startup_seconds (until the first text was begun), output, fingerprint,
        tokens_per_second, padding_share, files_encoded, rejected_rows.

    Raises:
        InputError: bad rows under on_error=fail, duplicate ids, an output of another job, an unknown model.
        RaytowerError: vectors that are not finite, or workers that failed.
    """
    started_at, started = time.time(), time.perf_counter()
    startup_seconds = 0.0
    encoder = Encoder.load(config.encoder)
    check_max_length(config.max_length, encoder.max_positions)
    prefix = config.prefix if config.prefix is not None else encoder.prefix_for("document")
    survey, rows_per_file = _survey(config)
    output = Location.of(config.output)
    spec = _job_spec(config, encoder, prefix, survey, rows_per_file)
    done = _finished_parts(output, spec, survey.pieces)
    pieces = [piece for piece in survey.pieces if part_name(piece) not in done]
    if not (output / MANIFEST_NAME).exists():
        if done:
            log(f"{len(done)} of {len(survey.pieces)} files are finished already")
        if pieces:
            ensure_ray()
            settings = _worker_settings(config, encoder.fingerprint, prefix)
            first_start = _run(settings, config, survey.pieces, pieces)
            startup_seconds = max(first_start - started_at, 0.0)
        _write_manifest(output, config, encoder, prefix, survey)
    else:
        log(f"{config.output} is finished; nothing to do")
    tokens, padded = _count_tokens(output, survey.pieces)
    seconds = time.perf_counter() - started
    return {
        "rows": survey.num_rows,
        "tokens": tokens,
        "seconds": round(seconds, 3),
        "startup_seconds": round(startup_seconds, 3),
        "output": config.output,
        "fingerprint": encoder.fingerprint,
        "tokens_per_second": round(tokens / seconds, 1),
        "padding_share": round(1 - tokens / padded, 4) if padded else 0.0,
        "files_encoded": len(pieces),
        "rejected_rows": survey.num_rejected,
    }


def plan(config: EncodeConfig) -> dict[str, Any]:
    """The plan for --dry-run: rows, files, predicted memory and disk."""
    encoder = Encoder.load(config.encoder)
    check_max_length(config.max_length, encoder.max_positions)
    survey, rows_per_file = _survey(config)
    made: EncodePlan = plan_encode(
        num_rows=survey.num_rows,
        num_bytes=survey.bytes,
        num_files=len(survey.pieces),
        rows_per_file=rows_per_file,
        num_workers=config.workers.max,
        dim=encoder.dim,
        vector_bytes=np.dtype(config.embedding_dtype).itemsize,
        num_parameters=sum(parameter.numel() for parameter in encoder.parameters()),
        parameter_bytes=_PARAMETER_BYTES[config.compute.dtype],
    )
    return {**asdict(made), "fingerprint": encoder.fingerprint, "rejected_rows": survey.num_rejected}


def _survey(config: EncodeConfig) -> tuple[Survey, int]:
    quarantine = Location.of(config.output) / "quarantine" if config.on_error == "quarantine" else None
    on_error: OnError = config.on_error
    rows = config.rows_per_file
    if rows is None:
        first = survey_input(config.input, "corpus", _SURVEY_ROWS, on_error, quarantine)
        rows = choose_rows_per_file(first.num_rows, config.workers.max)
        if rows == _SURVEY_ROWS:
            return first, rows
    return survey_input(config.input, "corpus", rows, on_error, quarantine), rows


def _job_spec(
    config: EncodeConfig, encoder: Encoder, prefix: str, survey: Survey, rows_per_file: int
) -> dict[str, Any]:
    """What decides the content of the files; a second run must match it."""
    return {
        "fingerprint": encoder.fingerprint,
        "prefix": prefix,
        "max_length": config.max_length,
        "compute_dtype": config.compute.dtype,
        "embedding_dtype": config.embedding_dtype,
        "input": config.input.model_dump(mode="json"),
        "input_rows": survey.num_rows,
        "input_bytes": survey.bytes,
        "rows_per_file": rows_per_file,
    }


def _finished_parts(output: Location, spec: dict[str, Any], pieces: Sequence[Piece]) -> set[str]:
    """Names of finished files, after checking that the folder belongs to this job. A new folder is claimed."""
    place = output / JOB_NAME
    if place.exists():
        found = place.read_json()
        different = [key for key in spec if found.get(key) != spec[key]]
        if different:
            key = different[0]
            raise InputError(
                f"output {str(output)!r} belongs to another encoding job: {key} is {found.get(key)!r} there and "
                f"{spec[key]!r} now; choose a new output, or remove the old one"
            )
    elif [
        child for child in output.children() if child.name.endswith(".parquet") or child.name == MANIFEST_NAME
    ]:
        raise InputError(f"output {str(output)!r} holds files of something else; choose a new output")
    else:
        place.write_json(spec)
    names = {part_name(piece) for piece in pieces}
    return names & {child.name for child in output.children()}


def _worker_settings(config: EncodeConfig, fingerprint: str, prefix: str) -> WorkerSettings:
    return WorkerSettings(
        encoder=absolute_if_local(config.encoder),
        fingerprint=fingerprint,
        output=absolute_if_local(config.output),
        prefix=prefix,
        max_length=config.max_length,
        embedding_dtype=config.embedding_dtype,
        compute=config.compute,
        num_threads=max(int(config.workers.num_cpus), 1),
        use_gpu=config.workers.num_gpus > 0,
    )


def _run(
    settings: WorkerSettings, config: EncodeConfig, every: Sequence[Piece], pieces: Sequence[Piece]
) -> float:
    """Encode `pieces`; returns the time (epoch seconds) at which the first of them was begun."""
    workers = config.workers
    size = min(workers.max, len(pieces))
    numbers = {piece.index: number for number, piece in enumerate(every)}
    items = [{"piece": numbers[piece.index]} for piece in pieces]
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        PieceEncoder,
        batch_size=1,
        # Never a fixed pool: one that can hold every surviving CPU hangs after a node is lost.
        compute=ray.data.ActorPoolStrategy(min_size=min(workers.min, size), max_size=size),
        num_cpus=workers.num_cpus,
        num_gpus=workers.num_gpus or None,
        fn_constructor_kwargs={"settings": settings, "pieces": ray.put(list(every))},
    )
    started = reported = time.perf_counter()
    rows = tokens = files = 0
    first_start = float("inf")
    total = sum(piece.num_rows for piece in pieces)
    try:
        for row in dataset.iter_rows():
            rows, tokens, files = rows + row["rows"], tokens + row["tokens"], files + 1
            first_start = min(first_start, row["started_at"])
            now = time.perf_counter()
            if now - reported > _LOG_EVERY_SECONDS or files == len(pieces):
                reported, elapsed = now, now - started
                log(
                    f"encoded {rows:,}/{total:,} texts  {rows / elapsed:.0f} texts/s  {tokens / elapsed:.0f} tokens/s  "
                    f"{elapsed * (total - rows) / rows:.0f} s left"
                )
    except Exception as error:
        cause = find_cause(error)
        if isinstance(cause, RaytowerError):
            raise cause from error
        raise RaytowerError(f"encoding failed: {error}") from error
    return first_start


def _write_manifest(
    output: Location, config: EncodeConfig, encoder: Encoder, prefix: str, survey: Survey
) -> None:
    files = []
    for piece in survey.pieces:
        place = output / part_name(piece)
        with place.open_read() as stream:
            rows = pq.ParquetFile(stream).metadata.num_rows
        if rows != piece.num_rows:
            raise RaytowerError(
                f"{place} has {rows} rows, its piece has {piece.num_rows}; remove it and encode again"
            )
        files.append(
            EmbeddingsFile(name=place.name, rows=rows, bytes=place.size_bytes(), sha256=place.sha256())
        )
    EmbeddingsManifest(
        fingerprint=encoder.fingerprint,
        encoder=absolute_if_local(config.encoder),
        dim=encoder.dim,
        dtype=config.embedding_dtype,
        normalised=encoder.normalised,
        similarity=encoder.settings.similarity,
        prefix=prefix,
        query_prefix=encoder.prefix_for("query"),
        max_length=config.max_length,
        compute_dtype=config.compute.dtype,
        rows=survey.num_rows,
        files=tuple(files),
    ).write(output)


def _count_tokens(output: Location, pieces: Sequence[Piece]) -> tuple[int, int]:
    tokens = padded = 0
    for piece in pieces:
        with (output / part_name(piece)).open_read() as stream:
            metadata = pq.read_schema(stream).metadata or {}
        tokens += int(metadata.get(TOKENS_KEY, b"0"))
        padded += int(metadata.get(PADDED_KEY, b"0"))
    return tokens, padded
