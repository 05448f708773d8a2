"""FAISS comes by extra: faiss-cpu or faiss-gpu, one module name for both."""

from __future__ import annotations

from typing import Any

from raytower.errors import MissingExtraError


def import_faiss() -> Any:
    """The module. Raises MissingExtraError with the install line where neither build is installed."""
    try:
        import faiss
    except ImportError as error:
        raise MissingExtraError(
            "FAISS is not installed; install one of its builds with: pip install 'raytower[cpu]' "
            "(or 'raytower[gpu]' on a machine with CUDA), never both"
        ) from error
    return faiss
