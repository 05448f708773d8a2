"""What routes ask of an engine, and what it answers. Knows neither HTTP nor models, nor where either runs.

Shape legend: N texts or pairs, D embedding dimension.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from raytower.models.search_mode import SearchMode as Mode
from raytower.retrieval.retriever import Hit
from raytower.serving.work import Deadline

Role = Literal["query", "document"]
ClassifyMode = Literal["labels", "votes", "classifier"]


# --- calls ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SearchCall:
    """A search: `k` documents of each query; if it reranks, the first `recall_k` are reranked.

    `fields` names the columns that hits bring, `text` among them; None brings all.
    """

    queries: Sequence[str]
    k: int
    recall_k: int
    rerank: bool
    filter: Mapping[str, Any] | None = None
    mode: Mode = "dense"
    fields: tuple[str, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class EmbedCall:
    """Texts to embed, or lists of token ids (as OpenAI's clients send them), which are decoded to texts first."""

    texts: Sequence[str] = ()
    token_ids: Sequence[Sequence[int]] = ()
    role: Role | None = None
    """The prefix that is put before each text; None puts none."""


@dataclass(frozen=True, kw_only=True)
class RerankCall:
    """Documents to score for one query."""

    query: str
    documents: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class SimilarityCall:
    """Pairs of texts to compare by the cosine of their vectors."""

    pairs: Sequence[tuple[str, str]]


@dataclass(frozen=True, kw_only=True)
class ClassifyCall:
    """Texts to label with at most `top_k` labels each; `mode` None takes the first that the collection has."""

    texts: Sequence[str]
    top_k: int = 5
    mode: ClassifyMode | None = None


# --- answers --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class TokenCounts:
    """Tokens that a model read, and how many of the texts were cut to its length."""

    tokens: int = 0
    truncated: int = 0

    def __add__(self, other: TokenCounts) -> TokenCounts:
        return TokenCounts(tokens=self.tokens + other.tokens, truncated=self.truncated + other.truncated)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What every answer names: by which generation it was made."""

    generation: str
    index_version: str
    counts: TokenCounts = TokenCounts()


@dataclass(frozen=True, kw_only=True)
class SearchAnswer(Answer):
    """Hits of each query, all from one generation.

    `missing_shards` did not answer in time. `reranked_k` is how many candidates of each query the reranker saw: fewer
    than the call's `recall_k` where the time was short, 0 where there was no reranking. `recall_ranks` are the ranks
    that the hits of each query had before reranking, from 1. `wordless` counts queries that share no token with a
    document, which mode hybrid answers as mode dense, and mode lexical without hits.
    """

    hits: Sequence[Sequence[Hit]]
    timings_ms: Mapping[str, float]
    recall_ranks: Sequence[Sequence[int]]
    reranked_k: int = 0
    missing_shards: tuple[int, ...] = ()
    mode: Mode = "dense"
    wordless: int = 0

    @property
    def reranked(self) -> bool:
        return self.reranked_k > 0

    @property
    def partial(self) -> bool:
        return bool(self.missing_shards)


@dataclass(frozen=True, kw_only=True)
class ModelAnswer(Answer):
    """What a model alone answers, by its name."""

    model: str


@dataclass(frozen=True, kw_only=True)
class EmbedAnswer(ModelAnswer):
    """Vectors float32 [N, D]."""

    vectors: NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class RerankAnswer(ModelAnswer):
    """Raw logits float32 [N] of the documents, in the call's order."""

    logits: NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class SimilarityAnswer(ModelAnswer):
    """Cosines float32 [N] of the pairs, in the call's order."""

    scores: NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class ClassifyAnswer(ModelAnswer):
    """Labels with scores of each text, best first."""

    mode: ClassifyMode
    labels: Sequence[Sequence[tuple[str, float]]]


@dataclass(frozen=True, kw_only=True)
class DocumentAnswer(Answer):
    """One document; text and metadata are None where no document has the id."""

    id: str
    text: str | None
    metadata: Mapping[str, Any] | None


# --- what is served -------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """A model as callers see it. `dimensions` are the leading parts of its vectors that it was trained for."""

    name: str
    max_length: int | None
    """None of an encoder that is not loaded yet."""
    dim: int | None = None
    dimensions: tuple[int, ...] = ()
    labels: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ServedCollection:
    """What one collection serves at this moment."""

    name: str
    generation: str
    index_version: str
    rows: int
    kind: str
    metric: str
    encoder: ServedModel
    reranker: ServedModel | None = None
    classifier: ServedModel | None = None
    recall: float | None = None
    """The index's measured Recall@k against exact search; None where it was not measured."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """The documents' columns and their types."""
    modes: tuple[Mode, ...] = ("dense",)
    classify_modes: tuple[ClassifyMode, ...] = ()


class Engine(Protocol):
    """The answers behind the routes. Calls of one engine run concurrently on one event loop.

    Every call may raise ApiError: NotFoundError (no such collection), NotReadyError, NotConfiguredError (the collection
    lacks the model), OverloadedError (it would not end in time), OutOfTimeError, UnprocessableError. A call that is
    cancelled gives up its place and its work that has not begun.
    """

    @property
    def collections(self) -> Sequence[str]:
        """The names, the default collection first; those that are not loaded yet too."""

    def served(self, collection: str) -> ServedCollection:
        """What a collection serves now. Raises NotFoundError, NotReadyError."""

    async def search(self, collection: str, call: SearchCall, deadline: Deadline) -> SearchAnswer:
        """Recall among the documents that the call's filter lets through, and rerank."""

    async def embed(self, collection: str, call: EmbedCall, deadline: Deadline) -> EmbedAnswer:
        """Vectors of texts."""

    async def rerank(self, collection: str, call: RerankCall, deadline: Deadline) -> RerankAnswer:
        """The reranker's logits."""

    async def similarity(self, collection: str, call: SimilarityCall, deadline: Deadline) -> SimilarityAnswer:
        """Cosines of pairs of texts."""

    async def classify(self, collection: str, call: ClassifyCall, deadline: Deadline) -> ClassifyAnswer:
        """Labels of texts."""

    async def document(self, collection: str, id: str, deadline: Deadline) -> DocumentAnswer:
        """The document with an id."""

    async def check(self) -> None:
        """Send a query through every collection to its answer's JSON. Raises what the first to fail raised."""
