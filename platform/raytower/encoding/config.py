"""Config of the encoding job (docs/design.md, 5)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from raytower.config import AutoscalingWorkersConfig, Config, OnError
from raytower.data.config import InputConfig
from raytower.models.compute import Engine, EngineDtype, check_compute


class EncodeConfig(Config):
    """`raytower encode`."""

    renamed: ClassVar = {f"compute.{name}": name for name in ("engine", "dtype", "tokens_per_batch")}

    encoder: str
    """Encoder: a directory, a hub id or a URI."""
    input: InputConfig
    """Where the texts are."""
    output: str
    """Folder of the vectors, local or by URI; a killed job goes on in it."""
    prefix: str | None = None
    """Put before each text; null is the encoder's own."""
    engine: Engine = "torch"
    """What runs the forward pass: torch in float32, bfloat16 or float16; onnx in float32 or int8, on CPUs."""
    dtype: EngineDtype = "float32"
    """Precision of the forward pass."""
    max_length: int = Field(default=256, ge=1)
    """Tokens of a text; left out, no more than the model has positions for."""
    tokens_per_batch: int | None = Field(default=None, ge=1)
    """Padded tokens of a forward pass; null chooses by device. What does not fit into memory is halved."""
    embedding_dtype: Literal["float32", "float16"] = "float32"
    """Precision of the vectors that are written."""
    rows_per_file: int | None = Field(default=None, ge=1)
    """Rows of an output file; null chooses once, by size and workers."""
    workers: AutoscalingWorkersConfig = AutoscalingWorkersConfig()
    """Processes that encode side by side."""
    on_error: OnError = "fail"
    """What happens with rows that cannot be read: fail stops the job, quarantine leaves them out and lists
    them."""

    def model_post_init(self, context: Any) -> None:
        check_compute(self.engine, self.dtype)
        if self.engine == "onnx" and self.workers.num_gpus:
            raise ValueError(
                f"engine is onnx, which computes on CPUs, and workers.num_gpus is {self.workers.num_gpus:g}; "
                "set workers.num_gpus to 0, or engine to torch"
            )
