"""`raytower index gc`: old versions, and shards that no version needs any more, are removed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import Field

from raytower.config import Config
from raytower.index.manifest import DELETED_NAME, MANIFEST_NAME, PLACEMENT_NAME, IndexManifest
from raytower.index.search import deleted_place
from raytower.index.versions import (
    BUILD_NAME,
    collected_versions,
    current_version,
    finished_versions,
    unfinished_versions,
    version_folder,
)
from raytower.runtime import log
from raytower.storage import Location


class IndexGcConfig(Config):
    """`raytower index gc`. The newest `keep` finished versions stay, and the published one with all that it shares.

    `unfinished` removes as well what builds left that were killed; started again, they would go on from there.
    """

    index: str
    keep: int = Field(default=2, ge=1)
    unfinished: bool = False


@dataclass(frozen=True)
class Garbage:
    """What may go: manifests first, so that no version is seen with a part missing."""

    versions: list[str]
    manifests: list[Location]
    places: list[Location]
    bytes: int


def collect_garbage(config: IndexGcConfig) -> dict[str, Any]:
    """Remove what the kept versions do not need.

    Readers in other processes that have an old version open keep answering where the system lets open files live on
    (local disks, and any index that was fetched to a cache); a version that is not kept cannot be opened again.

    Returns:
        versions_removed, versions_kept, places_removed, bytes_freed.

    Raises:
        InputError: there is no index. FormatError: a kept version's manifest is damaged; nothing is removed then.
    """
    garbage, kept = find_garbage(config)
    for place in [*garbage.manifests, *garbage.places]:
        place.delete()
    log(
        f"removed {len(garbage.versions)} versions and {len(garbage.places)} folders and files of {config.index}"
    )
    return {**_figures(garbage, kept), "index": config.index}


def plan_gc(config: IndexGcConfig) -> dict[str, Any]:
    """What would be removed, by name."""
    garbage, kept = find_garbage(config)
    return {**_figures(garbage, kept), "places": [str(place) for place in garbage.places]}


def find_garbage(config: IndexGcConfig) -> tuple[Garbage, list[str]]:
    """What may go, and the versions that stay."""
    index = Location.of(config.index)
    current = current_version(index)
    finished = finished_versions(index)
    kept = sorted({*finished[-config.keep :], current})
    manifests = [IndexManifest.read(version_folder(index, name)) for name in kept]
    needed = {place.path for manifest in manifests for place in _places_of(index, manifest)}
    dropped = [name for name in finished if name not in kept]
    if config.unfinished:
        dropped += unfinished_versions(index)
    gone = [*dropped, *collected_versions(index)]
    parts = {name: _parts(version_folder(index, name)) for name in [*gone, *kept]}
    unneeded = [place for places in parts.values() for place in places if place.path not in needed]
    emptied = [name for name in gone if not any(place.path in needed for place in parts[name])]
    # Claims in object stores are never removed: a builder that comes late must see that the version was taken.
    folders = [version_folder(index, name) for name in emptied] if index.is_local else []
    garbage = Garbage(
        versions=dropped,
        # Without build.json nobody takes the folder up again.
        manifests=[
            version_folder(index, name) / file for name in dropped for file in (MANIFEST_NAME, BUILD_NAME)
        ],
        places=[*unneeded, *folders],
        bytes=sum(_size(place) for place in unneeded),
    )
    return garbage, kept


def _places_of(index: Location, manifest: IndexManifest) -> list[Location]:
    """Folders and files that a version reads."""
    versions = version_folder(index, manifest.version).parent
    places = [versions / entry.version / entry.name for entry in manifest.shards]
    places += [deleted_place(versions, entry) for entry in manifest.shards if entry.deleted]
    if manifest.placement is not None:
        places.append(versions / manifest.placement.version / PLACEMENT_NAME)
    return places


def _parts(folder: Location) -> list[Location]:
    """Shard folders, tombstones and the placement file of a version."""
    parts = []
    for child in folder.children():
        if child.name == DELETED_NAME:
            parts += child.children()
        elif child.name.startswith("shard-") or child.name == PLACEMENT_NAME:
            parts.append(child)
    return parts


def _size(place: Location) -> int:
    if place.is_file():
        return place.size_bytes()
    return sum(child.size_bytes() for child in place.children(recursive=True) if child.is_file())


def _figures(garbage: Garbage, kept: list[str]) -> dict[str, Any]:
    return {
        "versions_removed": garbage.versions,
        "versions_kept": kept,
        "places_removed": len(garbage.places),
        "bytes_freed": garbage.bytes,
    }
