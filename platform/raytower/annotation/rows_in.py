"""Reading the rows that are annotated: surveyed once, then a bounded number at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import pyarrow as pa

from raytower.annotation.config import AnnotationConfig
from raytower.annotation.rows_out import check_rows_output, refuse_name_of_another_type
from raytower.data.pieces import DEFAULT_ROWS_PER_PIECE, Survey, read_pieces, say_unread
from raytower.data.pieces import survey as survey_input
from raytower.data.rejects import quarantine_of
from raytower.data.sources import refuse_output_inside


def survey_rows(
    config: AnnotationConfig,
    kind: Literal["pairs", "scored", "labelled", "lines"],
    *written: Sequence[str],
    rows_per_piece: int = DEFAULT_ROWS_PER_PIECE,
) -> Survey:
    """Survey a job's input as rows of `kind`; rejected rows go beside the output, under its name.

    Args:
        written: the sets of columns that the job writes.
        rows_per_piece: rows that are read as one table.

    Raises:
        InputError: no such input, bad rows under on_error fail, an output inside the input, one that cannot be written,
            one whose name means another type of file, or a file that is no result of this job.
    """
    refuse_output_inside(config.output, config.input.path)
    check_rows_output(config.output, *written)
    refuse_name_of_another_type(config.output, config.file_type)
    surveyed = survey_input(config.input, kind, rows_per_piece, config.on_error, quarantine_of(config.output))
    say_unread(config.input.path, kind, surveyed)
    return surveyed


def row_batches(survey: Survey, rows_per_batch: int) -> Iterator[pa.Table]:
    """The good rows of an input in file order, a bounded number at a time; one piece is held at once."""
    for table in read_pieces(survey.pieces):
        for start in range(0, table.num_rows, rows_per_batch):
            yield table.slice(start, rows_per_batch)
