"""The config of `raytower up`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from raytower.config import Config, FractionField, OnError
from raytower.data.config import InputConfig


class UpConfig(Config):
    """`raytower up`."""

    input: InputConfig
    model: str | None = None
    """Encoder: a directory, a hub id or a URI. Null is intfloat/multilingual-e5-small, or the encoder of the index that
    is there already."""
    output: str | None = None
    """Folder of the vectors and the index; null is the input's own name with `.raytower` at its end, which a pattern
    has not."""
    gone: Literal["delete", "keep"] = "delete"
    """What happens with documents of the index that the input no longer has."""
    max_gone: FractionField = 0.5
    """Largest share of the index that may be deleted at once."""
    reranker: str | None = None
    """Cross-encoder that orders the best documents again; null serves without one."""
    host: str = "127.0.0.1"
    """Address to listen on; another than loopback opens the server to others."""
    port: int = Field(default=8000, ge=0, le=65535)
    """Port to listen on; 0 picks a free one."""
    on_error: OnError = "fail"
    """What happens with rows that cannot be read: the job stops, or they go to `<output>.quarantine/`."""
