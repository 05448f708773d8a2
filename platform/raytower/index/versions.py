"""Versions of an index: their names, which one is published, and how a builder gets one of its own."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

from raytower.errors import FormatError, InputError, RaytowerError
from raytower.index.manifest import MANIFEST_NAME, IndexManifest
from raytower.storage import Location
from raytower.storage_errors import explaining

CURRENT_NAME = "CURRENT"
BUILD_NAME = "build.json"
_VERSIONS_NAME = "versions"
_LOCK_NAME = ".lock"
_PUBLISH_LOCK_NAME = ".publish.lock"
_CLAIMS_NAME = "claims"
_VERSION_PATTERN = re.compile(r"v(\d{6,})")


def version_folder(index: Location, version: str) -> Location:
    """Raises InputError for a name that no version can have (a path, for one)."""
    if not _VERSION_PATTERN.fullmatch(version):
        raise InputError(f"{version!r} is no version name; versions are named like v000001")
    return index / _VERSIONS_NAME / version


def published_version(index: Location) -> str | None:
    """The published version's name, or None where nothing is published."""
    place = index / CURRENT_NAME
    # What is no UTF-8 is no version name either, and version_folder says so.
    return place.read_bytes().decode("utf-8", errors="replace").strip() if place.is_file() else None


def current_version(index: Location) -> str:
    """The published version's name. Raises InputError where nothing is published there."""
    version = published_version(index)
    if version is None:
        raise InputError(
            f"{index} holds no published index (no {CURRENT_NAME}); build one: `raytower index build`"
        )
    return version


def publish(index: Location, version: str, *, instead_of: str | None = None) -> None:
    """Make `version` the one that new readers open; the swap is atomic.

    `instead_of` names the version that `version` was derived from, which must still be the published one: changes that
    someone else published meanwhile are not in `version` and would be lost. Locally no two publishers look at once;
    object stores have no lock, and there a publication within the same moment can go unseen.

    Raises:
        RaytowerError: another version is published by now.
    """
    with _publishing(index):
        found = published_version(index)
        if instead_of is not None and found != instead_of:
            raise RaytowerError(
                f"version {version} was made from {instead_of}, but {index} has {found} published by now; nothing was "
                "changed: run the command again, which starts from what is published"
            )
        (index / CURRENT_NAME).write_bytes(f"{version}\n".encode())


@contextmanager
def _publishing(index: Location) -> Iterator[None]:
    if not index.is_local:
        yield
        return
    descriptor = _open_lock(index / _PUBLISH_LOCK_NAME)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def finished_versions(index: Location) -> list[str]:
    """Names of versions with a manifest, oldest first."""
    return [name for name in _version_names(index) if (version_folder(index, name) / MANIFEST_NAME).is_file()]


def unfinished_versions(index: Location) -> list[str]:
    """Names of versions without a manifest that no living builder holds, oldest first.

    On object stores a living builder cannot be told from a dead one, so there are none.
    """
    names = _version_names(index) if index.is_local else []
    return [name for name in names if _state(version_folder(index, name)) == "unfinished"]


def collected_versions(index: Location) -> list[str]:
    """Names of versions that were taken away while others still needed some of their shards, oldest first."""
    return [name for name in _version_names(index) if _state(version_folder(index, name)) == "collected"]


def _state(folder: Location) -> Literal["finished", "unfinished", "collected", "held"]:
    if (folder / MANIFEST_NAME).is_file():
        return "finished"
    if folder.is_local:
        lock = _lock(folder)
        if lock is None:
            return "held"
        os.close(lock)
    return "unfinished" if (folder / BUILD_NAME).is_file() else "collected"


def spec_sha256(spec: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()


def finished_build(index: Location, spec: Mapping[str, Any], recall: float, k: int) -> IndexManifest | None:
    """The newest finished version of this very build and recall target, or None."""
    wanted = (spec_sha256(spec), recall, k)
    for name in reversed(finished_versions(index)):
        try:
            manifest = IndexManifest.read(version_folder(index, name))
        except FormatError:
            continue
        if (manifest.spec_sha256, manifest.recall_target, manifest.recall_k) == wanted:
            return manifest
    return None


@contextmanager
def claim_version(index: Location, spec: Mapping[str, Any]) -> Iterator[str]:
    """A version that no other builder has: the unfinished one of a dead builder of the same build, or a new one.

    Locally a version is made by an exclusive mkdir and held by a file lock, which the system drops when its builder
    dies. Object stores have neither; there each builder takes a new version, and finished work of a dead one is not
    taken up.
    """
    if not index.is_local:
        name = _claim_remote(index)
        (version_folder(index, name) / BUILD_NAME).write_json(dict(spec))
        yield name
        return
    name, lock = _resume_local(index, spec) or _create_local(index, spec)
    folder = version_folder(index, name)
    try:
        yield name
    finally:
        if (folder / MANIFEST_NAME).is_file():
            (folder / _LOCK_NAME).delete()
        os.close(lock)


def _version_names(index: Location) -> list[str]:
    children = (index / _VERSIONS_NAME).children()
    return sorted((child.name for child in children if _VERSION_PATTERN.fullmatch(child.name)), key=_number)


def _number(name: str) -> int:
    return int(name[1:])


def _next_names(index: Location) -> Iterator[str]:
    number = max((_number(name) for name in _version_names(index)), default=0)
    while True:
        number += 1
        yield f"v{number:06d}"


def _resume_local(index: Location, spec: Mapping[str, Any]) -> tuple[str, int] | None:
    for name in _version_names(index):
        folder = version_folder(index, name)
        build = folder / BUILD_NAME
        if (folder / MANIFEST_NAME).is_file() or not build.is_file() or build.read_json() != spec:
            continue
        lock = _lock(folder)
        if lock is None:
            continue
        # Its builder may have finished between the look above and the lock.
        if not (folder / MANIFEST_NAME).is_file():
            _remove_leftovers(folder)
            return name, lock
        os.close(lock)
    return None


def _create_local(index: Location, spec: Mapping[str, Any]) -> tuple[str, int]:
    (index / _VERSIONS_NAME).make_dir()
    for name in _next_names(index):
        folder = version_folder(index, name)
        with explaining(folder):
            try:
                folder.local_path.mkdir()
            except FileExistsError:
                continue
        # Without build.json nobody else takes this folder up, so the lock is ours.
        lock = _lock(folder)
        assert lock is not None
        (folder / BUILD_NAME).write_json(dict(spec))
        return name, lock
    raise AssertionError("version numbers do not end")


def _lock(folder: Location) -> int | None:
    descriptor = _open_lock(folder / _LOCK_NAME)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def _open_lock(place: Location) -> int:
    with explaining(place):
        return os.open(place.local_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)


def _remove_leftovers(folder: Location) -> None:
    # What a killed task was writing beside its target.
    for child in folder.children():
        if child.name.startswith(".") and child.name.endswith((".tmp", ".old")):
            child.delete()


def _claim_remote(index: Location) -> str:
    """Write a claim, then look: whoever sees another claim beside its own lets go, so two never both stay.

    Claims are never removed: a builder that comes late must still see that the version was taken.
    """
    for name in _next_names(index):
        claims = version_folder(index, name) / _CLAIMS_NAME
        own = claims / uuid.uuid4().hex
        claims.make_dir()
        own.write_bytes(b"")
        if [claim.name for claim in claims.children()] == [own.name]:
            return name
    raise AssertionError("version numbers do not end")
