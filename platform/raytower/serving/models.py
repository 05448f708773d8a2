"""The models of a process, shared by concurrent requests and by generations.

Shape legend: N texts or pairs, D embedding dimension, C labels.
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from raytower.data.plain_labels import plain_label
from raytower.errors import InputError
from raytower.models.cross_encoder import CrossEncoder, CrossScorer
from raytower.models.directory import resolve_model
from raytower.models.encoder import Encoder, read_encoder_info
from raytower.models.engine_choice import graph_directory
from raytower.models.forward import ForwardEngine
from raytower.models.text_classifier import ClassifierEngine, TextClassifier
from raytower.models.token_block import Ids, TokenBlock
from raytower.serving.calls import ServedModel, TokenCounts
from raytower.serving.errors import OutOfTimeError, UnprocessableError
from raytower.serving.forwards import Forwards, Lane, ModelForwards
from raytower.serving.generation import ComputeEntry, Generation, ModelEntry
from raytower.serving.parts import Encoded, Pairs, Scored
from raytower.serving.work import Deadline

# So many characters are tokenised in the event loop at most; a thread's turn costs more than that.
_INLINE_CHARACTERS = 4_096
# A tokenizer serves one thread at a time, so that a request's long texts are tokenised in runs of so many.
_CHARACTERS_AT_ONCE = 65_536
# Of what was learned about lengths, this share is forgotten with each request.
_FORGETTING = 0.05
# What is left of a search's time for everything behind its reranking.
_AFTER_RERANK_S = 0.02
# The first candidates of a search, which are reranked first.
_FIRST_RUN = 8
# When a model is loaded, the time of a pass over this passage is measured.
_PASSAGE = "The invoice of March was paid twice; the second payment is returned within fourteen days. " * 6
# Tokenises some rows of a request, cut to a length.
Tokenise = Callable[[Sequence[int], int], TokenBlock]
_ModelT = TypeVar("_ModelT", bound="SharedModel")


class SharedModel(ABC):
    """Rows through one model: tokenised by one thread at a time, computed with those of other requests."""

    def __init__(
        self, entry: ModelEntry, compute: ComputeEntry, forwards: Forwards, tokenisers: ThreadPoolExecutor
    ) -> None:
        """Load the model of an entry, and take the time of a pass over a passage."""
        directory = graph_directory(entry.uri, compute.engine)
        self._engine = self._load(
            entry.uri, compute, engine=compute.engine, dtype=compute.dtype, directory=directory
        )
        self.fingerprint: str = self._engine.fingerprint
        self.served = self._describe(entry.uri)
        self._passes = ModelForwards(self.served.name, self._engine, forwards)
        self._tokenisers = tokenisers
        self._lock = threading.Lock()
        # Seen last: tokens of a row, and tokens for each character.
        self._tokens_a_row = min(64.0, float(self._engine.max_length))
        self._tokens_a_character = 0.5
        self._passes.calibrate(self._passage())

    @abstractmethod
    def _load(self, uri: str, compute: ComputeEntry, **settings: Any) -> Any:
        """The engine of a model; `settings` are the arguments that every engine is made with."""

    @abstractmethod
    def _describe(self, uri: str) -> ServedModel:
        """The model as callers see it."""

    @abstractmethod
    def _passage(self) -> TokenBlock:
        """One row of the length of a passage."""

    async def _compute(
        self,
        tokenise: Tokenise,
        sizes: Sequence[int],
        lane: Lane,
        deadline: Deadline,
        max_length: int | None = None,
    ) -> tuple[NDArray[np.float32], TokenCounts]:
        length = max_length or self._engine.max_length
        block = await self._tokenised(tokenise, sizes, length)
        counts = await self._counted(block, tokenise, sizes, length)
        return await self._passes.compute(block, lane, deadline), counts

    async def _tokenised(self, tokenise: Tokenise, sizes: Sequence[int], length: int) -> TokenBlock:
        """All rows, of so many characters each; `tokenise` is given rows and the length to cut them to."""
        if sum(sizes) <= _INLINE_CHARACTERS and self._lock.acquire(blocking=False):
            try:
                block = tokenise(range(len(sizes)), length)
            finally:
                self._lock.release()
        else:
            block = await self._in_thread(tokenise, range(len(sizes)), sizes, length)
        self._learn(block, sum(sizes))
        return block

    async def _counted(
        self, block: TokenBlock, tokenise: Tokenise, sizes: Sequence[int], length: int
    ) -> TokenCounts:
        """Tokens, and how many rows were cut: those that one token more of room makes longer."""
        full = np.flatnonzero(block.lengths >= length).tolist()
        longer = await self._in_thread(tokenise, full, [sizes[row] for row in full], length + 1)
        return TokenCounts(tokens=len(block.ids), truncated=int((longer.lengths > length).sum()))

    async def _in_thread(
        self, tokenise: Tokenise, rows: Sequence[int], sizes: Sequence[int], length: int
    ) -> TokenBlock:
        loop = asyncio.get_running_loop()
        return TokenBlock.join(
            [
                await loop.run_in_executor(self._tokenisers, self._locked, tokenise, rows[run], length)
                for run in _runs(sizes)
            ]
        )

    def _locked(self, tokenise: Tokenise, rows: Sequence[int], length: int) -> TokenBlock:
        with self._lock:
            return tokenise(rows, length)

    def _learn(self, block: TokenBlock, characters: int) -> None:
        if len(block) and characters:
            keep = 1 - _FORGETTING
            self._tokens_a_row = keep * self._tokens_a_row + _FORGETTING * len(block.ids) / len(block)
            self._tokens_a_character = (
                keep * self._tokens_a_character + _FORGETTING * len(block.ids) / characters
            )

    def predict(self, texts: Sequence[str], lane: Lane) -> float:
        """Seconds of forward passes that the texts would take."""
        limit = self._engine.max_length
        tokens = sum(min(2 + len(text) * self._tokens_a_character, limit) for text in texts)
        return self._passes.predict_tokens(int(tokens), len(texts), lane)


class SharedEncoder(SharedModel):
    """One encoder."""

    def _load(self, uri: str, compute: ComputeEntry, **settings: Any) -> ForwardEngine:
        return ForwardEngine(Encoder.load(uri), max_length=compute.max_length, **settings)

    def _describe(self, uri: str) -> ServedModel:
        return ServedModel(
            name=model_name(uri),
            max_length=self._engine.max_length,
            dim=self._engine.dim,
            dimensions=trained_dimensions(uri),
        )

    def _passage(self) -> TokenBlock:
        engine: ForwardEngine = self._engine
        return engine.tokenise([_PASSAGE])

    async def encode(
        self, texts: Sequence[str], prefix: str, lane: Lane, deadline: Deadline, max_length: int | None = None
    ) -> Encoded:
        """Vectors of the texts, with `prefix` put before each, cut to `max_length` tokens (None: the encoder's own).

        Raises OutOfTimeError.
        """
        engine: ForwardEngine = self._engine
        encoder, prepared = engine.encoder, engine.encoder.prepared(texts, prefix)

        def tokenise_rows(rows: Sequence[int], length: int) -> TokenBlock:
            return encoder.tokenise([texts[row] for row in rows], length, prefix)

        sizes = [len(text) for text in prepared]
        vectors, counts = await self._compute(tokenise_rows, sizes, lane, deadline, max_length)
        return Encoded(vectors, counts)

    def decode(self, token_ids: Sequence[Sequence[int]]) -> list[str]:
        """The texts that lists of this model's token ids stand for. Raises UnprocessableError for ids it has not."""
        tokenizer = self._engine.encoder.tokenizer
        size = len(tokenizer)
        for number, ids in enumerate(token_ids):
            wrong = next((token for token in ids if not 0 <= token < size), None)
            if wrong is not None:
                raise UnprocessableError(
                    f"input.{number}: token id {wrong} is none of this model's 0 to {size - 1}; send texts, or ids of "
                    "its own tokenizer"
                )
        with self._lock:
            return [str(tokenizer.decode(list(ids), skip_special_tokens=True)) for ids in token_ids]


class SharedScorer(SharedModel):
    """One reranker."""

    def _load(self, uri: str, compute: ComputeEntry, **settings: Any) -> CrossScorer:
        return CrossScorer(CrossEncoder.load(uri), max_length=compute.rerank_max_length, **settings)

    def _describe(self, uri: str) -> ServedModel:
        return ServedModel(name=model_name(uri), max_length=self._engine.max_length)

    def _passage(self) -> TokenBlock:
        engine: CrossScorer = self._engine
        return engine.model.tokenise([["paid twice"], [_PASSAGE]], engine.max_length)

    def predict(self, num_pairs: int, lane: Lane) -> float:  # type: ignore[override]
        """Seconds of forward passes that so many pairs would take, at the length of those seen last."""
        return self._passes.predict_tokens(int(num_pairs * self._tokens_a_row), num_pairs, lane)

    async def score(self, pairs: Pairs, deadline: Deadline) -> Scored:
        """Logits of each query with its candidates. Raises OutOfTimeError."""
        candidates, lane = pairs.candidates, pairs.lane
        texts_of_pairs = [
            (query, text) for query, texts in zip(pairs.queries, candidates, strict=True) for text in texts
        ]
        places = np.array([rank for texts in candidates for rank in range(len(texts))], np.int64)
        engine: CrossScorer = self._engine

        def tokenise_rows(rows: Sequence[int], length: int) -> TokenBlock:
            columns = [[texts_of_pairs[row][side] for row in rows] for side in (0, 1)]
            return engine.model.tokenise(columns, length)

        depth = max(map(len, candidates), default=0)
        sizes = [len(query) + len(text) for query, text in texts_of_pairs]
        max_length = engine.max_length
        block = await self._tokenised(tokenise_rows, sizes, max_length)
        if pairs.may_shorten:
            depth = self._depth_in_time(block.lengths, places, depth, lane, deadline)
            values, depth = await self._first_in_time(block, places, depth, lane, deadline)
        else:
            values = await self._passes.compute(block, lane, deadline)
        kept = np.flatnonzero(places < depth)
        rows = kept.tolist()
        counts = await self._counted(
            block.take(kept),
            lambda numbers, length: tokenise_rows([rows[number] for number in numbers], length),
            [sizes[row] for row in rows],
            max_length,
        )
        logits = values[:, 0] if values.shape[1] == 1 else values[:, 1] - values[:, 0]
        ends = np.cumsum([min(len(texts), depth) for texts in candidates])[:-1]
        return Scored(np.split(logits[kept], ends) if candidates else [], depth, counts)

    async def _first_in_time(
        self, block: TokenBlock, places: Ids, depth: int, lane: Lane, deadline: Deadline
    ) -> tuple[NDArray[np.float32], int]:
        """Values of the rows, and of how many first candidates (at most `depth`) of every query they are there.

        The first are handed in first, in runs of 8, 8, 16, 32, …: where the time ends sooner than passes were expected
        to, what has been computed still counts.
        """
        ends = [end for end in (_FIRST_RUN << number for number in range(32)) if end < depth] + [depth]
        runs = [
            np.flatnonzero((places >= start) & (places < end))
            for start, end in zip([0, *ends], ends, strict=False)
        ]
        computed = await asyncio.gather(
            *(self._passes.compute(block.take(rows), lane, deadline) for rows in runs), return_exceptions=True
        )
        values = np.zeros((len(block), self._engine.width), np.float32)
        reached = 0
        for rows, end, result in zip(runs, ends, computed, strict=True):
            if isinstance(result, OutOfTimeError):
                break
            if isinstance(result, BaseException):
                raise result
            values[rows] = result
            reached = end
        return values, reached

    def _depth_in_time(self, lengths: Ids, places: Ids, depth: int, lane: Lane, deadline: Deadline) -> int:
        """The most first candidates of every query that are scored before the deadline, by what passes cost."""
        left_s = deadline.remaining_s() - _AFTER_RERANK_S - self._passes.backlog_s(lane)
        tokens = np.cumsum(np.bincount(places, weights=lengths, minlength=depth))
        rows = np.cumsum(np.bincount(places, minlength=depth))
        fits = [
            self._passes.predict_tokens(int(count), int(num_rows), lane) <= left_s
            for count, num_rows in zip(tokens, rows, strict=True)
        ]
        return depth if all(fits) else fits.index(False)


class SharedClassifier(SharedModel):
    """One text classifier."""

    def _load(self, uri: str, compute: ComputeEntry, **settings: Any) -> ClassifierEngine:
        return ClassifierEngine(TextClassifier.load(uri), **settings)

    def _describe(self, uri: str) -> ServedModel:
        labels = tuple(map(plain_label, self._engine.labels))  # as `raytower classify` says them
        return ServedModel(name=model_name(uri), max_length=self._engine.max_length, labels=labels)

    def _passage(self) -> TokenBlock:
        engine: ClassifierEngine = self._engine
        return engine.model.tokenise([[_PASSAGE]], engine.max_length)

    async def logits(
        self, texts: Sequence[str], lane: Lane, deadline: Deadline
    ) -> tuple[NDArray[np.float32], TokenCounts]:
        """Logits float32 (N, C) in the order of `served.labels`. Raises OutOfTimeError."""
        engine: ClassifierEngine = self._engine

        def tokenise_rows(rows: Sequence[int], length: int) -> TokenBlock:
            return engine.model.tokenise([[texts[row] for row in rows]], length)

        return await self._compute(tokenise_rows, [len(text) for text in texts], lane, deadline)


class ModelPool:
    """The models of this process. A model is loaded once for all generations that name it, and goes with the last."""

    def __init__(self, forwards: Forwards) -> None:
        self._forwards = forwards
        self._tokenisers = ThreadPoolExecutor(2, thread_name_prefix="raytower-tokenise")
        self._loaded: weakref.WeakValueDictionary[tuple[Any, ...], SharedModel] = (
            weakref.WeakValueDictionary()
        )
        self._lock = threading.Lock()

    def encoder(self, generation: Generation) -> SharedEncoder:
        """Raises InputError: no such model, or its weights are no longer those that the generation names."""
        compute = generation.compute.model_copy(update={"rerank_max_length": None})
        return self._get(SharedEncoder, generation.encoder, compute)

    def scorer(self, generation: Generation) -> SharedScorer | None:
        """None where the generation has no reranker. Raises InputError as `encoder`."""
        compute = generation.compute.model_copy(update={"max_length": None})
        return self._get(SharedScorer, generation.reranker, compute) if generation.reranker else None

    def classifier(self, generation: Generation) -> SharedClassifier | None:
        """None where the generation has no classifier. Raises InputError as `encoder`."""
        compute = ComputeEntry(engine=generation.compute.engine, dtype=generation.compute.dtype)
        return self._get(SharedClassifier, generation.classifier, compute) if generation.classifier else None

    def _get(self, kind: Callable[..., _ModelT], entry: ModelEntry, compute: ComputeEntry) -> _ModelT:
        key = (kind, entry, compute)
        with self._lock:
            known = self._loaded.get(key)
            if known is None:
                known = kind(entry, compute, self._forwards, self._tokenisers)
                found = getattr(known, "fingerprint", entry.fingerprint)
                if found != entry.fingerprint:
                    raise InputError(
                        f"model {entry.uri!r} has fingerprint {found} now, and {entry.fingerprint} was asked for: its "
                        "files were changed meanwhile; name the new model, so that all parts of it are taken together"
                    )
                self._loaded[key] = known
            return cast(_ModelT, known)


def model_name(uri: str) -> str:
    """The model's name as callers see it: a hub id unchanged, of a directory or a URI only the last part."""
    path = Path(uri)
    if "://" in uri:
        return uri.rstrip("/").rpartition("/")[2]
    return path.resolve().name if path.is_dir() else uri


def trained_dimensions(uri: str) -> tuple[int, ...]:
    """The leading parts of an encoder's vectors that it was trained for (matryoshka), largest first; none for most."""
    matryoshka = read_encoder_info(resolve_model(uri)).get("config", {}).get("matryoshka") or {}
    return tuple(int(dim) for dim in matryoshka.get("dims", ()))


def _runs(sizes: Sequence[int]) -> list[slice]:
    """Rows that are tokenised in one turn."""
    runs, start, held = [], 0, 0
    for row, size in enumerate(sizes):
        if held + size > _CHARACTERS_AT_ONCE and row > start:
            runs.append(slice(start, row))
            start, held = row, 0
        held += size
    return [*runs, slice(start, len(sizes))] if sizes else []
