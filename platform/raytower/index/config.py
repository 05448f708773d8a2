"""Config of the index build (design 5)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from raytower.config import ByteSize, Config, WorkersConfig

IndexKind = Literal["auto", "flat", "hnsw", "ivf_flat", "ivf_pq", "ivf_sq8"]


class TargetConfig(Config):
    """Recall@k against exact search to reach, and the memory that all shards together may take when searched."""

    recall: float = Field(default=0.95, gt=0, le=1)
    k: int = Field(default=10, ge=1)
    memory: ByteSize = ByteSize(8 * 2**30)


class IndexBuildConfig(Config):
    """`raytower index build`."""

    embeddings: str
    output: str
    kind: IndexKind = "auto"
    shards: Literal["auto"] | int = "auto"
    target: TargetConfig = TargetConfig()
    workers: WorkersConfig = WorkersConfig()
    seed: int = Field(default=0, ge=0)
