"""Configs of retrieval: how models run over queries, and `raytower search`. Imports no library of models or indexes."""

from __future__ import annotations

from inspect import get_annotations
from typing import Any, ClassVar, Self

from pydantic import Field, model_validator

from raytower.config import Config, FractionField
from raytower.data.unseen import is_unseen
from raytower.models.compute import EngineChoice, EngineDtype, check_compute

# The order of the shared keys, which stand behind a command's own.
_SHARED = (
    "reranker",
    "recall_k",
    "fusion_weight",
    "query_prefix",
    "engine",
    "dtype",
    "max_length",
    "rerank_max_length",
    "tokens_per_batch",
    "rows_per_batch",
)


class EngineConfig(Config):
    """Keys of every command that runs an encoder or a classifier over texts. A command's own keys stand before them."""

    renamed: ClassVar = {f"compute.{name}": name for name in ("dtype", "max_length", "tokens_per_batch")}

    engine: EngineChoice = "torch"
    """What runs the models' forward passes: torch in float32, bfloat16 or float16; onnx in float32 or int8, on CPUs;
    auto times those that compute in dtype, for each model when it is loaded, and takes the faster."""
    dtype: EngineDtype = "float32"
    """Precision of the models' forward passes."""
    max_length: int | None = Field(default=None, ge=1)
    """Tokens of a query or text; null is the encoder's own limit."""
    tokens_per_batch: int | None = Field(default=None, ge=1)
    """Padded tokens of a forward pass; null chooses by device."""

    @classmethod
    def __pydantic_init_subclass__(cls, **settings: Any) -> None:
        # Pydantic puts a base's fields first. But help and a dumped config should begin with the required keys.
        fields, own = cls.__pydantic_fields__, get_annotations(cls)
        shared = [name for name in _SHARED if name not in own]
        names = dict.fromkeys((*own, *(name for name in fields if name not in shared), *shared))
        cls.__pydantic_fields__ = {name: fields[name] for name in names if name in fields}
        cls.model_rebuild(force=True)

    @model_validator(mode="after")
    def _check_engine(self) -> Self:
        check_compute(self.engine, self.dtype)
        return self

    @property
    def engine_settings(self) -> dict[str, Any]:
        """The arguments by which every engine over single texts is made."""
        return {
            "engine": self.engine,
            "dtype": self.dtype,
            "tokens_per_batch": self.tokens_per_batch,
            "max_length": self.max_length,
        }


class RerankConfig(EngineConfig):
    """Keys of every command that may also run a reranker."""

    renamed: ClassVar = {"compute.rerank_max_length": "rerank_max_length"}

    rerank_max_length: int | None = Field(default=None, ge=1)
    """Tokens of a (query, document) pair; null is the reranker's own limit."""


class BatchConfig(EngineConfig):
    """Keys of every command that goes through many rows."""

    renamed: ClassVar = {"compute.rows_per_batch": "rows_per_batch"}

    rows_per_batch: int = Field(default=256, ge=1)
    """Rows in flight at once: encoded, searched and reranked together."""


class RetrieverConfig(RerankConfig):
    """Keys of every command that puts a retriever together from its config."""

    renamed: ClassVar = {"rerank_k": "recall_k"}

    reranker: str | None = None
    """Cross-encoder directory or hub id that puts the recalled documents in order; null leaves them as recalled."""
    recall_k: int = Field(default=100, ge=1)
    """Documents that the first stage recalls for each query; all of them are reranked. Without a reranker as many are
    recalled as are asked for."""
    fusion_weight: FractionField | None = None
    """Weight of the rerank score beside the recall score; null is the weight stored with the reranker."""
    query_prefix: str | None = None
    """Put before each query when it is encoded; null is the encoder's own."""


class SearchConfig(RetrieverConfig):
    """`raytower search`."""

    index: str
    """The index: a folder or a URI."""
    query: str
    """The text to search for."""
    k: int = Field(default=10, ge=1)
    """Hits to show."""
    encoder: str | None = None
    """Encoder: a directory, a hub id or a URI; null is the one that the index names."""
    filter: dict[str, Any] | str | None = None
    """A condition on the documents' columns: JSON, such as {"year": {"$gte": 2020}}, or SQL text."""

    def model_post_init(self, context: Any) -> None:
        if is_unseen(self.query):
            raise ValueError(f"the query is {self.query!r}, which shows nothing; give a text to search for")
