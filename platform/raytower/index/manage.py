"""`raytower index list | verify | rollback`: looking after the versions of an index."""

from __future__ import annotations

from typing import Any

import numpy as np

from raytower.config import Config
from raytower.errors import FormatError, InputError
from raytower.index.manifest import IndexManifest
from raytower.index.reader import Index
from raytower.index.vectors import hash_ids
from raytower.index.versions import (
    current_version,
    finished_versions,
    publish,
    published_version,
    version_folder,
)
from raytower.storage import Location


class IndexListConfig(Config):
    """`raytower index list`."""

    index: str


class IndexVerifyConfig(Config):
    """`raytower index verify`; `version` null verifies the published one."""

    index: str
    version: str | None = None


class IndexRollbackConfig(Config):
    """`raytower index rollback`."""

    index: str
    to: str


def index_list(config: IndexListConfig) -> dict[str, Any]:
    """Every finished version with its kind, rows, shards and recall, and which one is published.

    Raises:
        InputError: there is no index.
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
                "parent": manifest.parent,
            }
        )
    return {"index": config.index, "current": current, "versions": versions}


def index_verify(config: IndexVerifyConfig) -> dict[str, Any]:
    """Read everything again: checksums, counts, and ids that are unique across shards.

    Raises:
        InputError, FormatError: what is wrong, naming the file or the counts.
    """
    index = Index.open(config.index, config.version, verify="checksum")
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
    entries = index.manifest.shards
    return {
        "index": config.index,
        "version": index.version,
        "verified": True,
        "rows": index.num_rows,
        "shards": len(entries),
        "bytes": sum(entry.vectors_bytes + entry.documents_bytes for entry in entries),
        "fingerprint": index.fingerprint,
    }


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
