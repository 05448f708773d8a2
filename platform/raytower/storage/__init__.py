"""Storage by URI: locations, whole-file writes, compare-and-swap, leases, and the cache of what was fetched."""

from raytower.storage.errors import StorageError, StorageRefusedError, explaining
from raytower.storage.hashed import HashedFile
from raytower.storage.known import known_sha256
from raytower.storage.lease import Lease, lease_holder, writer_lease
from raytower.storage.local import fsync_dir, locked
from raytower.storage.location import (
    Location,
    absolute_if_local,
    cache_dir,
    publish_directory,
)
from raytower.storage.outputs import check_output, former_place, output_folder, put_aside

__all__ = [
    "HashedFile",
    "Lease",
    "Location",
    "StorageError",
    "StorageRefusedError",
    "absolute_if_local",
    "cache_dir",
    "check_output",
    "explaining",
    "former_place",
    "fsync_dir",
    "known_sha256",
    "lease_holder",
    "locked",
    "output_folder",
    "publish_directory",
    "put_aside",
    "writer_lease",
]
