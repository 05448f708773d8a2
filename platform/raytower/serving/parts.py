"""The parts of a generation as the engine calls them. Each may lie in this process or in another one. No torch, no Ray.

Shape legend: Q queries, D embedding dimension, K candidates a query, N texts or pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from raytower.index.hybrid import HybridFusion
from raytower.index.table import Document
from raytower.models.fusion import Fusion
from raytower.models.search_mode import SearchMode
from raytower.retrieval.retriever import EncodedQueries
from raytower.serving.calls import ServedModel, TokenCounts
from raytower.serving.forwards import Lane
from raytower.serving.generation import Generation
from raytower.serving.work import Deadline

Vectors = NDArray[np.float32]
# A condition on the documents' columns.
Filter = Mapping[str, Any]


@dataclass(frozen=True)
class Encoded:
    """Vectors float32 (N, D)."""

    vectors: Vectors
    counts: TokenCounts


@dataclass(frozen=True)
class Pairs:
    """Queries, each with the candidates that it is to be scored with."""

    queries: Sequence[str]
    candidates: Sequence[Sequence[str]]
    lane: Lane
    may_shorten: bool = False
    """Whether only as many of the first candidates of each query need be scored as time allows."""


@dataclass(frozen=True)
class Scored:
    """Logits float32 of the first `depth` candidates of each query, or of all it has where those are fewer."""

    logits: Sequence[NDArray[np.float32]]
    depth: int
    counts: TokenCounts


@dataclass(frozen=True)
class Recalled:
    """Scores float32 and rows of the index's table, both (Q, K), best first; short answers end in row -1.

    `missing` are the numbers of shards that did not answer in time. `wordless` counts queries that no document shares
    a token with, where tokens were looked for.
    """

    scores: Vectors
    rows: NDArray[np.int64]
    missing: tuple[int, ...] = ()
    wordless: int = 0


class TextModel(Protocol):
    """An encoder."""

    @property
    def served(self) -> ServedModel: ...

    def predict(self, texts: Sequence[str], lane: Lane) -> float:
        """Seconds of forward passes that the texts would take."""

    async def encode(
        self, texts: Sequence[str], prefix: str, lane: Lane, deadline: Deadline, max_length: int | None = None
    ) -> Encoded:
        """Vectors of the texts, with `prefix` put before each, cut to `max_length` tokens (None: the encoder's own).

        Raises OutOfTimeError.
        """

    def decode(self, token_ids: Sequence[Sequence[int]]) -> list[str]:
        """The texts that lists of this model's token ids stand for. Raises UnprocessableError for ids it has not."""


class PairModel(Protocol):
    """A reranker."""

    @property
    def served(self) -> ServedModel: ...

    def predict(self, num_pairs: int, lane: Lane) -> float:
        """Seconds of forward passes that so many pairs would take."""

    async def score(self, pairs: Pairs, deadline: Deadline) -> Scored:
        """Logits of each query with its candidates. Raises OutOfTimeError."""


class LabelModel(Protocol):
    """A text classifier."""

    @property
    def served(self) -> ServedModel: ...

    def predict(self, texts: Sequence[str], lane: Lane) -> float:
        """Seconds of forward passes that the texts would take."""

    async def logits(
        self, texts: Sequence[str], lane: Lane, deadline: Deadline
    ) -> tuple[NDArray[np.float32], TokenCounts]:
        """Logits float32 (N, C) in the order of `served.labels`. Raises OutOfTimeError."""


class RecallStage(Protocol):
    """One version of an index, wherever its shards are."""

    @property
    def rows(self) -> int: ...

    @property
    def columns(self) -> Mapping[str, str]:
        """The documents' columns and their types."""

    def check_filter(self, filter: Filter) -> None:
        """Raises InputError where it does not fit the columns, or is too large."""

    async def search(self, vectors: Vectors, k: int, filter: Filter | None, deadline: Deadline) -> Recalled:
        """The best min(k, documents that match) rows for each vector of (Q, D)."""

    async def search_lexical(
        self, queries: Sequence[str], k: int, filter: Filter | None, deadline: Deadline
    ) -> Recalled:
        """The best rows for each text by its words, at most k; fewer where fewer documents share one."""

    async def search_hybrid(
        self, queries: EncodedQueries, k: int, filter: Filter | None, fusion: HybridFusion, deadline: Deadline
    ) -> Recalled:
        """The best min(k, documents that match) rows for each query by its vector and its words."""

    async def documents(
        self, rows: NDArray[np.int64], columns: Sequence[str], deadline: Deadline
    ) -> list[Document]:
        """The documents of `rows` (n,), in order, with those columns; a text that is not asked for is empty."""

    async def find(self, id: str, deadline: Deadline) -> Document | None:
        """The document with an id."""


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What answers the requests of one generation."""

    generation: Generation
    recall: RecallStage
    encoder: TextModel
    scorer: PairModel | None = None
    classifier: LabelModel | None = None
    fusion: Fusion | None = None
    hybrid: HybridFusion = field(default_factory=HybridFusion)
    kind: str = ""
    metric: str = ""
    measured_recall: float | None = None
    loads_late: bool = False
    """Whether the encoder is loaded by the first request that needs it."""

    @property
    def warm_modes(self) -> tuple[SearchMode, ...]:
        """The ways of searching that a query is sent through before a generation is served."""
        modes = self.generation.modes
        return tuple(mode for mode in modes if mode == "lexical") if self.loads_late else modes
