"""`raytower index gc`: removing old versions, and what no kept version needs."""

from __future__ import annotations

import time
from typing import Any

from raytower.index.build import WORK_NAME, work_pin
from raytower.index.change_config import IndexGcConfig
from raytower.index.manifest import (
    LEXICAL_NAME,
    PLACEMENTS_NAME,
    QUERIES_NAME,
    SHARDS_NAME,
    SYNC_NAME,
    IndexManifest,
)
from raytower.index.shard_build import SHARD_NAME
from raytower.index.table import DocumentTable
from raytower.index.versions import open_manifest, pin_name, version_names, version_place, writing
from raytower.storage import Location

# What a build that runs now has written is in no version yet.
_FRESH_SECONDS = 24 * 3600


def collect_garbage(config: IndexGcConfig) -> dict[str, Any]:
    """Remove versions beyond `keep`, and shards, placements and table data that no kept version needs.

    Returns:
        kept and removed version names, removed shards, freed_bytes.

    Raises:
        InputError: there is no index. FormatError: a kept version is damaged. RaytowerError: a writer holds the index.
    """
    index = Location.of(config.index)
    open_manifest(index)
    with writing(index, "index gc"):
        shown, kept, garbage = _plan(config)
        for version in shown["removed"]:
            version_place(index, version).delete()
        table = DocumentTable.open(index)
        for place in garbage:
            place.delete()
        builds = {work_pin(place.name) for place in (index / WORK_NAME).children()}
        table.keep_pins({pin_name(manifest) for manifest in kept} | builds)
        shown["freed_bytes"] += table.clean()
    return shown


def plan_gc(config: IndexGcConfig) -> dict[str, Any]:
    """What would go. Raises as `collect_garbage`."""
    return _plan(config)[0]


def _plan(config: IndexGcConfig) -> tuple[dict[str, Any], list[IndexManifest], list[Location]]:
    """What is to be said; the versions that stay; and what goes besides the others."""
    index = Location.of(config.index)
    open_manifest(index)
    names = version_names(index)
    kept = [open_manifest(index, name) for name in names[-config.keep :]]
    garbage = _garbage(index, kept, config.unfinished)
    shown = {
        "index": config.index,
        "kept": [manifest.version for manifest in kept],
        "removed": names[: -config.keep],
        "removed_shards": [place.name for place in garbage if place.parent.name == SHARDS_NAME],
        "freed_bytes": sum(_bytes(place) for place in garbage),
    }
    return shown, kept, garbage


def _garbage(index: Location, kept: list[IndexManifest], unfinished: bool) -> list[Location]:
    needed = {entry.digest for manifest in kept for entry in manifest.shards}
    needed |= {manifest.placement.digest for manifest in kept if manifest.placement}
    needed |= {manifest.queries.sha256 for manifest in kept if manifest.queries}
    needed |= {file.sha256 for manifest in kept if manifest.lexical for file in manifest.lexical.counts}
    folders = (SHARDS_NAME, PLACEMENTS_NAME, QUERIES_NAME, LEXICAL_NAME, WORK_NAME)
    places = [place for name in folders for place in (index / name).children()]
    # Whoever removes it is the one writer, so that a synchronisation which was killed has left it.
    left_behind = [index / SYNC_NAME] if (index / SYNC_NAME).exists() else []
    return left_behind + [
        place
        for place in places
        if place.name.partition(".")[0] not in needed and (unfinished or _age(place) > _FRESH_SECONDS)
    ]


def _age(place: Location) -> float:
    """Seconds since what lies there was finished."""
    marked = place / SHARD_NAME if (place / SHARD_NAME).is_file() else place
    written = marked.info().mtime
    return time.time() - written.timestamp() if written is not None else 0.0


def _bytes(place: Location) -> int:
    infos = place.infos(recursive=True) if place.is_dir() else [place.info()]
    return sum(info.size or 0 for info in infos)
