"""Whether a place can be written and is the job's own, found before the work whose result goes there; making room."""

from __future__ import annotations

import os
from itertools import count
from pathlib import Path

from pyarrow import fs as pafs

from raytower.errors import InputError
from raytower.storage.location import Location


def check_output(output: str, *, is_folder: bool) -> Location:
    """The place of an output, which is to be a folder of several files, or one file.

    Raises:
        InputError: no name; something of another kind is there (/dev/null keeps nothing); a link that leads nowhere
            stands in the way; or this user may not write there.
    """
    if not output.strip():
        raise InputError(f"output is {output!r}; name a place")
    place = Location.of(output)
    wanted, other = ("a folder", "a file") if is_folder else ("a file", "a folder")
    kind = place.info().type
    if kind == (pafs.FileType.File if is_folder else pafs.FileType.Directory):
        raise InputError(f"output {output!r} is {other}; name {wanted}")
    if kind == pafs.FileType.Unknown:
        raise InputError(
            f"output {output!r} is neither a file nor a folder: what is written there is not kept; name {wanted}"
        )
    if place.is_local:
        _check_local(output, Path(place.path), is_folder=is_folder)
    return place


def output_folder(output: str, *own: str) -> Location:
    """The place of a folder that a job may write: it is not there, or empty, or what an earlier start left.

    Hidden names count for nothing: file managers and killed writers leave some.

    Args:
        own: names of which each folder that such a job has begun holds one.

    Raises:
        InputError: as `check_output`, or the folder holds something and none of `own`.
    """
    place = check_output(output, is_folder=True)
    names = [child.name for child in place.children()]
    others = [name for name in names if not name.startswith(".")]
    if others and not set(own) & set(names):
        raise InputError(
            f"output {output!r} holds files of something else, as {others[0]!r}; choose a new output, or remove the "
            "old one"
        )
    return place


def former_place(output: str) -> Location:
    """The hidden name beside an output that `put_aside` gives to it.

    Raises:
        InputError: object stores cannot rename, and nothing is removed that somebody may want.
    """
    place = Location.of(output)
    if not place.is_local:
        raise InputError(
            f"output {output!r} was made by an earlier config or from other data, and its storage cannot rename it to "
            "make room; remove it, or name another output"
        )
    names = (place.parent / f".{place.name}.former-{number}" for number in count(1))
    return next(name for name in names if not name.exists())


def put_aside(output: str) -> Location:
    """Rename an output to a hidden name beside it, since no job takes what is hidden for data; returns the new place.

    Raises:
        InputError: as `former_place`.
    """
    target = former_place(output)
    Path(Location.of(output).path).rename(target.path)
    return target


def _check_local(output: str, path: Path, *, is_folder: bool) -> None:
    for part in (path, *path.parents):
        if part.is_symlink() and not part.exists():
            raise InputError(
                f"output {output!r} cannot be written: {part} is a link to {os.readlink(part)!r}, which is not there; "
                "make that, or remove the link"
            )
    # A file is made beside its name and renamed, so that its folder must be writable even where it is there.
    candidates = (path, *path.parents) if is_folder else path.parents
    above = next(folder for folder in candidates if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise InputError(
            f"output {output!r} cannot be written: {above} is no folder that this user may write to; name another place"
        )
