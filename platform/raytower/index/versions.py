"""Versions of an index: which there are, how one is published, and how a writer has the index for itself."""

from __future__ import annotations

import os
import re
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from raytower.errors import InputError, RaytowerError
from raytower.index.manifest import (
    LEXICAL_NAME,
    PLACEMENTS_NAME,
    SHARDS_NAME,
    TABLE_NAME,
    VECTORS_NAME,
    VERSIONS_NAME,
    IndexManifest,
    Operation,
    ShardEntry,
)
from raytower.index.shard import Shard, check_size, open_array
from raytower.index.table import DocumentTable
from raytower.storage import Lease, Location, output_folder, writer_lease

_FILE = re.compile(r"([0-9]{6,})\.json")
# What an index of format 2 has.
CURRENT_NAME = "CURRENT"
_LEASE_NAME = "writer"
_LEASE_SECONDS = 30.0
# FAISS writes four letters for the type of an index, its dimension and how many vectors it holds.
_HEAD = struct.Struct("<4xiq")


def index_folder(output: str) -> Location:
    """Where an index is built: a new or empty folder, or one that holds an index, or the beginning of one.

    Raises:
        InputError: as `output_folder`.
    """
    return output_folder(output, TABLE_NAME, VERSIONS_NAME, CURRENT_NAME)


def version_names(index: Location) -> list[str]:
    """Names of the versions of an index, oldest first."""
    found = [_FILE.fullmatch(place.name) for place in (index / VERSIONS_NAME).children()]
    return sorted((match.group(1) for match in found if match), key=int)


def published_version(index: Location) -> str | None:
    """The newest version, which readers open; None where there is none."""
    names = version_names(index)
    return names[-1] if names else None


def open_manifest(uri: str | Location, version: str | None = None) -> IndexManifest:
    """The document of a version, or of the newest.

    Raises:
        InputError: there is no index, or no such version. FormatError: another format, or damage.
    """
    index = Location.of(uri)
    names = version_names(index)
    if not names:
        if (index / CURRENT_NAME).is_file():
            raise InputError(
                f"{index} is an index of format 2; turn it into format 3: `raytower index convert --index {index}`"
            )
        raise InputError(f"{index} holds no index; build one: `raytower index build`")
    if version is not None and version not in names:
        raise InputError(f"{index} has no version {version!r}; it has: {', '.join(names)}")
    return IndexManifest.read(version_place(index, version or names[-1]))


def version_place(index: Location, version: str) -> Location:
    return index / VERSIONS_NAME / f"{version}.json"


def pin_name(manifest: IndexManifest) -> str:
    """What keeps a version's table version; two writers of one version never move each other's."""
    return f"{manifest.version}-{manifest.table_version}"


def next_version(name: str | None) -> str:
    return f"{int(name or 0) + 1:06d}"


def following(before: IndexManifest, operation: Operation, identity: str, **changes: Any) -> IndexManifest:
    """The document of the version after `before`, not yet published: the same but for some fields."""
    names = {"version": next_version(before.version), "parent": before.version}
    return before.model_copy(update={**names, "operation": operation, "identity": identity, **changes})


def refuse_damaged(index: Location, manifest: IndexManifest, table: DocumentTable) -> None:
    """Raises FormatError where a file of a published version is not there as it was when the version was made.

    A shard is never written again and was opened before it was published. So none is read anew, which would take a
    graph of 400,000 rows as long as all else that a deletion does: its files need only be there, of their sizes, and
    begin as they must. One where they do not is opened, which says what is wrong.
    """
    sizes = {info.path: info.size for info in (index / SHARDS_NAME).infos(recursive=True)}
    for entry in manifest.shards:
        place = index / SHARDS_NAME / entry.digest
        # Not asked of a cache, which may hold a file that is gone.
        for name, file in entry.files.items():
            check_size(place / name, sizes.get((place / name).path), file)
        if place.is_local and not _begins_as_it_must(place, entry, manifest.dim):
            Shard.open(index, entry, manifest.dim, table.row_map)
    if manifest.placement is not None:
        place = index / PLACEMENTS_NAME / f"{manifest.placement.digest}.npz"
        check_size(place, place.info().size, manifest.placement.file)
    for file in manifest.lexical.counts if manifest.lexical else ():
        place = index / LEXICAL_NAME / f"{file.sha256}.npy"
        check_size(place, place.info().size, file)


def _begins_as_it_must(place: Location, entry: ShardEntry, dim: int) -> bool:
    arrays = [(place / name).local_path for name in entry.files if name != VECTORS_NAME]
    try:
        with open((place / VECTORS_NAME).local_path, "rb") as stream:
            head = _HEAD.unpack(stream.read(_HEAD.size))
        lengths = {open_array(path).shape[:1] for path in arrays}
    except (struct.error, ValueError, OSError):
        return False
    return head == (dim, entry.rows) and lengths == {(entry.rows,)}


def publish(index: Location, manifest: IndexManifest, table: DocumentTable | None = None) -> None:
    """Make a version, which new readers open from then on. What it names must be there: open it first.

    Its version of the table (`table`, where it is open already) is pinned before, so that no cleaning takes it away.

    Raises:
        RaytowerError: someone else made a version of this name; nothing was changed.
    """
    (table or DocumentTable.open(index, manifest.table_version)).pin(pin_name(manifest))
    if not version_place(index, manifest.version).put_if_absent(manifest.to_json()):
        raise RaytowerError(
            f"version {manifest.version} of {index} was made by another writer meanwhile; nothing was changed: run the "
            "command again, which starts from what is published"
        )


@dataclass
class Writer:
    """The index, held by one writer: what is published, and the table as that version has it."""

    index: Location
    manifest: IndexManifest
    table: DocumentTable
    lease: Lease


@contextmanager
def writing(index: Location, what: str, wait_seconds: float = 600.0) -> Iterator[Lease]:
    """Have the index for oneself; whoever publishes checks the lease right before. Raises RaytowerError, naming
    the other writer, where that takes too long.
    """
    owner = f"{what} (process {os.getpid()} on {socket.gethostname()})"
    with writer_lease(
        index / _LEASE_NAME, owner=owner, seconds=_LEASE_SECONDS, wait_seconds=wait_seconds
    ) as lease:
        yield lease


@contextmanager
def changing(index: Location, what: str, wait_seconds: float = 600.0) -> Iterator[Writer]:
    """Hold the index for a change of what is published; the table is put back to that first.

    Raises:
        InputError, FormatError: there is no index, or it is damaged. RaytowerError: another writer holds it.
    """
    open_manifest(index)  # said before waiting
    with writing(index, what, wait_seconds) as lease:
        manifest = open_manifest(index)
        yield Writer(index, manifest, DocumentTable.open(index, manifest.table_version).restored(), lease)
