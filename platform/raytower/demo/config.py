"""The config of `raytower demo`."""

from __future__ import annotations

from pydantic import Field

from raytower.config import Config


class DemoConfig(Config):
    """`work_dir` null uses a temporary folder, removed at the end; `port` is where the demo serves."""

    work_dir: str | None = None
    full: bool = False
    keep_serving: bool = False
    seed: int = Field(default=0, ge=0)
    port: int = Field(default=8000, ge=0, le=65535)
    rerank_k: int = Field(default=10, ge=1)
