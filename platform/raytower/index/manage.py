"""`raytower index list | verify | rollback`: looking after the versions of an index."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from raytower.errors import FormatError
from raytower.index.build import refuse_duplicate_ids
from raytower.index.change_config import IndexListConfig, IndexRollbackConfig, IndexVerifyConfig
from raytower.index.lexical import counts_place
from raytower.index.manifest import PLACEMENTS_NAME, SHARDS_NAME, IndexManifest
from raytower.index.reader import Index
from raytower.index.shard_build import digest_of
from raytower.index.tasks import Run
from raytower.index.versions import changing, next_version, open_manifest, publish, version_names
from raytower.models.encoder import Encoder
from raytower.storage import Location


def index_list(config: IndexListConfig) -> dict[str, Any]:
    """Every version with its kind, rows, shards and recall; the last is the one that readers open.

    Raises:
        InputError: there is no index. FormatError: a version is damaged.
    """
    index = Location.of(config.index)
    current = open_manifest(index).version
    manifests = [open_manifest(index, name) for name in version_names(index)]
    return {
        "index": config.index,
        "current": current,
        "versions": [_described(manifest, config.curve) for manifest in manifests],
    }


def _described(manifest: IndexManifest, curve: bool) -> dict[str, Any]:
    measured = manifest.measured
    own = ("version", "operation", "parent", "kind", "rows", "recall", "recall_target", "target_reached")
    curves = ("curve", "placement_curve") if curve and measured else ()
    return {
        **{name: getattr(manifest, name) for name in own},
        "shards": len(manifest.shards),
        "last_measured": {"recall": measured.recall, "version": measured.version} if measured else None,
        "search_parameters": manifest.search_parameters,
        "fingerprint": manifest.fingerprint,
        **{name: getattr(measured, name) for name in curves},
    }


def index_verify(config: IndexVerifyConfig) -> dict[str, Any]:
    """Read everything again: checksums, counts, ids that are unique, vectors, and the fingerprint.

    Raises:
        InputError, FormatError: what is wrong, naming the file, the counts or both fingerprints.
    """
    place = Location.of(config.index)
    manifest = open_manifest(place, config.version)
    files = [
        (place / SHARDS_NAME / shard.digest / name, file)
        for shard in manifest.shards
        for name, file in shard.files.items()
    ]
    if manifest.placement:
        name = f"{manifest.placement.digest}.npz"
        files.append((place / PLACEMENTS_NAME / name, manifest.placement.file))
    if manifest.lexical:
        files += [(counts_place(place, file), file) for file in manifest.lexical.counts]
    for where, file in files:
        where.prove(file.sha256, "roll back, or compact the index")
    index = Index.of_manifest(place, manifest)
    refuse_duplicate_ids(place, index.table, Run())
    _check_vectors(index)
    return {
        "index": config.index,
        "version": index.version,
        "verified": True,
        "rows": index.num_rows,
        "shards": len(manifest.shards),
        "bytes": sum(entry.bytes for entry in manifest.shards),
        "fingerprint": index.fingerprint,
        "fingerprint_checked": _check_encoder(config, index),
    }


def _check_vectors(index: Index) -> None:
    """Whole vectors are finite and, under cosine, not zero; every document has an id and a text."""
    read = 0
    for batch in index.table.scan(["id", "text", "vector"]):
        if batch.column("id").null_count or batch.column("text").null_count:
            raise FormatError(
                f"the table of index version {index.version} has documents without an id or a text"
            )
        vectors = batch.column("vector").flatten().to_numpy(zero_copy_only=False).reshape(-1, index.dim)
        norms = np.linalg.norm(vectors.astype(np.float32), axis=1)
        broken = ~np.isfinite(norms) | ((norms == 0) & (index.manifest.metric == "cosine"))
        if broken.any():
            name = batch.column("id")[int(np.flatnonzero(broken)[0])].as_py()
            raise FormatError(
                f"index version {index.version}: id {name!r} has a vector that is zero or not finite; build it again"
            )
        read += batch.num_rows
    if read != index.num_rows:
        raise FormatError(
            f"index version {index.version} has {index.num_rows} rows and its table gave {read}"
        )


def _check_encoder(config: IndexVerifyConfig, index: Index) -> bool:
    """Whether the encoder was there to compare; the one that the index names need not be on this machine."""
    name = config.encoder or index.encoder
    if config.encoder is None and not Path(name).is_dir():
        return False
    index.check_fingerprint(Encoder.load(name).fingerprint)
    return True


def index_rollback(config: IndexRollbackConfig) -> dict[str, Any]:
    """Publish a new version that equals an earlier one; where the newest equals it already, nothing is done.

    Raises:
        InputError: that version is not there; the message lists those that are. FormatError: it is damaged.
    """
    index = Location.of(config.index)
    wanted = open_manifest(index, config.to)
    with changing(index, "index rollback") as writer:
        newest = manifest = writer.manifest
        same = ("table_version", "shards", "search_parameters", "kind")
        if any(getattr(newest, name) != getattr(wanted, name) for name in same):
            name, measured = next_version(newest.version), wanted.measured
            if measured and measured.version == wanted.version:
                measured = measured.model_copy(update={"version": name})  # it holds for an equal as well
            manifest = wanted.model_copy(
                update={
                    "version": name,
                    "parent": newest.version,
                    "operation": "rollback",
                    "identity": digest_of({"rollback": wanted.version}),
                    # A build that was rolled back is not made again by its own command.
                    "built": tuple(dict.fromkeys((*newest.built, *wanted.built))),
                    # A number that was given once is never given again.
                    "next_row": max(newest.next_row, wanted.next_row),
                    "measured": measured,
                }
            )
            Index.of_manifest(index, manifest)
            writer.lease.check()
            publish(index, manifest)
    return {
        "index": config.index,
        "version": manifest.version,
        "equals": wanted.version,
        "before": newest.version,
    }
