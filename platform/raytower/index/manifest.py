"""The manifest of an index version (design 3.4), and the names inside an index."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from raytower.errors import FormatError
from raytower.index.config import BuiltKind, ExactDtype
from raytower.storage import Location

FORMAT = "raytower.index"
FORMAT_VERSION = 2
MANIFEST_NAME = "manifest.json"
VECTORS_NAME = "vectors.faiss"
DOCUMENTS_NAME = "documents.arrow"
EXACT_NAME = "exact.npy"
DELETED_NAME = "deleted"
PLACEMENT_NAME = "placement.npz"

Operation = Literal["build", "add", "delete", "compact"]


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """What a file must be."""

    sha256: str
    bytes: int

    @classmethod
    def of(cls, place: Location) -> FileEntry:
        """Reads the file once."""
        return cls(sha256=place.sha256(), bytes=place.size_bytes())


@dataclass(frozen=True, kw_only=True)
class DeletedRows:
    """Tombstones of one shard: a file with the sorted numbers of its deleted rows, in the folder of `version`."""

    version: str
    rows: int
    file: FileEntry


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """One shard: the version whose folder holds it, its directory there, its rows with deleted ones, its files by name.

    A later version lists shards that it shares with an earlier one under that one's name. A shard that was added may
    be of another kind than the version's own.
    """

    version: str
    name: str
    rows: int
    kind: BuiltKind
    files: dict[str, FileEntry]
    deleted: DeletedRows | None = None

    @property
    def live_rows(self) -> int:
        """Rows that can be hits."""
        return self.rows - (self.deleted.rows if self.deleted else 0)

    @property
    def bytes(self) -> int:
        """Of all files of the shard, tombstones included."""
        return sum(file.bytes for file in self.files.values()) + (
            self.deleted.file.bytes if self.deleted else 0
        )

    @staticmethod
    def of_json(values: dict[str, Any]) -> ShardEntry:
        """Raises KeyError and TypeError where keys are missing or unknown."""
        files = {name: FileEntry(**file) for name, file in values.pop("files").items()}
        deleted = values.pop("deleted")
        if deleted is not None:
            deleted = DeletedRows(**{**deleted, "file": FileEntry(**deleted["file"])})
        return ShardEntry(**values, files=files, deleted=deleted)


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What made the vectors of an index. Vectors of another origin cannot be compared with them."""

    fingerprint: str
    encoder: str
    metric: Literal["cosine", "inner_product"]
    dim: int
    prefix: str
    query_prefix: str
    max_length: int


@dataclass(frozen=True, kw_only=True)
class PlacementEntry:
    """How documents were placed on the first `shards` shards: by the centroids in a file of `version`'s folder."""

    version: str
    shards: int
    file: FileEntry


@dataclass(frozen=True, kw_only=True)
class IndexManifest(Origin):
    """What a version holds. `search_parameters` are the smallest measured ones that reach the recall target.

    `rows` counts what can be found: deleted rows are not in it. `recall` is recall@`recall_k` of `recall_queries`
    sampled rows against exact search, at those parameters; `recall_curve` holds every point measured, its parameters
    and `recall`. `recall_version` is the version they were measured on: adding and deleting passes them on.
    `spec_sha256` identifies what the shards were built from. `parent` is the version that this one was derived from,
    null for a build.
    """

    version: str
    parent: str | None
    operation: Operation
    kind: BuiltKind
    kind_reason: str
    parameters: dict[str, int]
    exact_dtype: ExactDtype | None = None
    placement: PlacementEntry | None = None
    rows: int
    shards: tuple[ShardEntry, ...]
    spec_sha256: str
    recall_k: int
    recall_target: float
    recall: float = 0.0
    recall_queries: int = 0
    recall_target_reached: bool = False
    recall_curve: tuple[dict[str, Any], ...] = ()
    placement_curve: tuple[dict[str, Any], ...] = ()
    recall_version: str = ""
    search_parameters: dict[str, int] = field(default_factory=dict)

    @property
    def origin(self) -> Origin:
        return Origin(**{name: getattr(self, name) for name in Origin.__dataclass_fields__})

    @property
    def deleted_rows(self) -> int:
        return sum(entry.deleted.rows for entry in self.shards if entry.deleted)

    def write(self, folder: Location) -> None:
        (folder / MANIFEST_NAME).write_json(
            {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(self)}
        )

    @staticmethod
    def read(folder: Location) -> IndexManifest:
        """Raises FormatError: no manifest (unfinished version), another format, or counts that do not add up."""
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
            manifest = _parse(values)
        except (AttributeError, KeyError, TypeError) as error:
            raise FormatError(f"{place} is not an index manifest: {error}; build the index again") from error
        total = sum(entry.live_rows for entry in manifest.shards)
        if total != manifest.rows:
            raise FormatError(f"{place} says {manifest.rows} rows but its shards add up to {total}")
        return manifest


def _parse(values: dict[str, Any]) -> IndexManifest:
    values["shards"] = tuple(ShardEntry.of_json(entry) for entry in values["shards"])
    for name in ("recall_curve", "placement_curve"):
        values[name] = tuple(values[name])
    placement = values.pop("placement")
    if placement is not None:
        placement = PlacementEntry(**{**placement, "file": FileEntry(**placement["file"])})
    return IndexManifest(**values, placement=placement)
