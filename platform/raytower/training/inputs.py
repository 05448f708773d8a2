"""Training inputs: finding their kind, surveying them, and refusing data that cannot train anything."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from raytower.data.config import NamedInput
from raytower.data.pieces import Piece, Survey, read_piece
from raytower.data.pieces import survey as survey_input
from raytower.data.records import RecordKind
from raytower.data.rejects import quarantine_of
from raytower.data.sources import find_files, refuse_output_inside
from raytower.errors import InputError
from raytower.progress import log
from raytower.training.config import DevConfig, TrainJobConfig
from raytower.training.dev_split import set_dev_aside


def survey_training(
    config: TrainJobConfig, path: str, wanted: str, kinds: Sequence[str], objective: str
) -> Survey:
    """Survey the training file as `wanted`, or, for `auto`, as the first of `kinds` that its rows fit.

    With dev.share the survey's pieces are those that are trained, and its `set_aside` hold the dev rows.

    Args:
        config: says what happens to bad rows.
        path: the training file.
        wanted: train.format.
        kinds: what the objective trains from.
        objective: its name, for messages.

    Raises:
        InputError: bad rows under on_error fail, rows that fit none of `kinds`, or a `wanted` that is none of them.
    """
    refuse_output_inside(config.output, path)
    source = NamedInput(path=path)
    if wanted != "auto" and wanted not in kinds:
        raise InputError(
            f"train.format is {wanted!r}, and objective {objective} trains from {', '.join(kinds)}; change one of them"
        )
    quarantine = quarantine_of(config.output)
    candidates = cast(Sequence[RecordKind], kinds if wanted == "auto" else [wanted])
    reasons = []
    for kind in candidates:
        try:
            surveyed = survey_input(source, kind, on_error=config.on_error, quarantine=quarantine)
        except InputError as error:
            if len(candidates) == 1:
                raise
            reasons.append(f"as {kind}: {error}")
        else:
            share = config.dev.share if config.dev else None
            return surveyed if share is None else set_dev_aside(surveyed, share, config.seed)
    raise InputError(
        f"{path!r} holds no rows that objective {objective} trains from; name what they are by train.format:\n"
        + "\n".join(reasons)
    )


def tables(survey: Survey) -> Iterator[pa.Table]:
    """The rows of an input, a piece at a time."""
    return (read_piece(piece) for piece in survey.pieces)


def dev_tables(dev: DevConfig, kind: RecordKind, set_aside: Sequence[Piece]) -> Iterator[pa.Table]:
    """The dev rows, a piece at a time: those of dev.path as `kind`, or the training rows that were set aside.

    Raises:
        InputError: bad rows in dev.path.
    """
    if dev.path is None:
        return map(read_piece, set_aside)
    return tables(survey_input(NamedInput(path=dev.path), kind))


def refuse_single_text(survey: Survey, columns: Sequence[str]) -> None:
    """Raise InputError if all rows have the same text in one of `columns`: no row would have a negative.

    Of a list of documents the first one counts. It reads until every column has two texts, mostly one piece.
    """
    first: dict[str, str] = {}
    open_columns = list(columns)
    for table in tables(survey):
        for name in list(open_columns):
            column = table[name]
            values = pc.unique(pc.list_element(column, 0) if pa.types.is_list(column.type) else column)
            text = first.setdefault(name, values[0].as_py())
            if len(values) > 1 or values[0].as_py() != text:
                open_columns.remove(name)
        if not open_columns:
            return
    name = open_columns[0]
    raise InputError(
        f"all {survey.num_rows} training rows have the same {name}, {first[name][:60]!r}: there is nothing to tell "
        "apart, and no row has a negative; check the columns of the file"
    )


def check_labels(survey: Survey, apply: Callable[[Tensor], object], num_documents: int | None = None) -> None:
    """Apply the objective to all labels once before training, so that a bad one fails now and not hours later.

    `apply` computes the objective for labels (B,) with a constant in place of a model's output. It raises InputError
    for a label that breaks the objective's rule. The labels of candidates are the scores of their best
    `num_documents`.
    """
    for table in tables(survey):
        if "label" in table.column_names:
            labels = table["label"].to_pylist()
        else:
            labels = [score for row in table["scores"].to_pylist() for score in row[:num_documents]]
        try:
            apply(torch.tensor(labels, dtype=torch.float32))
        except InputError as error:
            raise InputError(f"{', '.join(survey.files[:3])}: {error}") from error


def count_documents(survey: Survey, wanted: int | None) -> int | None:
    """Documents to take from each candidate list: `wanted`, or as many as every row has; None for other rows.

    Raises:
        InputError: a row has fewer than `wanted`.
    """
    if "documents" not in survey.schema.names:
        return None
    lengths = [pc.list_value_length(table["documents"]) for table in tables(survey)]
    fewest = min(int(pc.min(length).as_py()) for length in lengths)
    if wanted is not None and fewest < wanted:
        raise InputError(
            f"train.num_documents is {wanted}, and a row has only {fewest}; lower it, or leave it out to take "
            f"{fewest} from every row"
        )
    count = wanted if wanted is not None else fewest
    longer = sum(int(pc.sum(pc.greater(length, count)).as_py() or 0) for length in lengths)
    if longer:
        log(
            f"{longer:,} of {survey.num_rows:,} rows have more than {count} documents and are cut to their best "
            f"{count}; train.num_documents says how many to take"
        )
    return count


def content_hash(path: str) -> str:
    """Hash over the content of all files of an input: a file, a folder or a glob."""
    digest = hashlib.sha256()
    for file in find_files(path).files:
        digest.update(f"{file.location.name} {file.location.sha256()}\n".encode())
    return digest.hexdigest()[:16]
