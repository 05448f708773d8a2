"""The folder that a job writes to: what would keep the job from writing there, or is not its own, is found first."""

from __future__ import annotations

import os
from pathlib import Path

from raytower.errors import InputError
from raytower.storage.location import Location


def output_folder(output: str, *own: str) -> Location:
    """The place of a folder that a job may write: it is not there, or empty, or what an earlier start left.

    Hidden names count for nothing: file managers and killed writers leave some.

    Args:
        own: names of which each folder that such a job has begun holds one.

    Raises:
        InputError: no name, a file, a folder below something that is no folder or may not be written, or one that
            holds something and none of `own`.
    """
    place = writable_place(output)
    if place.is_file():
        raise InputError(f"output {output!r} is a file; name a folder")
    names = [child.name for child in place.children()]
    others = [name for name in names if not name.startswith(".")]
    if others and not set(own) & set(names):
        raise InputError(
            f"output {output!r} holds files of something else, as {others[0]!r}; choose a new output, or remove the "
            "old one"
        )
    return place


def writable_place(output: str) -> Location:
    """The place of an output. Raises InputError: no name, or nothing can be made where it would stand."""
    if not output.strip():
        raise InputError(f"output is {output!r}; name a place")
    place = Location.of(output)
    if place.is_local and not place.exists():
        above = next(folder for folder in Path(place.path).parents if folder.exists())
        if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
            raise InputError(
                f"output {output!r} cannot be written: {above} is no folder that this user may write to"
            )
    return place
