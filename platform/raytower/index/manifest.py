"""The document of an index version (docs/design.md, 3.4), and the names inside an index.

index/table.lance/                     the documents: the truth
index/shards/<digest>/vectors.faiss    one FAISS index over some rows of the table; position i is row rows.npy[i]
                      rows.npy         rising row numbers
                      exact.npy        whole vectors by position, for kinds that search over codes
index/placement/<digest>.npz           centroids of a placement by cluster
index/lexical/<sha256>.npy             in how many documents each token occurs, and differences from that
index/versions/000004.json             this document, immutable
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from raytower.errors import FormatError
from raytower.index.config import BuiltKind, ExactDtype, Metric, TokensConfig
from raytower.index.search_config import HybridWay
from raytower.storage import Location

FORMAT = "raytower.index"
FORMAT_VERSION = 3
TABLE_NAME = "table.lance"
SHARDS_NAME = "shards"
PLACEMENTS_NAME = "placement"
LEXICAL_NAME = "lexical"
QUERIES_NAME = "queries"
SYNC_NAME = ".sync"
"""What `index sync` hands to its workers lies there, while it runs."""
VERSIONS_NAME = "versions"
VECTORS_NAME: Literal["vectors.faiss"] = "vectors.faiss"
ROWS_NAME: Literal["rows.npy"] = "rows.npy"
EXACT_NAME: Literal["exact.npy"] = "exact.npy"

Operation = Literal["build", "add", "delete", "set", "sync", "fold", "compact", "rollback", "convert", "tune"]
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
VersionName = Annotated[str, StringConstraints(pattern=r"^[0-9]{6,}$")]
ShardFile = Literal["vectors.faiss", "rows.npy", "exact.npy"]
Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class _Part(BaseModel):
    # What a document says becomes paths, sizes and parameters: a missing, unknown or wrong field never opens.
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class FileEntry(_Part):
    """What a file must be."""

    sha256: Digest
    bytes: Count

    @classmethod
    def of(cls, place: Location) -> FileEntry:
        """Reads the file once."""
        return cls(sha256=place.sha256(), bytes=place.size_bytes())


class ShardEntry(_Part):
    """One shard: its folder is named by the digest of what it was built from.

    `rows` counts what its files hold; rows that the table no longer holds are among them. A shard that was folded from
    additions may be of another kind than the version's own. `placed` shards were filled by cluster.
    """

    digest: Digest
    rows: Annotated[int, Field(ge=1)]
    kind: BuiltKind
    exact_dtype: ExactDtype | None
    placed: bool = False
    files: dict[ShardFile, FileEntry]

    @property
    def bytes(self) -> int:
        """Of all files of the shard."""
        return sum(file.bytes for file in self.files.values())


class PlacementEntry(_Part):
    """How documents were placed on the first `shards` shards: by centroids in a file named by what it holds."""

    digest: Digest
    shards: Annotated[int, Field(ge=1)]
    file: FileEntry


class HybridEntry(_Part):
    """How both sides' scores become one, as `tune-fusion` found it best on judged queries, and on how many of them."""

    fusion: HybridWay
    weight: Share
    queries: Count


class LexicalEntry(_Part):
    """The lexical side: how texts became tokens, and what BM25 counts over all documents of the version.

    `num_tokens` are those of all documents together. The files of `counts`, added up, say in how many documents each
    token occurs. `hybrid` is null where it was never tuned; it goes with the tokens that it was tuned with.
    """

    tokens: TokensConfig
    num_tokens: Count
    counts: Annotated[tuple[FileEntry, ...], Field(min_length=1)]
    hybrid: HybridEntry | None = None


class Origin(_Part):
    """What made the vectors of an index. Vectors of another origin cannot be compared with them."""

    fingerprint: str
    encoder: str
    metric: Metric
    dim: Annotated[int, Field(ge=1)]
    prefix: str
    query_prefix: str
    max_length: Annotated[int, Field(ge=1)]
    engine: str
    compute_dtype: str


class Measured(_Part):
    """Recall against exact search, as it was measured: `recall` is recall@`k` of `queries` queries.

    `rows` counts the documents there were then, `shards` are those that were searched, `curve` holds every point.
    """

    version: VersionName
    k: Annotated[int, Field(ge=1)]
    target: Share
    recall: Share
    reached: bool
    queries: Count
    rows: Count
    shards: tuple[Digest, ...]
    curve: tuple[dict[str, Any], ...] = ()
    placement_curve: tuple[dict[str, Any], ...] = ()


class IndexManifest(Origin):
    """What a version is: a version of the table, and shards derived from it.

    `rows` counts the documents. `next_row` is the number that the next document gets; none is given twice. `identity`
    names the change that made this version, `built` all builds up to here, `applied` the changes since the last
    of them. `measured` is the last measurement, of this version or of one before it; `changed_rows` came or went since.
    `queries` are vectors that recall is measured with, a file named by its checksum; null for sampled documents.
    `search_parameters` are those measured for as many hits as their key says. `lexical` is null without a lexical side.
    """

    version: VersionName
    parent: VersionName | None
    operation: Operation
    identity: Digest
    built: tuple[Digest, ...]
    applied: tuple[Digest, ...]
    table_version: Annotated[int, Field(ge=1)]
    next_row: Count
    rows: Count
    kind: BuiltKind
    kind_reason: str
    parameters: dict[str, Annotated[int, Field(ge=0)]]
    exact_dtype: ExactDtype | None
    vector_dtype: ExactDtype
    shards: tuple[ShardEntry, ...]
    placement: PlacementEntry | None
    indexed: tuple[str, ...]
    search_parameters: dict[
        Annotated[str, StringConstraints(pattern=r"^[1-9][0-9]*$")], dict[str, Annotated[int, Field(ge=1)]]
    ]
    recall_k: Annotated[int, Field(ge=1)]
    recall_target: Share
    queries: FileEntry | None
    measured: Measured | None
    changed_rows: Count
    # Versions from before there was a lexical side say nothing of one.
    lexical: LexicalEntry | None = None

    @property
    def origin(self) -> Origin:
        return Origin(**{name: getattr(self, name) for name in Origin.model_fields})

    @property
    def recall(self) -> float | None:
        """Recall@k where it was measured on this very version, else None."""
        return self.measured.recall if self.measured and self.measured.version == self.version else None

    @property
    def target_reached(self) -> bool | None:
        """Whether the recall of this very version reaches its target; None where it was not measured."""
        return None if self.recall is None else self.recall >= self.recall_target

    @property
    def scores_codes(self) -> bool:
        """Whether scores of a search are those of codes, and not of the vectors themselves."""
        return self.exact_dtype is None and self.kind in ("ivf_rabitq", "ivf_sq8", "ivf_pq")

    def to_json(self) -> bytes:
        content = {"format": FORMAT, "format_version": FORMAT_VERSION, **self.model_dump(mode="json")}
        return json.dumps(content, ensure_ascii=False, indent=1).encode() + b"\n"

    def sha256(self) -> str:
        """The digest of its JSON, in hex: two versions of one name differ by it."""
        return hashlib.sha256(self.to_json()).hexdigest()

    @staticmethod
    def read(place: Location) -> IndexManifest:
        """Raises FormatError: another format, a field that is missing, unknown or wrong, or another version's name."""
        values = place.read_json()
        if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
            raise FormatError(f"{place} is not the document of an index version; build the index again")
        version = values.pop("format_version", None)
        if version != FORMAT_VERSION:
            raise FormatError(
                f"{place} has format version {version!r}; this raytower reads version {FORMAT_VERSION}: use the "
                "raytower that wrote it, or build the index again"
            )
        try:
            manifest = IndexManifest.model_validate_json(json.dumps(values))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise FormatError(
                f"{place} is damaged: {where}: {first['msg']}; roll back, or build the index again"
            ) from error
        if f"{manifest.version}.json" != place.name:
            raise FormatError(
                f"{place} is the document of version {manifest.version!r}; the file was renamed"
            )
        return manifest
