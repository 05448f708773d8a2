"""The config of `raytower evaluate`."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from raytower.data.config import QueriesConfig
from raytower.retrieval.config import BatchConfig, RetrieverConfig


class EvaluateConfig(RetrieverConfig, BatchConfig):
    """`raytower evaluate`."""

    encoder: str
    """Encoder: a directory, a hub id or a URI."""
    index: str
    """The index: a folder or a URI."""
    queries: QueriesConfig
    """Judged queries."""
    k: list[int] = Field(default=[1, 5, 10, 20, 50], min_length=1)
    """Cut-offs of recall, hit and precision."""
    output: str | None = None
    """Folder of run.trec, report.json and report.html; null writes none."""
    seed: int = Field(default=0, ge=0)
    """Seed of the bootstrap that intervals come from."""

    def model_post_init(self, context: Any) -> None:
        if min(self.k) < 1 or len(set(self.k)) != len(self.k):
            raise ValueError(f"k is {self.k}; cut-offs must be 1 or more, each given once")
