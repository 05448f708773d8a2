"""Storage by URI: locations, whole-file writes, compare-and-swap, leases, and the cache of what was fetched."""

from raytower.storage.errors import StorageError, StorageRefusedError, explaining
from raytower.storage.lease import Lease, writer_lease
from raytower.storage.local import fsync_dir, locked
from raytower.storage.location import (
    Location,
    absolute_if_local,
    cache_dir,
    publish_directory,
)

__all__ = [
    "Lease",
    "Location",
    "StorageError",
    "StorageRefusedError",
    "absolute_if_local",
    "cache_dir",
    "explaining",
    "fsync_dir",
    "locked",
    "publish_directory",
    "writer_lease",
]
