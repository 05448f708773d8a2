"""`raytower index list | verify | rollback`: looking after the versions of an index."""

from __future__ import annotations

from typing import Any

import numpy as np

from raytower.config import Config
from raytower.errors import FormatError, InputError
from raytower.index.manifest import IndexManifest, current_version, finished_versions, publish, version_folder
from raytower.index.reader import Index
from raytower.index.shard_build import hash_ids
from raytower.storage import Location


class IndexListConfig(Config):
    index: str


class IndexVerifyConfig(Config):
    """`version` null verifies the published one."""

    index: str
    version: str | None = None


class IndexRollbackConfig(Config):
    index: str
    to: str


def index_list(config: IndexListConfig) -> dict[str, Any]:
    """Every finished version with its kind, rows, shards and recall, and which one is published."""
    index = Location.of(config.index)
    current = current_version(index)
    versions = []
    for name in finished_versions(index):
        manifest = IndexManifest.read(version_folder(index, name))
        versions.append(
            {
                "version": name,
                "current": name == current,
                "kind": manifest.kind,
                "rows": manifest.rows,
                "shards": len(manifest.shards),
                "recall": manifest.recall,
                "parent": manifest.parent,
            }
        )
    return {"index": config.index, "current": current, "versions": versions}


def index_verify(config: IndexVerifyConfig) -> dict[str, Any]:
    """Read everything again: checksums, counts, unique ids.

    Raises:
        InputError, FormatError: what is wrong, naming the file or the id.
    """
    index = Index.open(config.index, config.version, verify="checksum")
    hashes = []
    for shard in index.shards:
        for batch in shard.documents_table.select(["id"]).to_batches():
            hashes.append(hash_ids(batch.column("id").to_pylist()))
    unique = len(np.unique(np.concatenate(hashes)))
    if unique != index.num_rows:
        raise FormatError(
            f"index version {index.version} has {index.num_rows} rows but {unique} different ids"
        )
    return {
        "index": config.index,
        "version": index.version,
        "verified": True,
        "rows": index.num_rows,
        "shards": len(index.shards),
        "fingerprint": index.fingerprint,
    }


def index_rollback(config: IndexRollbackConfig) -> dict[str, Any]:
    """Publish an earlier version again. Raises InputError for a version that is not there or not finished."""
    index = Location.of(config.index)
    before = current_version(index)
    known = finished_versions(index)
    if config.to not in known:
        raise InputError(
            f"index {config.index!r} has no finished version {config.to!r}; it has {', '.join(known)}"
        )
    publish(index, config.to)
    return {"index": config.index, "version": config.to, "before": before}
