"""Configs of retrieval: how models run over queries, and `raytower search`. Imports no library of models or indexes."""

from __future__ import annotations

from inspect import get_annotations
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from raytower.config import Config, FittedWorkersConfig, FractionField, OnError
from raytower.data.config import InputConfig
from raytower.data.unseen import is_unseen
from raytower.index.search_config import HybridConfig
from raytower.models.compute import EngineChoice, EngineDtype, check_compute
from raytower.models.search_mode import SearchMode

RankedFileType = Literal["tsv", "jsonl", "parquet", "trec"]
_OF_FILES = ("output", "file_type", "rows_per_batch", "workers", "on_error")
# The order of the shared keys, which stand behind a command's own.
_SHARED = (
    "mode",
    "hybrid",
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


class ModeConfig(EngineConfig):
    """Keys of every command that searches an index for texts."""

    mode: SearchMode = "dense"
    """How documents are recalled: dense by vectors; lexical by words (BM25), for which no encoder is loaded; hybrid by
    both, from the candidates of each."""
    hybrid: HybridConfig = HybridConfig()
    """How mode hybrid makes one score of two."""

    def refuse_unread_fusion(self) -> None:
        """Raises ValueError for keys of `hybrid` in another mode; servers and tune-fusion read them in any."""
        if self.mode != "hybrid" and self.hybrid != HybridConfig():
            raise ValueError(
                f"hybrid is {self.hybrid.model_dump(exclude_defaults=True)}, which mode {self.mode} does not read; set "
                "mode to hybrid, or leave it out"
            )


class RetrieverConfig(RerankConfig, ModeConfig):
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


class FileWorkersConfig(FittedWorkersConfig):
    """Workers of a job from file to file; what is null is as the machine has it."""

    num: int | None = Field(default=None, ge=1)
    """How many Ray tasks run at once, each with models and index of its own. Null is this process alone for little work
    and on one machine without several GPUs; else one for each GPU, and without GPUs one for each machine."""


class SearchConfig(RetrieverConfig, BatchConfig):
    """`raytower search`: a `query`, or an `input` of many, whose hits go to `output`."""

    renamed: ClassVar = {"format": "file_type"}

    index: str
    """The index: a folder or a URI."""
    query: str | None = None
    """The text to search for; null where there is an input."""
    input: InputConfig | None = None
    """Queries to search for, one a line, or with ids; null where there is one query."""
    output: str | None = None
    """File of the hits of an input: `query <tab> text <tab> score` without a header, or as file_type says."""
    file_type: RankedFileType | None = None
    """Type of the file that is written; null goes by its ending: .tsv or .txt, .jsonl, .parquet, .trec."""
    k: int = Field(default=10, ge=1)
    """Hits of a query."""
    encoder: str | None = None
    """Encoder: a directory, a hub id or a URI; null is the one that the index names."""
    filter: dict[str, Any] | str | None = None
    """A condition on the documents' columns: JSON, such as {"year": {"$gte": 2020}}, or SQL text."""
    workers: FileWorkersConfig = FileWorkersConfig()
    """Processes that search an input side by side."""
    on_error: OnError = "fail"
    """What happens with rows of an input that cannot be read: fail stops the job, quarantine leaves them out and lists
    them."""

    def model_post_init(self, context: Any) -> None:
        if (self.query is None) == (self.input is None):
            given = "both are" if self.input is not None else "neither is"
            raise ValueError(
                f"query is one text to search for and input a file of many, and {given} given; give one of them"
            )
        self.refuse_unread_fusion()
        if self.input is not None and self.output is None:
            raise ValueError("input is given and output is not; name the file that its hits go to")
        if self.query is None:
            return
        for name in _OF_FILES:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(
                    f"{name} is given, which a search for one query does not read; leave it out, or give the queries "
                    "as input"
                )
        if is_unseen(self.query):
            raise ValueError(f"the query is {self.query!r}, which shows nothing; give a text to search for")


class EmbedConfig(EngineConfig):
    """`raytower embed`."""

    encoder: str
    """Encoder: a directory, a hub id or a URI."""
    text: list[str] = Field(min_length=1)
    """The texts; on the command line one by position, or any number by a --text each."""
    role: Literal["query", "document"] = "document"
    """What the texts are, which chooses between the encoder's prompts."""
    prefix: str | None = None
    """Put before each text; null is the encoder's own for the role."""

    def model_post_init(self, context: Any) -> None:
        for place, text in enumerate(self.text):
            if is_unseen(text):
                raise ValueError(f"text {place} is {text!r}, which shows nothing; give a text")
