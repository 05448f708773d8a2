"""Encoders, rerankers and text classifiers in this process, without Ray.

Each of them may be used by any number of threads: their calls are computed one after another, and each answers as if it
were alone. The functions that begin with `a` are for `await`: they wait in a thread of asyncio's own pool, so that the
event loop goes on meanwhile; one that is cancelled is computed to its end all the same.

Shape legend: N and M texts, D embedding dimension.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from raytower.errors import InputError
from raytower.library.inputs import Unpicklable, count_of, name_of, shown, texts_of, vectors_of
from raytower.models.compute import Engine, EngineChoice, EngineDtype
from raytower.models.cross_encoder import CrossEncoder, CrossScorer
from raytower.models.encoder import Encoder as EncoderModel
from raytower.models.engine_choice import graph_directory
from raytower.models.forward import ForwardEngine
from raytower.models.fusion import Fusion
from raytower.models.text_classifier import ClassifierEngine, TextClassifier
from raytower.models.trained_prefixes import own_prefix

Role = Literal["query", "document"]
Vectors = NDArray[np.float32]
# No Sequence, which a single string is too.
Several = list[str] | tuple[str, ...]
ENCODER = "an Encoder, made by load_encoder, or the name of one"
_MODEL = "a directory, a hub id or a URI of a model"


class Ranked(NamedTuple):
    """A text of `rank`: its position in the list that was given, and its score."""

    index: int  # type: ignore[assignment]  # not the method of tuples, which nobody asks of a pair
    score: float


class Label(NamedTuple):
    """A label and its probability."""

    name: str
    probability: float


class _Loaded(Unpicklable):
    """A model, and where it came from."""

    _loader: ClassVar[str]
    """The function that loads it."""

    def __init__(self, name: str) -> None:
        self.name = name
        """The directory, hub id or URI that it was loaded from."""

    def _how_to_send(self) -> str:
        return f"send its name, {self.name!r}, and call {self._loader} there"


class Encoder(_Loaded):
    """Texts to vectors; made by `load_encoder`. Safe for threads."""

    _loader = "load_encoder"

    def __init__(self, name: str, engine: ForwardEngine, compute: tuple[Engine, EngineDtype]) -> None:
        super().__init__(name)
        self.shared = _OneAtATime(engine)
        """It for a `Retriever`: texts behind a prefix of the caller's."""
        self.compute = compute
        """What computes, and at which precision."""

    @property
    def engine(self) -> ForwardEngine:
        """What computes; not safe for threads."""
        return self.shared.engine

    @property
    def dim(self) -> int:
        """D, the embedding dimension."""
        return self.engine.dim

    @property
    def fingerprint(self) -> str:
        """Hash over all that maps a text to a vector; an index knows its encoder by it."""
        return self.engine.fingerprint

    def prefix(self, role: Role) -> str:
        """The model's own prompt for a query or a document; empty where it names none."""
        return own_prefix(self.engine.encoder, role, self.name)

    def encode(self, texts: str | Sequence[str], role: Role = "document") -> Vectors:
        """Vectors of texts, each behind the model's own prompt for its role, as the jobs encode them.

        Args:
            texts: a list, an iterator or a column (numpy, pandas, Arrow); or one text.
            role: what the texts are; of e5 and its kin this chooses between `query: ` and `passage: `.

        Returns:
            float32 (N, D) in the order of the texts, of unit length where the model normalises; (D,) for one text.

        Raises:
            InputError: an element is no string, or another role.
            RaytowerError: a text does not fit into memory.

        >>> encoder = raytower.load_encoder(encoder_dir)
        >>> encoder.encode(["How do I reset my password?", "Opening hours"]).shape
        (2, 384)
        >>> encoder.encode("Opening hours", role="query").shape
        (384,)
        """
        if role not in ("query", "document"):
            raise InputError(f"role is {role!r}; it must be 'query' or 'document'")
        if isinstance(texts, str):
            vector: Vectors = self.encode([texts], role)[0]
            return vector
        return self.shared.encode(texts_of(texts, "texts"), self.prefix(role))

    def similarity(
        self, queries: Sequence[str] | Vectors, documents: Sequence[str] | Vectors
    ) -> NDArray[np.float32]:
        """The cosine of each query with each document.

        Args:
            queries: N texts, which are encoded as queries; or their vectors, float32 (N, D).
            documents: M texts, which are encoded as documents; or their vectors, float32 (M, D).

        Returns:
            float32 (N, M); 0 where a vector is all zeros.

        Raises:
            InputError: an element is no string, or vectors have another shape or are not finite.

        >>> encoder = raytower.load_encoder(encoder_dir)
        >>> cosines = encoder.similarity(["pets"], ["cats and dogs", "the stock market"])
        >>> bool(cosines[0, 0] > cosines[0, 1])
        True
        """
        left = self._units(queries, "queries", "query")
        return left @ self._units(documents, "documents", "document").T

    async def aencode(self, texts: str | Sequence[str], role: Role = "document") -> Vectors:
        """`encode`, for `await`: float32 (N, D), or (D,) for one text."""
        return await asyncio.to_thread(self.encode, texts, role)

    def _units(self, given: Sequence[str] | Vectors, name: str, role: Role) -> Vectors:
        if isinstance(given, np.ndarray) and given.dtype.kind not in "OSUT":  # texts
            vectors = vectors_of(given, name, self.dim)
        else:
            vectors = self.encode(texts_of(given, name), role)
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        units: Vectors = np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0)
        return units


class Reranker(_Loaded):
    """Texts in the order of their relevance to a query; made by `load_reranker`. Safe for threads."""

    _loader = "load_reranker"

    def __init__(self, name: str, engine: CrossScorer) -> None:
        super().__init__(name)
        self._engine = engine
        self._lock = threading.Lock()

    @property
    def fusion(self) -> Fusion | None:
        """How its logits mix with recall scores, as it was tuned; None where it never was."""
        return self._engine.fusion

    def score(self, queries: Sequence[str], documents: Sequence[str]) -> NDArray[np.float32]:
        """Raw relevance logits, float32 (N,), of the pairs (queries[i], documents[i]).

        Raises:
            InputError: the lists differ in length, an element is no string, or a logit is infinite or no number.
        """
        pairs = texts_of(queries, "queries"), texts_of(documents, "documents")
        with self._lock:
            return self._engine.score(*pairs)

    def rank(self, query: str, texts: Sequence[str], k: int | None = None) -> list[Ranked]:
        """Texts by falling relevance to `query`; of equal scores the first text comes first.

        Args:
            query: one text.
            texts: what is put in order.
            k: how many come back; None for all.

        Returns:
            The score is the logit behind the directory's own activation (a sigmoid unless it says otherwise), as
            `CrossEncoder.rank` of sentence-transformers gives it.

        Raises:
            InputError: an element is no string, or k is below 1.

        >>> reranker = raytower.load_reranker(reranker_dir)
        >>> ranked = reranker.rank("when are you open", ["a password", "opening hours"])
        >>> best, other = ranked
        >>> {best.index, other.index} == {0, 1} and 1 > best.score >= other.score > 0
        True
        """
        first = None if k is None else count_of(k, "k")
        if not isinstance(query, str):
            raise InputError(f"query is {shown(query)}; it must be a string")
        listed = texts_of(texts, "texts")
        scores = self._engine.activated(self.score([query] * len(listed), listed))
        order = np.argsort(-scores, kind="stable")[:first]
        return [Ranked(int(place), float(scores[place])) for place in order]

    async def arank(self, query: str, texts: Sequence[str], k: int | None = None) -> list[Ranked]:
        """`rank`, for `await`."""
        return await asyncio.to_thread(self.rank, query, texts, k)


class Classifier(_Loaded):
    """Texts to labels; made by `load_classifier`. Safe for threads."""

    _loader = "load_classifier"

    def __init__(self, name: str, engine: ClassifierEngine) -> None:
        super().__init__(name)
        self._engine = engine
        self._lock = threading.Lock()

    @property
    def labels(self) -> tuple[str, ...]:
        """All labels, in the model's order."""
        return self._engine.labels

    @overload
    def classify(self, texts: str, k: int | None = None) -> list[Label]: ...

    @overload
    def classify(self, texts: Several, k: int | None = None) -> list[list[Label]]: ...

    def classify(self, texts: str | Several, k: int | None = None) -> list[Label] | list[list[Label]]:
        """The `k` most probable labels of each text, the most probable first; None gives all. One text gives one list.

        Raises:
            InputError: an element is no string, or k is below 1.

        >>> classifier = raytower.load_classifier(classifier_dir)
        >>> [[likely, unlikely]] = classifier.classify(["a refund, please"])
        >>> {likely.name, unlikely.name} == {"delivery", "money"} and likely.probability >= 0.5
        True
        """
        if isinstance(texts, str):
            return self.classify([texts], k)[0]
        first = None if k is None else count_of(k, "k")
        listed = texts_of(texts, "texts")
        with self._lock:
            names, probabilities = self._engine.classify(listed, first)
        return [
            [Label(*pair) for pair in zip(row, values, strict=True)]
            for row, values in zip(names, probabilities.tolist(), strict=True)
        ]

    @overload
    async def aclassify(self, texts: str, k: int | None = None) -> list[Label]: ...

    @overload
    async def aclassify(self, texts: Several, k: int | None = None) -> list[list[Label]]: ...

    async def aclassify(self, texts: Any, k: int | None = None) -> Any:
        """`classify`, for `await`."""
        return await asyncio.to_thread(self.classify, texts, k)


def load_encoder(
    name: str | Path,
    *,
    engine: EngineChoice = "torch",
    dtype: EngineDtype = "float32",
    device: str | None = None,
    max_length: int | None = None,
    tokens_per_batch: int | None = None,
) -> Encoder:
    """An encoder, ready to encode in this process.

    Args:
        name: a directory, a hub id (`org/model`, `org/model@revision`), or a URI of remote storage.
        engine: `torch`; `onnx`, on CPUs, which needs the extra [onnx]; or `auto`, the faster of both by a short race.
        dtype: precision of the weights: float32, bfloat16 or float16 of torch, float32 or int8 of onnx.
        device: such as `cpu` or `cuda:1`; None takes a GPU where there is one.
        max_length: tokens that a text is cut to; None is the model's own limit.
        tokens_per_batch: padded tokens that go through the model at once; None chooses by device.

    Raises:
        InputError: no such model, or a setting that it or this machine does not have.
        FormatError: a directory without whole safetensors weights, or with modules that are not known.
        MissingExtraError: engine onnx without ONNX Runtime.

    >>> raytower.load_encoder(encoder_dir).dim
    384
    """
    model = EncoderModel.load(name_of(name, "name", _MODEL))
    made = ForwardEngine(
        model,
        engine=engine,
        dtype=dtype,
        device=device,
        max_length=max_length,
        tokens_per_batch=tokens_per_batch,
        directory=graph_directory(str(name), engine),
    )
    return Encoder(str(name), made, (made.settled.engine, dtype))


def load_reranker(
    name: str | Path,
    *,
    engine: EngineChoice = "torch",
    dtype: EngineDtype = "float32",
    device: str | None = None,
    max_length: int | None = None,
    tokens_per_batch: int | None = None,
) -> Reranker:
    """A cross-encoder, ready to score pairs in this process. Arguments and errors are those of `load_encoder`.

    Raises:
        FormatError: it has no trained head (an encoder is no reranker yet), or other than 1 or 2 logits.
    """
    made = CrossScorer(
        CrossEncoder.load(name_of(name, "name", _MODEL)),
        engine=engine,
        dtype=dtype,
        device=device,
        max_length=max_length,
        tokens_per_batch=tokens_per_batch,
        directory=graph_directory(str(name), engine),
    )
    return Reranker(str(name), made)


def load_classifier(
    name: str | Path,
    *,
    engine: EngineChoice = "torch",
    dtype: EngineDtype = "float32",
    device: str | None = None,
    max_length: int | None = None,
    tokens_per_batch: int | None = None,
) -> Classifier:
    """A text classifier, ready to classify in this process. Arguments and errors are those of `load_encoder`.

    Raises:
        FormatError: it has no trained head, fewer than 2 labels, or labels of which several may hold at once.
    """
    made = ClassifierEngine(
        TextClassifier.load(name_of(name, "name", _MODEL)),
        engine=engine,
        dtype=dtype,
        device=device,
        max_length=max_length,
        tokens_per_batch=tokens_per_batch,
        directory=graph_directory(str(name), engine),
    )
    return Classifier(str(name), made)


class _OneAtATime:
    """An engine that threads use one after another."""

    def __init__(self, engine: ForwardEngine) -> None:
        self.engine = engine
        self._lock = threading.Lock()

    @property
    def fingerprint(self) -> str:
        """That of its encoder."""
        return self.engine.fingerprint

    def encode(self, texts: Sequence[str], prefix: str = "") -> Vectors:
        """Vectors, float32 (N, D), of texts behind a prefix."""
        with self._lock:
            return self.engine.encode(texts, prefix)
