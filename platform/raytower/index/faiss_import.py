"""FAISS comes by extra: faiss-cpu or faiss-gpu, one module name for both."""

from __future__ import annotations

from typing import Any

from raytower.errors import import_extra


def import_faiss() -> Any:
    """The module. Raises MissingExtraError with the install line where neither build is installed."""
    return import_extra("faiss")
