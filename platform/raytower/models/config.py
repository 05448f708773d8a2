"""Configs of models: low-rank adapters, and `raytower export`. Imports no library of models."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from raytower.config import Config

# How the vectors of a text's tokens become one: their mean, the first, their maximum, the last, or what BERT's pooler
# (a linear layer and tanh) makes of the first.
PoolingMode = Literal["mean", "cls", "max", "lasttoken", "pooler"]
_EXPORTED: tuple[Literal["encoder", "reranker", "classifier"], ...] = ("encoder", "reranker", "classifier")


class LoraConfig(Config):
    """Size and place of the adapters."""

    rank: int = Field(default=8, ge=1)
    """Rank of the adapters."""
    alpha: int = Field(default=16, ge=1)
    """Adapters count alpha / rank times."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout in front of the adapters."""
    target_modules: list[str] | None = None
    """Ends of the names of the linear layers that get an adapter; null takes every linear layer of the backbone."""


class ExportConfig(Config):
    """`raytower export`. One of `encoder`, `reranker` and `classifier` says what is exported, and as what."""

    renamed: ClassVar = {"dtype": "graph_dtype"}

    encoder: str | None = None
    """Encoder: a directory, a hub id or a URI."""
    reranker: str | None = None
    """Cross-encoder directory, hub id or URI."""
    classifier: str | None = None
    """A directory that train-classifier wrote, or any Hugging Face text classifier."""
    output: str
    """A new directory in the same layout, with the graph in it."""
    graph_dtype: Literal["float32", "int8"] = "float32"
    """Type of the weights in the graph: int8 keeps a byte of each and computes in a third of the time."""

    def model_post_init(self, context: Any) -> None:
        given = [name for name in _EXPORTED if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"{' and '.join(given) or 'no model'} given; name exactly one of {', '.join(_EXPORTED)}"
            )

    @property
    def kind(self) -> Literal["encoder", "reranker", "classifier"]:
        """What the model is exported as."""
        return next(name for name in _EXPORTED if getattr(self, name) is not None)

    @property
    def source(self) -> str:
        """The model that is exported."""
        return str(getattr(self, self.kind))
