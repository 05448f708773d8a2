"""Records as a Ray Dataset: one read task for each piece. The only module of this package that knows Ray."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import pyarrow as pa
import ray.data
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from raytower.config import OnError
from raytower.data.pieces import DEFAULT_ROWS_PER_PIECE, Piece, Survey, group_pieces, read_pieces, survey
from raytower.data.records import RecordKind
from raytower.data.sources import InputConfig
from raytower.storage import Location


def read_dataset(
    input: InputConfig,
    kind: RecordKind,
    on_error: OnError = "fail",
    quarantine: Location | str | None = None,
    rows_per_piece: int = DEFAULT_ROWS_PER_PIECE,
) -> ray.data.Dataset:
    """Survey the input here, then read it in the cluster: a Dataset of the pieces' rows.

    Raises:
        InputError: as `survey` does, at once. What goes wrong later in a worker (a file that has gone or changed) is
            an InputError at the bottom of what Ray raises; `raytower.errors.find_cause` gets it out.
    """
    return dataset_of(survey(input, kind, rows_per_piece, on_error, quarantine))


def dataset_of(surveyed: Survey) -> ray.data.Dataset:
    """The Dataset of an input that has been surveyed already; rows come in the order of the pieces."""
    groups = group_pieces(surveyed.pieces)
    bytes_per_row = surveyed.bytes / max(1, surveyed.num_rows)
    dataset = ray.data.read_datasource(
        _PieceSource(groups, surveyed.schema, bytes_per_row), override_num_blocks=len(groups)
    )
    # The Dataset has a context of its own: whoever reads other data in this process is not affected.
    dataset.context.execution_options.preserve_order = True
    return dataset


class _PieceSource(Datasource):
    """Read tasks over groups of pieces; each group is read by one worker. A piece read alone is one block."""

    def __init__(self, groups: Sequence[Sequence[Piece]], schema: pa.Schema, bytes_per_row: float):
        super().__init__()
        self._groups = groups
        self._schema = schema
        self._bytes_per_row = bytes_per_row

    def get_name(self) -> str:
        return "RaytowerPieces"

    def estimate_inmemory_data_size(self) -> int:
        return sum(self._num_bytes(group) for group in self._groups)

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: object = None
    ) -> list[ReadTask]:
        return [
            ReadTask(
                functools.partial(_read_group, tuple(group)),
                BlockMetadata(
                    num_rows=sum(piece.num_rows for piece in group),
                    size_bytes=self._num_bytes(group),
                    input_files=None,
                    exec_stats=None,
                ),
                schema=self._schema,
                per_task_row_limit=per_task_row_limit,
            )
            for group in self._groups
        ]

    def _num_bytes(self, group: Sequence[Piece]) -> int:
        return int(self._bytes_per_row * sum(piece.num_rows for piece in group)) + 1


def _read_group(pieces: tuple[Piece, ...]) -> Iterator[pa.Table]:
    yield from read_pieces(pieces)
