"""Configs of `raytower evaluate` and `raytower tune-fusion`."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from raytower.data.config import QueriesConfig
from raytower.retrieval.config import BatchConfig, ModeConfig, RerankConfig, RetrieverConfig


class EvaluateConfig(RetrieverConfig, BatchConfig):
    """`raytower evaluate`."""

    encoder: str | None = None
    """Encoder: a directory, a hub id or a URI; null is the one that the index names."""
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


class DevQueriesConfig(QueriesConfig):
    """Judged queries to tune on, which are never the ones that are evaluated."""

    split: str = "dev"
    """Split of a BEIR folder: queries are those that qrels/<split>.tsv judges. Pairs have no splits."""


class TuneFusionConfig(RerankConfig, ModeConfig, BatchConfig):
    """`raytower tune-fusion`: the weight of a reranker, or without one that of words beside vectors."""

    reranker: str | None = None
    """Cross-encoder directory, in whose raytower.json the fusion of its scores with those of `mode` is stored; null
    tunes the weight of lexical beside dense scores, which a new version of the index holds."""
    index: str
    """The index: a folder or a URI."""
    queries: DevQueriesConfig
    """Judged queries to tune on; never those that are evaluated later."""
    encoder: str | None = None
    """Encoder: a directory, a hub id or a URI; null is the one that the index names."""
    recall_k: int = Field(default=100, ge=1)
    """Documents that the first stage recalls for each query; all of them are reranked. Without a reranker, as many are
    candidates by vectors and as many by words."""
    query_prefix: str | None = None
    """Put before each query when it is encoded; null is the encoder's own."""
    store: bool = True
    """Whether the fusion is stored, with the reranker or in the index; false only shows it."""

    def model_post_init(self, context: Any) -> None:
        if self.reranker is None and self.mode == "lexical":
            raise ValueError(
                "mode is lexical, and without a reranker the weight of words beside vectors is tuned; name a reranker, "
                "or leave mode out"
            )
        if self.reranker is None and self.hybrid.weight is not None:
            raise ValueError(
                f"hybrid.weight is {self.hybrid.weight}, which is what is tuned without a reranker; leave it out, or "
                "name a reranker"
            )
