"""The manifest of an index version (design 3.4), and the names inside an index."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from raytower.errors import FormatError, InputError
from raytower.storage import Location

FORMAT_VERSION = 1
CURRENT_NAME = "CURRENT"
MANIFEST_NAME = "manifest.json"
VECTORS_NAME = "vectors.faiss"
DOCUMENTS_NAME = "documents.arrow"


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """One shard: its directory under the version, its rows, sha256 of its two files."""

    name: str
    rows: int
    vectors_sha256: str
    documents_sha256: str
    vectors_bytes: int
    documents_bytes: int


@dataclass(frozen=True, kw_only=True)
class IndexManifest:
    """What a version holds. `search_parameters` are the smallest measured ones that reach the recall target."""

    version: str
    parent: str | None
    fingerprint: str
    encoder: str
    metric: Literal["cosine", "inner_product"]
    dim: int
    kind: str
    parameters: dict[str, int]
    rows: int
    shards: tuple[ShardEntry, ...]
    prefix: str
    query_prefix: str
    max_length: int
    recall: float
    recall_k: int
    recall_target: float
    recall_target_reached: bool
    recall_curve: tuple[dict[str, Any], ...]
    search_parameters: dict[str, int]

    def write(self, folder: Location) -> None:
        (folder / MANIFEST_NAME).write_json(
            {"format_version": FORMAT_VERSION, "kind_of_file": "index", **asdict(self)}
        )

    @staticmethod
    def read(folder: Location) -> IndexManifest:
        """Raises FormatError: no manifest (unfinished version), a newer format, or counts that do not add up."""
        place = folder / MANIFEST_NAME
        if not place.is_file():
            raise FormatError(
                f"{folder} has no {MANIFEST_NAME}: that version was never finished; build it again"
            )
        values = place.read_json()
        version = values.pop("format_version", None) if isinstance(values, dict) else None
        if version != FORMAT_VERSION or values.pop("kind_of_file", None) != "index":
            raise FormatError(
                f"{place} has format version {version!r}; this raytower reads version {FORMAT_VERSION}"
            )
        try:
            values["shards"] = tuple(ShardEntry(**entry) for entry in values["shards"])
            values["recall_curve"] = tuple(values["recall_curve"])
            manifest = IndexManifest(**values)
        except (KeyError, TypeError) as error:
            raise FormatError(f"{place} is not an index manifest: {error}; build the index again") from error
        total = sum(entry.rows for entry in manifest.shards)
        if total != manifest.rows:
            raise FormatError(f"{place} says {manifest.rows} rows but its shards add up to {total}")
        return manifest


def version_folder(index: Location, version: str) -> Location:
    return index / "versions" / version


def current_version(index: Location) -> str:
    """The published version's name. Raises InputError where nothing is published there."""
    place = index / CURRENT_NAME
    if not place.is_file():
        raise InputError(
            f"{index} holds no published index (no {CURRENT_NAME}); build one with `raytower index build`"
        )
    return place.read_bytes().decode("utf-8").strip()


def publish(index: Location, version: str) -> None:
    """Make `version` the one that new readers open; the swap is atomic."""
    (index / CURRENT_NAME).write_bytes(f"{version}\n".encode())


def finished_versions(index: Location) -> list[str]:
    """Names of versions with a manifest, oldest first."""
    return [folder.name for folder in (index / "versions").children() if (folder / MANIFEST_NAME).is_file()]
