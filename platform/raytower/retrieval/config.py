"""Configs of retrieval: how models run over queries, and `raytower search`. Imports no library of models or indexes."""

from __future__ import annotations

from typing import Any, Literal, Protocol

from pydantic import Field

from raytower.config import Config, FractionField


class QueryCompute(Config):
    """How a job runs its models. Null chooses: tokens by device, lengths by model."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    tokens_per_batch: int | None = Field(default=None, ge=1)
    max_length: int | None = Field(default=None, ge=1)
    """Tokens of a query (or text); null is the encoder's own limit."""
    rerank_max_length: int | None = Field(default=None, ge=1)
    """Tokens of a (query, document) pair; null is the reranker's own limit."""
    rows_per_batch: int = Field(default=256, ge=1)
    """Queries in flight at once: encoded, searched and reranked together."""

    @property
    def engine_settings(self) -> dict[str, Any]:
        """What every engine over single texts is made with, by argument."""
        return {
            "dtype": self.dtype,
            "tokens_per_batch": self.tokens_per_batch,
            "max_length": self.max_length,
        }


class RetrieverSettings(Protocol):
    """The keys of a job's config that its retriever is put together by."""

    @property
    def reranker(self) -> str | None: ...

    @property
    def fusion_weight(self) -> float | None: ...

    @property
    def query_prefix(self) -> str | None: ...

    @property
    def compute(self) -> QueryCompute: ...


class SearchConfig(Config):
    """`raytower search`. `encoder` null is the one that the index's manifest names.

    `filter` is a condition on the documents' columns: JSON, such as {"year": {"$gte": 2020}}, or SQL text.
    """

    index: str
    query: str
    k: int = Field(default=10, ge=1)
    encoder: str | None = None
    reranker: str | None = None
    rerank_k: int = Field(default=100, ge=1)
    fusion_weight: FractionField | None = None
    query_prefix: str | None = None
    filter: dict[str, Any] | str | None = None
    compute: QueryCompute = QueryCompute()

    def model_post_init(self, context: Any) -> None:
        if not self.query.strip():
            raise ValueError("the query is empty; give a text to search for")
