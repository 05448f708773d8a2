"""What training jobs share about their input files."""

from __future__ import annotations

from collections.abc import Sequence

from raytower.data.pieces import survey as survey_input
from raytower.data.records import RecordKind
from raytower.data.sources import InputConfig
from raytower.errors import InputError
from raytower.storage import Location

ROWS_PER_PIECE = 8192


def quarantine_place(output: Location) -> Location:
    """Where rejected rows of a training job go: beside its output directory."""
    return output.parent / f"{output.name}.quarantine"


def detect_kind(source: InputConfig, kinds: Sequence[RecordKind]) -> RecordKind:
    """The first of `kinds` that the file's rows are, for `format: auto`.

    Raises:
        InputError: the rows are none of them; the message holds what each kind asked for.
    """
    reasons = []
    for kind in kinds:
        try:
            survey_input(source, kind, rows_per_piece=ROWS_PER_PIECE)
        except InputError as error:
            reasons.append(f"as {kind}: {error}")
        else:
            return kind
    raise InputError(f"{source.path!r} is none of {', '.join(kinds)}:\n" + "\n".join(reasons))
