"""The old place of `raytower.storage.errors`, for index/versions.py alone; it goes with that module."""

from raytower.storage.errors import explaining

__all__ = ["explaining"]
