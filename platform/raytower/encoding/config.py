"""Config of the encoding job (design 5)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from raytower.config import Config, OnError, WorkersConfig
from raytower.data.sources import InputConfig


class ComputeConfig(Config):
    """How the forward pass runs. `tokens_per_batch` null chooses by device."""

    engine: Literal["torch"] = "torch"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    tokens_per_batch: int | None = Field(default=None, ge=1)


class EncodeConfig(Config):
    """`raytower encode`. `rows_per_file` null chooses by size and workers; `prefix` null is the encoder's own."""

    encoder: str
    input: InputConfig
    output: str
    prefix: str | None = None
    max_length: int = Field(default=256, ge=1)
    embedding_dtype: Literal["float32", "float16"] = "float32"
    rows_per_file: int | None = Field(default=None, ge=1)
    compute: ComputeConfig = ComputeConfig()
    workers: WorkersConfig = WorkersConfig()
    on_error: OnError = "fail"
