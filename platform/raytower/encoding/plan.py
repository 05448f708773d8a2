"""Planning an encoding job: numbers in, plan out."""

from __future__ import annotations

from dataclasses import dataclass

_FILES_PER_WORKER = 8
_MIN_ROWS_PER_FILE = 256
_MAX_ROWS_PER_FILE = 65_536
# Texts, token ids and Arrow buffers of one row in flight, generously; vectors are counted apart.
_BYTES_PER_ROW_IN_FLIGHT = 8_192


@dataclass(frozen=True, kw_only=True)
class EncodePlan:
    """What an encoding run will do; printed by --dry-run."""

    rows: int
    files: int
    rows_per_file: int
    workers: int
    predicted_disk_bytes: int
    predicted_memory_bytes_per_worker: int


def choose_rows_per_file(num_rows: int, num_workers: int) -> int:
    """Rows of one output file: enough files that workers finish together, few enough that a folder stays listable.

    A power of two between 256 and 65,536, about eight files a worker.
    """
    wanted = max(num_rows // (num_workers * _FILES_PER_WORKER), 1)
    rows = 1 << (wanted.bit_length() - 1)
    return min(max(rows, _MIN_ROWS_PER_FILE), _MAX_ROWS_PER_FILE)


def plan_encode(
    *,
    num_rows: int,
    num_bytes: int,
    num_files: int,
    rows_per_file: int,
    num_workers: int,
    dim: int,
    vector_bytes: int,
    num_parameters: int,
    parameter_bytes: int,
) -> EncodePlan:
    """Predict disk and memory. Disk: vectors plus the texts; memory: weights plus one file's rows in flight."""
    per_row = dim * vector_bytes
    return EncodePlan(
        rows=num_rows,
        files=num_files,
        rows_per_file=rows_per_file,
        workers=min(num_workers, num_files),
        predicted_disk_bytes=num_rows * per_row + num_bytes,
        predicted_memory_bytes_per_worker=num_parameters * (4 + parameter_bytes)
        + rows_per_file * (_BYTES_PER_ROW_IN_FLIGHT + dim * 4 + per_row),
    )
