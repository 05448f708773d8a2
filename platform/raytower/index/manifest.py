"""The manifest of an index version (design 3.4), and the names inside an index."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from raytower.errors import FormatError
from raytower.index.config import BuiltKind
from raytower.storage import Location

FORMAT = "raytower.index"
FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
VECTORS_NAME = "vectors.faiss"
DOCUMENTS_NAME = "documents.arrow"


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """One shard: the version whose folder holds it, its directory there, its rows, and its two files.

    A later version lists shards that it shares with an earlier one under that one's name.
    """

    version: str
    name: str
    rows: int
    vectors_sha256: str
    documents_sha256: str
    vectors_bytes: int
    documents_bytes: int


@dataclass(frozen=True, kw_only=True)
class IndexManifest:
    """What a version holds. `search_parameters` are the smallest measured ones that reach the recall target.

    `recall` is recall@`recall_k` of `recall_queries` sampled rows against exact search, at those parameters;
    `recall_curve` holds every point measured, `{"parameter", "value", "recall"}`. `spec_sha256` identifies what the
    shards were built from. `parent` is the version that this one was derived from, null for a build.
    """

    version: str
    parent: str | None
    fingerprint: str
    encoder: str
    metric: Literal["cosine", "inner_product"]
    dim: int
    kind: BuiltKind
    kind_reason: str
    parameters: dict[str, int]
    rows: int
    shards: tuple[ShardEntry, ...]
    prefix: str
    query_prefix: str
    max_length: int
    spec_sha256: str
    recall_k: int
    recall_target: float
    recall: float = 0.0
    recall_queries: int = 0
    recall_target_reached: bool = False
    recall_curve: tuple[dict[str, Any], ...] = ()
    search_parameters: dict[str, int]

    def write(self, folder: Location) -> None:
        (folder / MANIFEST_NAME).write_json(
            {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(self)}
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
        if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
            raise FormatError(f"{place} is not an index manifest; build the index again")
        version = values.pop("format_version", None)
        if version != FORMAT_VERSION:
            raise FormatError(
                f"{place} has format version {version!r}; this raytower reads version {FORMAT_VERSION}: use the "
                "raytower that wrote it, or build the index again"
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
