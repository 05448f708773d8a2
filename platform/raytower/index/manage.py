"""`raytower index list | verify | rollback`: looking after the versions of an index."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from raytower.config import Config
from raytower.errors import FormatError, InputError
from raytower.index.costs import BATCH_ROWS
from raytower.index.curve import write_curve
from raytower.index.manifest import IndexManifest
from raytower.index.reader import Index, open_manifest
from raytower.index.search import Shard
from raytower.index.vectors import hash_ids
from raytower.index.versions import (
    current_version,
    finished_versions,
    publish,
    published_version,
    version_folder,
)
from raytower.models.encoder import Encoder
from raytower.storage import Location


class IndexListConfig(Config):
    """`raytower index list`.

    `curve` names a PNG file for the recall measured on `version`; null for the published one.
    """

    index: str
    curve: str | None = None
    version: str | None = None

    def model_post_init(self, context: Any) -> None:
        if self.version is not None and self.curve is None:
            raise ValueError(
                f"version is {self.version!r}, which names the version whose curve is plotted; give curve a file "
                "name too, or leave version out"
            )


class IndexVerifyConfig(Config):
    """`raytower index verify`; `version` null verifies the published one.

    `encoder` null is the one that the index names, whose fingerprint is compared where it is on this machine.
    """

    index: str
    version: str | None = None
    encoder: str | None = None


class IndexRollbackConfig(Config):
    """`raytower index rollback`."""

    index: str
    to: str


def index_list(config: IndexListConfig) -> dict[str, Any]:
    """Every finished version with its kind, rows, shards and recall, and which one is published.

    Where `config.curve` is given, a measured curve is plotted there, and `curve` tells which version's it is.

    Raises:
        InputError: there is no index, no such version, or that version has no curve.
        MissingExtraError: a curve is asked and matplotlib is not installed.
    """
    index = Location.of(config.index)
    finished = finished_versions(index)
    current = published_version(index) if finished else current_version(index)
    versions = []
    for name in finished:
        manifest = IndexManifest.read(version_folder(index, name))
        versions.append(
            {
                "version": name,
                "current": name == current,
                "kind": manifest.kind,
                "rows": manifest.rows,
                "shards": len(manifest.shards),
                "recall": manifest.recall,
                "fingerprint": manifest.fingerprint,
                "operation": manifest.operation,
                "deleted": manifest.deleted_rows,
                "parent": manifest.parent,
            }
        )
    curve = {"curve": _plot(config)} if config.curve is not None else {}
    return {"index": config.index, "current": current, "versions": versions, **curve}


def _plot(config: IndexListConfig) -> dict[str, Any]:
    assert config.curve is not None
    manifest, _ = open_manifest(config.index, config.version)
    write_curve(manifest, config.curve)
    return {"file": config.curve, "version": manifest.version}


def index_verify(config: IndexVerifyConfig) -> dict[str, Any]:
    """Read everything again: checksums, counts, ids that are unique across shards, vectors, and the fingerprint.

    Raises:
        InputError, FormatError: what is wrong, naming the file, the counts or both fingerprints.
    """
    index = Index.open(config.index, config.version, verify="storage")
    hashes = [
        hash_ids(batch.column("id").to_pylist())
        for table in index.document_tables()
        for batch in table.select(["id"]).to_batches()
    ]
    unique = len(np.unique(np.concatenate(hashes)))
    if unique != index.num_rows:
        raise FormatError(
            f"index version {index.version} has {index.num_rows} rows but {unique} different ids; build it again"
        )
    for shard in index.shards:
        _check_vectors(index, shard)
    fingerprint_checked = _check_encoder(config, index)
    manifest = index.manifest
    return {
        "index": config.index,
        "version": index.version,
        "verified": True,
        "rows": index.num_rows,
        "deleted": manifest.deleted_rows,
        "shards": len(manifest.shards),
        "bytes": sum(entry.bytes for entry in manifest.shards),
        "fingerprint": index.fingerprint,
        "fingerprint_checked": fingerprint_checked,
    }


def _check_vectors(index: Index, shard: Shard) -> None:
    """Whole vectors are finite and, under cosine, not zero; codes are vouched for by their checksum."""
    if not shard.has_vectors:
        return
    live = shard.live_rows
    for start in range(0, len(live), BATCH_ROWS):
        rows = live[start : start + BATCH_ROWS]
        broken = ~np.isfinite(shard.vectors(rows)).all(axis=1)
        if broken.any():
            row = int(rows[np.flatnonzero(broken)[0]])
            (document,) = shard.documents([row])
            raise FormatError(
                f"index version {index.version} shard {shard.entry.name} row {row}: id {document.id!r} has a vector "
                "that is zero or not finite; build it again"
            )


def _check_encoder(config: IndexVerifyConfig, index: Index) -> bool:
    """Whether the encoder was there to compare; the one that the index names need not be on this machine."""
    name = config.encoder or index.encoder
    if config.encoder is None and not Path(name).is_dir():
        return False
    index.check_fingerprint(Encoder.load(name).fingerprint)
    return True


def index_rollback(config: IndexRollbackConfig) -> dict[str, Any]:
    """Publish another finished version, usually an earlier one.

    Raises:
        InputError: that version is not there or not finished; the message lists those that are.
    """
    index = Location.of(config.index)
    before = published_version(index)
    known = finished_versions(index)
    if config.to not in known:
        raise InputError(
            f"index {config.index!r} has no finished version {config.to!r}; it has: {', '.join(known) or 'none'}"
        )
    # A version that cannot be opened must not become the published one.
    Index.open(index, config.to)
    publish(index, config.to)
    return {"index": config.index, "version": config.to, "before": before}
