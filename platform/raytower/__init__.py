"""raytower: semantic retrieval, from texts to a served search that recalls and reranks.

    import raytower

    encoder = raytower.load_encoder("runs/encoder")
    raytower.index_texts(["How to get a refund", "Opening hours"], encoder, "runs/index")
    hits = raytower.open_index("runs/index").search("When do you open?", k=1)

To import it changes nothing in the process and loads no library: what a name needs is loaded when the name is first
used. Ray is needed only for jobs over worker processes. docs/python.md is the guide.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raytower.errors import FormatError, InputError, MissingExtraError, RaytowerError
    from raytower.library.models import (
        Classifier,
        Encoder,
        Label,
        Ranked,
        Reranker,
        load_classifier,
        load_encoder,
        load_reranker,
    )
    from raytower.library.run import run
    from raytower.library.search import SearchIndex, open_index
    from raytower.library.texts import index_texts
    from raytower.retrieval.retriever import Hit

__version__: str

__all__ = [
    "Classifier",
    "Encoder",
    "FormatError",
    "Hit",
    "InputError",
    "Label",
    "MissingExtraError",
    "Ranked",
    "RaytowerError",
    "Reranker",
    "SearchIndex",
    "__version__",
    "index_texts",
    "load_classifier",
    "load_encoder",
    "load_reranker",
    "open_index",
    "run",
]

_MODELS = "raytower.library.models"
_HOMES = {
    **dict.fromkeys(("FormatError", "InputError", "MissingExtraError", "RaytowerError"), "raytower.errors"),
    **dict.fromkeys(("Classifier", "Encoder", "Label", "Ranked", "Reranker"), _MODELS),
    **dict.fromkeys(("load_classifier", "load_encoder", "load_reranker"), _MODELS),
    **dict.fromkeys(("SearchIndex", "open_index"), "raytower.library.search"),
    "Hit": "raytower.retrieval.retriever",
    "index_texts": "raytower.library.texts",
    "run": "raytower.library.run",
}


def __getattr__(name: str) -> Any:
    """What `__all__` names, loaded when it is first asked for."""
    if name == "__version__":
        value: Any = _find_version()
    elif name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _find_version() -> str:
    """As pyproject.toml says: read from there in a checkout, installed or not, else from the installed metadata."""
    import tomllib
    from importlib import metadata
    from pathlib import Path

    project = Path(__file__).resolve().parents[2] / "pyproject.toml"
    if project.is_file():
        described = tomllib.loads(project.read_text(encoding="utf-8")).get("project", {})
        if described.get("name") == "raytower":
            return str(described["version"])
    try:
        return metadata.version("raytower")
    except metadata.PackageNotFoundError:  # a copy of the package's folder alone
        return "0+unknown"
