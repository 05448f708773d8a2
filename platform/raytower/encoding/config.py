"""Config of the encoding job (docs/design.md, 5)."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from raytower.config import AutoscalingWorkersConfig, Config, OnError
from raytower.data.sources import InputConfig
from raytower.models.compute import Engine, EngineDtype, check_compute


class ComputeConfig(Config):
    """How the forward pass runs: torch in float32, bfloat16 or float16; onnx in float32 or int8, on CPUs.

    `tokens_per_batch` null chooses by device; what does not fit into memory is halved.
    """

    engine: Engine = "torch"
    dtype: EngineDtype = "float32"
    tokens_per_batch: int | None = Field(default=None, ge=1)

    def model_post_init(self, context: Any) -> None:
        check_compute(self.engine, self.dtype)


class EncodeConfig(Config):
    """`raytower encode`. `rows_per_file` null chooses once, by size and workers; `prefix` null is the encoder's own."""

    encoder: str
    input: InputConfig
    output: str
    prefix: str | None = None
    max_length: int = Field(default=256, ge=1)
    embedding_dtype: Literal["float32", "float16"] = "float32"
    rows_per_file: int | None = Field(default=None, ge=1)
    compute: ComputeConfig = ComputeConfig()
    workers: AutoscalingWorkersConfig = AutoscalingWorkersConfig()
    on_error: OnError = "fail"

    def model_post_init(self, context: Any) -> None:
        if self.compute.engine == "onnx" and self.workers.num_gpus > 0:
            raise ValueError(
                f"compute.engine is onnx, which computes on CPUs, and workers.num_gpus is {self.workers.num_gpus:g}; "
                "set workers.num_gpus to 0, or compute.engine to torch"
            )
