"""The engine behind the routes: encoder, index and reranker of one moment, shared by concurrent requests. No Ray.

A request works on one `Snapshot` from its first to its last step; `load` puts a new one in place while requests on
the old one end undisturbed. So no answer mixes index versions.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from raytower.errors import FormatError, InputError
from raytower.models.compute import ComputeDtype
from raytower.models.cross_encoder import CrossEncoder, CrossScorer
from raytower.models.encoder import Encoder
from raytower.models.forward import ForwardEngine
from raytower.models.fusion import Fusion
from raytower.retrieval.retriever import Candidate, Retriever, Vectors
from raytower.serving.app import EmbedAnswer, ScoreAnswer, SearchAnswer, SearchCall
from raytower.serving.config import ServeConfig
from raytower.serving.schemas import NotConfiguredError, NotReadyError, UnprocessableError
from raytower.serving.work import Deadline, MicroBatcher

# Limits how long one forward pass keeps other requests waiting; longer submissions are cut.
_TEXTS_PER_FORWARD = 128
_PAIRS_PER_FORWARD = 128
_LOAD_TIMEOUT_MS = 60_000
_WARM_UP = SearchCall(queries=["warm up"], k=1, recall_k=1, rerank=True)


class ServedIndex(Protocol):
    """One version of an index, wherever its shards are."""

    @property
    def version(self) -> str: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def encoder(self) -> str | None: ...

    @property
    def dim(self) -> int: ...

    def check_fingerprint(self, fingerprint: str) -> None:
        """Raises FormatError where an encoder with this fingerprint did not make the vectors."""

    def check_filter(self, filter: Mapping[str, Any]) -> None:
        """Raises InputError if the filter does not fit the documents' columns."""

    def recall(
        self, vectors: Vectors, k: int, deadline: Deadline, filter: Mapping[str, Any] | None = None
    ) -> tuple[list[list[Candidate]], bool]:
        """Candidates of each vector of (Q, D), best first, and whether those of a shard are missing."""


# Opens the named version, or the published one for None.
OpenIndex = Callable[[str | None], ServedIndex]


class SharedEncoder:
    """One encoder that concurrent requests share: texts that wait together are encoded in one forward pass."""

    def __init__(self, name: str, dtype: ComputeDtype, max_length: int | None) -> None:
        """`max_length` None is the encoder's own. Raises InputError: no such model, or too long for its positions."""
        encoder = Encoder.load(name)
        self.name = model_name(name)
        self.dim = encoder.dim
        self.fingerprint = encoder.fingerprint
        self.prefixes = {"query": encoder.prefix_for("query"), "document": encoder.prefix_for("document")}
        self._engine = ForwardEngine(encoder, dtype=dtype, max_length=max_length)
        self._batcher = MicroBatcher(self._run, _TEXTS_PER_FORWARD)

    def encode(self, texts: Sequence[str], prefix: str, deadline: Deadline) -> tuple[Vectors, int]:
        """Vectors float32 [N, D] and how many tokens they were made from. Raises OutOfTimeError."""
        rows = self._batcher.submit([prefix + text for text in texts], deadline)
        return np.stack([vector for vector, _ in rows]), sum(count for _, count in rows)

    def _run(self, texts: list[str]) -> list[tuple[NDArray[np.float32], int]]:
        block = self._engine.tokenise(texts)
        return list(zip(self._engine.forward_block(block), block.lengths.tolist(), strict=True))


class SharedScorer:
    """One reranker that concurrent requests share."""

    def __init__(self, name: str, dtype: ComputeDtype, max_length: int | None) -> None:
        """`max_length` None is the reranker's own. Raises InputError as `SharedEncoder`."""
        self.name = model_name(name)
        self._scorer = CrossScorer(CrossEncoder.load(name), dtype=dtype, max_length=max_length)
        self.fusion = self._scorer.fusion
        self._batcher = MicroBatcher[tuple[str, str], np.float32](self._run, _PAIRS_PER_FORWARD)

    def score(
        self, queries: Sequence[str], documents: Sequence[str], deadline: Deadline
    ) -> NDArray[np.float32]:
        """Raw logits float32 [N] of the pairs. Raises OutOfTimeError."""
        pairs = list(zip(queries, documents, strict=True))
        return np.array(self._batcher.submit(pairs, deadline), dtype=np.float32)

    def _run(self, pairs: list[tuple[str, str]]) -> list[np.float32]:
        return list(self._scorer.score([query for query, _ in pairs], [document for _, document in pairs]))


@dataclass(frozen=True)
class Snapshot:
    """The models and the index of one request. `query_prefix` is put before each query when it is encoded."""

    index: ServedIndex
    encoder: SharedEncoder
    scorer: SharedScorer | None
    fusion: Fusion | None
    query_prefix: str


class SearchEngine:
    """Answers searches, embeddings and reranks; safe to call from several threads."""

    def __init__(self, config: ServeConfig, open_index: OpenIndex) -> None:
        self._config = config
        self._open_index = open_index
        self._snapshot: Snapshot | None = None
        self._load_lock = threading.Lock()

    @property
    def index_version(self) -> str | None:
        """The version that is served now; None before the first `load`."""
        snapshot = self._snapshot
        return snapshot.index.version if snapshot else None

    def load(self, version: str | None = None) -> str:
        """Open an index version (None: the published one) and serve it from the next request on; returns its name.

        If it raises, the version before stays in place.

        Raises:
            InputError: no such index or model, or the index records no encoder and the config names none.
            FormatError: the index was made by another encoder, or a file is damaged.
        """
        with self._load_lock:
            before = self._snapshot
            index = self._open_index(version)
            if before is not None and before.index.version == index.version:
                return index.version
            encoder = self._encoder_of(index, before)
            scorer = before.scorer if before else self._load_scorer()
            prefix = self._config.query_prefix
            snapshot = Snapshot(
                index=index,
                encoder=encoder,
                scorer=scorer,
                fusion=choose_fusion(scorer, self._config.fusion_weight),
                query_prefix=encoder.prefixes["query"] if prefix is None else prefix,
            )
            # A model's first forward pass is slow, so it is made here and not in a user's request.
            self._search(snapshot, _WARM_UP, Deadline.after(_LOAD_TIMEOUT_MS))
            self._snapshot = snapshot
            return index.version

    def search(self, call: SearchCall, deadline: Deadline) -> SearchAnswer:
        """Recall and rerank as the call asks, among the documents that its filter lets through.

        Raises:
            UnprocessableError: a filter that does not fit the documents' columns. OutOfTimeError, NotReadyError.
        """
        return self._search(self._current(), call, deadline)

    def embed(self, texts: list[str], role: str | None, deadline: Deadline) -> EmbedAnswer:
        """Vectors of `texts`, after the prefix of `role` if one is given. Raises OutOfTimeError, NotReadyError."""
        snapshot = self._current()
        prefixes = {**snapshot.encoder.prefixes, "query": snapshot.query_prefix}
        vectors, num_tokens = snapshot.encoder.encode(texts, prefixes[role] if role else "", deadline)
        return EmbedAnswer(snapshot.index.version, snapshot.encoder.name, vectors, num_tokens)

    def score(self, query: str, documents: list[str], deadline: Deadline) -> ScoreAnswer:
        """The reranker's logits. Raises NotConfiguredError without one, OutOfTimeError, NotReadyError."""
        snapshot = self._current()
        if snapshot.scorer is None:
            raise NotConfiguredError("this server has no reranker; start it with `reranker` set")
        logits = snapshot.scorer.score([query] * len(documents), documents, deadline)
        return ScoreAnswer(snapshot.index.version, snapshot.scorer.name, logits)

    def _current(self) -> Snapshot:
        if self._snapshot is None:
            raise NotReadyError("no index is loaded yet")
        return self._snapshot

    @staticmethod
    def _search(snapshot: Snapshot, call: SearchCall, deadline: Deadline) -> SearchAnswer:
        partial = False
        if call.filter is not None:
            try:
                snapshot.index.check_filter(call.filter)
            except InputError as error:
                raise UnprocessableError(str(error)) from error

        def recall(vectors: Vectors, depth: int) -> list[list[Candidate]]:
            nonlocal partial
            deadline.check()
            candidates, partial = snapshot.index.recall(vectors, depth, deadline, call.filter)
            return candidates

        retriever = Retriever(
            _TimedEncoder(snapshot.encoder, deadline),
            scorer=_TimedScorer(snapshot.scorer, deadline) if snapshot.scorer else None,
            fusion=snapshot.fusion,
            query_prefix=snapshot.query_prefix,
            recall=recall,
        )
        found = retriever.search(call.queries, k=call.k, recall_k=call.recall_k, rerank=call.rerank)
        return SearchAnswer(snapshot.index.version, partial, found.reranked, found.hits, found.timings_ms)

    def _encoder_of(self, index: ServedIndex, before: Snapshot | None) -> SharedEncoder:
        if before is not None and before.encoder.fingerprint == index.fingerprint:
            return before.encoder
        name = encoder_for(self._config, index.encoder)
        encoder = SharedEncoder(name, self._config.dtype, self._config.max_length)
        index.check_fingerprint(encoder.fingerprint)
        if encoder.dim != index.dim:
            raise FormatError(f"encoder {name!r} gives vectors of {encoder.dim}, the index holds {index.dim}")
        return encoder

    def _load_scorer(self) -> SharedScorer | None:
        config = self._config
        if not config.reranker:
            return None
        return SharedScorer(config.reranker, config.dtype, config.rerank_max_length)


@dataclass(frozen=True)
class _TimedEncoder:
    """A shared encoder as the retriever calls it, on behalf of one request."""

    encoder: SharedEncoder
    deadline: Deadline

    def encode(self, texts: Sequence[str], prefix: str = "") -> Vectors:
        return self.encoder.encode(texts, prefix, self.deadline)[0]


@dataclass(frozen=True)
class _TimedScorer:
    """A shared scorer as the retriever calls it, on behalf of one request."""

    scorer: SharedScorer
    deadline: Deadline

    def score(self, queries: Sequence[str], documents: Sequence[str]) -> NDArray[np.float32]:
        return self.scorer.score(queries, documents, self.deadline)


def encoder_for(config: ServeConfig, recorded: str | None) -> str:
    """The encoder to load: the config's, else the one that the index records.

    Raises:
        InputError: neither names one.
    """
    name = config.encoder or recorded
    if not name:
        raise InputError(
            f"index {config.index!r} records no encoder; name the one it was made with as `encoder`"
        )
    return name


def choose_fusion(scorer: SharedScorer | None, weight: float | None) -> Fusion | None:
    """The fusion stored with the reranker, with `weight` in place of its own if given."""
    if scorer is None:
        return None
    if weight is None:
        return scorer.fusion
    return replace(scorer.fusion or Fusion(weight=weight), weight=weight)


def model_name(name: str) -> str:
    """The model's name as callers see it: a hub id unchanged, of a directory only the last part."""
    path = Path(name)
    return path.resolve().name if path.is_dir() else name
