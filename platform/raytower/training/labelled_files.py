"""Labels that stand in the names of files or folders, or that the config names: one file, or one folder, a class."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath

from raytower.config import OnError
from raytower.data.config import NamedInput
from raytower.data.pieces import Piece, Survey, say_files, survey
from raytower.data.plain_labels import plain_label
from raytower.data.records import canonical_schema
from raytower.data.sources import SourceFile, find_files, split_glob
from raytower.data.survey_notes import remembered
from raytower.errors import InputError
from raytower.progress import log
from raytower.storage import Location
from raytower.training.config import LabelBy


def survey_by_label(
    path: str, label_by: LabelBy, on_error: OnError | None, quarantine: Location | str | None, key: str
) -> Survey:
    """Survey the files of `path` as labelled rows: their texts, each with the label of its file or folder.

    Args:
        path: a folder or a glob.
        label_by: file, whose label is its name without extensions; folder, whose label is that of the folder that it
            lies in.
        on_error: what happens to bad rows.
        quarantine: where rows that are put aside are listed.
        key: of `label_by` in the config, for messages.

    Raises:
        InputError: nothing to read, a file that has no label of its own, or bad rows.
    """
    found = find_files(path)
    say_files("passed over", found.ignored)
    labelled = [(_label_of(file, label_by, path, key), file) for file in found.files]
    return _survey(labelled, on_error, quarantine, path, key)


def survey_paths(
    paths: Mapping[str, str], on_error: OnError | None, quarantine: Location | str | None, key: str
) -> Survey:
    """Survey texts as labelled rows, whose labels the config names.

    Args:
        paths: of each label a file, a folder or a glob.
        on_error, quarantine: as `survey_by_label`.
        key: of `paths` in the config, for messages.

    Raises:
        InputError: nothing to read, a file under two labels, or bad rows.
    """
    label_of: dict[str, str] = {}
    labelled = []
    for label, path in paths.items():
        found = find_files(path)
        say_files("passed over", found.ignored)
        for file in found.files:
            other = label_of.setdefault(str(file), label)
            if other != label:
                raise InputError(
                    f"{key} has {file} under {other!r} and under {label!r}; a text has one label: keep one of them"
                )
            labelled.append((label, file))
    return _survey(labelled, on_error, quarantine, ", ".join(paths.values()), key)


def _survey(
    labelled: Sequence[tuple[str, SourceFile]],
    on_error: OnError | None,
    quarantine: Location | str | None,
    path: str,
    key: str,
) -> Survey:
    surveys, empty = [], []
    for label, file in labelled:
        surveyed = survey(
            NamedInput(path=str(file)),
            "lines",
            on_error=on_error,
            quarantine=quarantine,
            say=False,
            may_be_empty=True,
            remember=remembered,
        )
        surveys.append((label, surveyed))
        if not surveyed.num_rows:
            empty.append(str(file))
    # One empty file must not stop a job, but the user must hear of it: a class may be missing.
    say_files("no row in", empty)
    if len(empty) == len(surveys):
        raise InputError(f"{path!r} holds no file with a row; give files that have rows")
    _name_unread(path, key, surveys)
    return _joined(surveys, quarantine)


def _label_of(file: SourceFile, label_by: LabelBy, path: str, key: str) -> str:
    name = PurePosixPath(file.location.path)
    if label_by == "folder" and split_glob(path)[0].path == str(name.parent):
        raise InputError(
            f"{key} is folder, and {file} lies at the top of {path!r}, in no folder of a class; move it into one, or "
            "set it to file"
        )
    text = name.parent.name if label_by == "folder" else _bare_name(file)
    if not (label := plain_label(text)):
        raise InputError(f"{key} is {label_by}, and the name of {file} gives no label; rename it")
    return label


def _bare_name(file: SourceFile) -> str:
    """The name without the extensions that say format and compression, which may be in capitals."""
    compression = {"gzip": ".gz", "zstd": ".zst", None: ""}[file.compression]
    name = file.location.name
    return name[: len(name) - len(file.suffix + compression)]


def _name_unread(path: str, key: str, surveys: Sequence[tuple[str, Survey]]) -> None:
    unread = sorted({column for _, surveyed in surveys for column in surveyed.unread_columns})
    if unread:
        named = ", ".join(map(repr, unread))
        log(f"{path}: read as texts, whose labels stand in names ({key}); {named} are no part of them")


def _joined(surveys: Sequence[tuple[str, Survey]], quarantine: Location | str | None) -> Survey:
    schema = canonical_schema("labelled")
    pieces: list[Piece] = []
    num_rows = 0
    for label, surveyed in surveys:
        for piece in surveyed.pieces:
            pieces.append(
                dataclasses.replace(piece, index=len(pieces), first_row=num_rows, schema=schema, label=label)
            )
            num_rows += piece.num_rows
    listed = [surveyed.quarantine_file for _, surveyed in surveys if surveyed.quarantine_file]
    return Survey(
        pieces=tuple(pieces),
        num_rows=num_rows,
        num_rejected=sum(surveyed.num_rejected for _, surveyed in surveys),
        files=tuple(file for _, surveyed in surveys for file in surveyed.files),
        bytes=sum(surveyed.bytes for _, surveyed in surveys),
        schema=schema,
        quarantine_file=listed[0] if len(listed) == 1 else str(quarantine) if listed else None,
    )
