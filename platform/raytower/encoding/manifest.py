"""The manifest of an embeddings folder (docs/design.md, 3.3): written last, read by every step that follows."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from raytower.errors import FormatError
from raytower.storage import Location

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class EmbeddingsFile:
    """One Parquet file of the folder."""

    name: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class EmbeddingsManifest:
    """What an embeddings folder holds and what made it.

    `similarity` is the model's own (cosine or dot) and decides the metric of an index over these vectors. Where it
    is cosine and `normalised` is false, vectors are stored as the model gives them and an index normalises them.
    `derived_ids` says that the corpus has none, so that an id is a place, such as `new:1`, and names another document
    once the files change.
    """

    fingerprint: str
    encoder: str
    dim: int
    dtype: Literal["float32", "float16"]
    normalised: bool
    similarity: Literal["cosine", "dot"] = "cosine"
    prefix: str
    query_prefix: str = ""
    max_length: int
    engine: str = "torch"
    compute_dtype: str = "float32"
    rows: int
    tokens: int = 0
    derived_ids: bool = False
    files: tuple[EmbeddingsFile, ...] = field(default=())

    def write(self, folder: Location) -> None:
        """Put manifest.json into `folder` atomically."""
        (folder / MANIFEST_NAME).write_json(
            {"format_version": FORMAT_VERSION, "kind": "embeddings", **asdict(self)}
        )

    @staticmethod
    def read(folder: Location) -> EmbeddingsManifest:
        """Read `folder`'s manifest.

        Raises:
            FormatError: there is none (the folder is unfinished or no embeddings folder), it is from a newer
                version, or its row count is not the sum of its files'.
        """
        place = folder / MANIFEST_NAME
        if not place.is_file():
            raise FormatError(
                f"{folder} has no {MANIFEST_NAME}: it is no finished embeddings folder; run `raytower encode`"
            )
        values: dict[str, Any] = place.read_json()
        version = values.pop("format_version", None)
        if version != FORMAT_VERSION or values.pop("kind", None) != "embeddings":
            raise FormatError(
                f"{place} has format version {version!r}; this raytower reads embeddings of version {FORMAT_VERSION}"
            )
        try:
            files = tuple(EmbeddingsFile(**item) for item in values.pop("files"))
            manifest = EmbeddingsManifest(**values, files=files)
        except (KeyError, TypeError) as error:
            raise FormatError(
                f"{place} is not an embeddings manifest: {error}; encode the corpus again"
            ) from error
        total = sum(item.rows for item in files)
        if total != manifest.rows:
            raise FormatError(
                f"{place} says {manifest.rows} rows but its files add up to {total}; encode again"
            )
        return manifest
