"""Configs of models: low-rank adapters, and `raytower export`. Imports no library of models."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from raytower.config import Config


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
    """`raytower export`. `encoder` is a directory, a hub id or a URI; `output` a new directory in the same layout."""

    renamed: ClassVar = {"dtype": "graph_dtype"}

    encoder: str
    """Encoder: a directory, a hub id or a URI."""
    output: str
    """A new directory in the same layout, with the graph in it."""
    graph_dtype: Literal["float32", "int8"] = "float32"
    """Type of the weights in the graph: int8 keeps a byte of each and computes in a third of the time."""
