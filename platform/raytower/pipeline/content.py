"""The content of what steps read and write, as hashes.

A model is hashed whole. Embeddings, indexes and reports are known by the file that their job writes last, which holds
the checksums of the others; rounds by the model and the index that they name in the end.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
from pathlib import PurePosixPath
from typing import Any, Literal

from raytower.data.config import InputConfig
from raytower.data.pieces import files_read
from raytower.data.records import RecordKind
from raytower.data.sources import split_glob
from raytower.encoding.job import JOB_NAME
from raytower.encoding.manifest import MANIFEST_NAME, EmbeddingsManifest
from raytower.errors import InputError
from raytower.evaluation.reports import (
    COMPARISON_NAME,
    COMPARISON_PAGE_NAME,
    PAGE_NAME,
    PER_QUERY_NAME,
    REPORT_NAME,
    RUN_NAME,
)
from raytower.index.build import find_damage
from raytower.index.versions import open_manifest, published_version
from raytower.models.content import hash_model
from raytower.models.directory import INFO_NAME, read_info, resolve_model
from raytower.storage import Location, known_sha256

Kind = Literal["rows", "file", "model", "export", "embeddings", "index", "report", "rounds"]
# What `adapt` and `refresh` write last: they stand on higher floors than this.
_SUMMARIES = ("adapt.json", "refresh.json")
# The graphs of a model, in raytower.json and as a folder; the module that names them imports torch.
_GRAPHS = "onnx"


def content_of(kind: Kind, name: str, rows: InputConfig | None = None, records: RecordKind = "pairs") -> str:
    """Hash of an input as it lies there.

    Args:
        kind: what it is.
        name: where it is: a path, a glob or a URI, of a model also a hub id.
        rows: how rows are read, where that decides which files are.
        records: what rows are read as.

    Raises:
        InputError: there is no such input, or a damaged one.
    """
    if kind == "rows":
        places = files_read(rows or InputConfig(path=name), records)
        return _hash([[str(place), known_sha256(place)] for place in places])
    if kind == "model":
        return _hash([hash_model(name), read_info(resolve_model(name)).get("fusion")])
    if kind == "file":
        return known_sha256(Location.of(name))
    if kind == "embeddings":
        return (Location.of(name) / MANIFEST_NAME).sha256()
    if kind == "report":  # what a comparison reads: an evaluation, or a run file
        place = Location.of(name)
        files = [place / RUN_NAME, place / PER_QUERY_NAME] if place.is_dir() else [place]
        return _hash([known_sha256(file) for file in files if file.is_file()])
    return open_manifest(name).sha256()


def is_inside(name: str, folder: str) -> bool:
    """Whether `name` is `folder` or lies below it."""
    return _parts_below(Location.of(name), Location.of(folder)) is not None


def may_hold(name: str, output: str) -> bool:
    """Whether an input may hold an output, or a part of it: it is that, lies in it, or is a folder or a glob above."""
    base, pattern = split_glob(name)
    below = _parts_below(Location.of(output), base)
    if pattern is None or below is None:
        return below is not None or is_inside(name, output)
    names_it = fnmatch.fnmatchcase("/".join(below), "/".join(pattern))
    return names_it or "**" in pattern or len(pattern) > len(below)


def _parts_below(place: Location, above: Location) -> tuple[str, ...] | None:
    """By their real names: one place may be named by a link, or with `..`."""
    path, base = (
        PurePosixPath(os.path.realpath(each.path) if each.is_local else each.path) for each in (place, above)
    )
    is_below = place.filesystem == above.filesystem and path.is_relative_to(base)
    return path.relative_to(base).parts if is_below else None


def content_of_output(kind: Kind, output: str) -> str | None:
    """Hash of a finished output; None where it is not there, or lacks what it needs.

    An index is known by its first build, since changes to it are versions of its own.
    """
    place = Location.of(output)
    if kind == "rows":
        return known_sha256(place) if place.is_file() else None
    try:
        if kind == "model":
            return hash_model(output) if (place / INFO_NAME).is_file() else None
        if kind == "export":
            return _content_of_export(place)
        if kind == "rounds":
            return _content_of_rounds(place)
        if kind == "index":
            if published_version(place) is None or find_damage(place, newest := open_manifest(place)):
                return None
            return newest.built[0]
        if kind == "embeddings":
            sizes = {info.base_name: info.size for info in place.infos()}
            files = EmbeddingsManifest.read(place).files
            whole = all(sizes.get(file.name) == file.bytes for file in files)
            return (place / MANIFEST_NAME).sha256() if whole else None
        is_comparison = (place / COMPARISON_NAME).is_file() and not (place / REPORT_NAME).is_file()
        names = (
            (COMPARISON_NAME, COMPARISON_PAGE_NAME) if is_comparison else (RUN_NAME, REPORT_NAME, PAGE_NAME)
        )
        return _hash([(place / name).sha256() for name in names])
    except InputError:  # a part of it is gone
        return None


def _content_of_export(place: Location) -> str | None:
    """Hash of a model with its graph; None where either is not whole."""
    graphs = _info(place).get(_GRAPHS)
    if not graphs:
        return None
    sizes = {info.base_name: info.size for info in (place / _GRAPHS).infos()}
    files = {name for graph in graphs.values() for name in graph["files"]}
    return _hash([hash_model(str(place)), graphs]) if all(sizes.get(name) for name in files) else None


def _content_of_rounds(place: Location) -> str | None:
    """Hash of what the rounds of `adapt` or `refresh` came to: the encoder that they name, and its index."""
    summary = next((place / name for name in _SUMMARIES if (place / name).is_file()), None)
    if summary is None:
        return None
    found = summary.read_json()
    index = open_manifest(found["index"]).built[0]
    return _hash([found["encoder"], hash_model(found["encoder"]), found["index"], index])


def mark_of(kind: Kind, output: str) -> str | None:
    """What a job has written down in its output of itself, by which it is known also where parts of it are gone."""
    place = Location.of(output)
    if kind == "model":
        run = _info(place).get("run")
        return None if run is None else _hash(run)
    if kind == "export":
        graphs = _info(place).get(_GRAPHS)
        return None if graphs is None else _hash(graphs)
    if kind == "embeddings":
        return (place / JOB_NAME).sha256() if (place / JOB_NAME).is_file() else None
    if kind == "index":
        return open_manifest(place).built[0] if published_version(place) else None
    return content_of_output(kind, output)


def _info(model: Location) -> dict[str, Any]:
    found: dict[str, Any] = (model / INFO_NAME).read_json() if (model / INFO_NAME).is_file() else {}
    return found


def is_empty(output: str) -> bool:
    """Whether nothing lies there. Hidden names count for nothing, as where jobs look at their outputs."""
    place = Location.of(output)
    if place.is_file():
        return place.size_bytes() == 0
    return not any(not child.name.startswith(".") for child in place.children())


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
