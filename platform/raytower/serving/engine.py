"""The engine behind the routes: encode → recall → fetch → rerank over the generation of a moment. No Ray, no torch.

A request works on one generation's `Parts` from its first to its last stage; `activate` puts others in place while
requests on the old ones end undisturbed. So no answer mixes generations.

Shape legend: Q queries, K candidates a query, N texts.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from raytower.annotation.classify_settings import VoteKind
from raytower.annotation.cosines import pair_cosines
from raytower.annotation.deciding import Decider
from raytower.annotation.labels import (
    DOCUMENTS_AT_ONCE,
    WIDER,
    Prediction,
    count_votes,
    label_logits,
    label_of,
    needs_more,
    rank_labels,
)
from raytower.errors import InputError
from raytower.index.table import TEXT, Document
from raytower.retrieval.ranking import Ranking, rank
from raytower.retrieval.retriever import EncodedQueries, Hit
from raytower.serving.calls import (
    ClassifyAnswer,
    ClassifyCall,
    ClassifyMode,
    DocumentAnswer,
    EmbedAnswer,
    EmbedCall,
    Mode,
    RerankAnswer,
    RerankCall,
    SearchAnswer,
    SearchCall,
    ServedCollection,
    SimilarityAnswer,
    SimilarityCall,
    TokenCounts,
)
from raytower.serving.costs import Admission, Ticket
from raytower.serving.errors import (
    NotConfiguredError,
    NotFiniteError,
    NotFoundError,
    NotReadyError,
    OutOfTimeError,
    OverloadedError,
    UnprocessableError,
)
from raytower.serving.forwards import Lane
from raytower.serving.generation import Generation
from raytower.serving.parts import Pairs, Parts, Recalled, Scored, Vectors
from raytower.serving.work import Deadline

# What a search may take of forward passes and still go before bulk work.
_URGENT_S = 2.0
# What one query's words take beside forward passes; measured at 200,000 documents.
_WORDS_S = 0.006
_WARM_UP_MS = 60_000
_CHECK_MS = 5_000
# What is left of a search's time once it has been reranked, at least: fetching, sending. More, where fetching the
# candidates' texts took long, for a busy machine will be as slow again.
_AFTER_RERANK_MS = 15
_FETCHES_AFTER_RERANK = 3
# As `raytower classify` has them by default.
_TEMPERATURE, _NEIGHBOURS, _LABEL_DEPTH = 0.05, 10, 20
_WARM_UP = SearchCall(queries=("warm up",), k=1, recall_k=2, rerank=True)
OpenParts = Callable[[Generation], Parts]
Render = Callable[[str, SearchCall, SearchAnswer], bytes]


class EngineMetrics(Protocol):
    """What an engine counts."""

    def admitted(self, lane: str) -> None: ...

    def refused(self, lane: str, reason: str) -> None: ...

    def serves(self, collection: str, *, index_version: str, generation: str, rows: int) -> None: ...


@dataclass(frozen=True, kw_only=True)
class EngineLimits:
    """How much work an engine takes on."""

    max_requests: int = 256
    """Requests that are worked on or wait, whatever they cost."""
    max_wait_ms: int = 250
    """Longest that a search may be expected to wait for those before it."""


class SearchEngine:
    """Answers the calls of `calls.Engine`; all of them on one event loop."""

    def __init__(
        self,
        collections: Sequence[str],
        open_parts: OpenParts,
        *,
        limits: EngineLimits | None = None,
        render: Render | None = None,
        metrics: EngineMetrics | None = None,
    ) -> None:
        """`open_parts` loads a generation in a thread; `render` makes the JSON of an answer, which is warmed too."""
        limits = limits or EngineLimits()
        self.collections = tuple(collections)
        self._open_parts = open_parts
        self._render = render
        self._metrics = metrics
        self._active: dict[str, Parts] = {}
        self._prepared: dict[str, Parts] = {}
        self._loading = asyncio.Lock()
        self.admission = Admission(limits.max_requests, limits.max_wait_ms / 1000)

    # --- generations ------------------------------------------------------------------------------------------

    async def prepare(self, generation: Generation) -> None:
        """Load a generation beside the one that is served, and send a query through it to its JSON.

        Raises:
            InputError, FormatError: no such index or model, another encoder made the index, a file is damaged.
        """
        async with self._loading:
            if generation.id in self._prepared or self._is_active(generation.id):
                return
            parts = await asyncio.to_thread(self._open_parts, generation)
            # A model's first pass is slow, so it is made here and not in a user's request.
            for mode in parts.warm_modes:
                await self._try(parts, _WARM_UP_MS, mode)
            self._prepared[generation.id] = parts

    def activate(self, generation_id: str) -> None:
        """Serve a prepared generation from the next request on. Raises NotReadyError where it is not prepared."""
        if self._is_active(generation_id):
            return
        parts = self._prepared.pop(generation_id, None)
        if parts is None:
            raise NotReadyError(f"generation {generation_id} is not prepared here")
        generation = parts.generation
        self._active[generation.collection] = parts
        if self._metrics is not None:
            self._metrics.serves(
                generation.collection,
                index_version=generation.index_version,
                generation=generation.id,
                rows=parts.recall.rows,
            )

    def drop(self, generation_id: str) -> None:
        """Forget a prepared generation that will not be served."""
        self._prepared.pop(generation_id, None)

    def active(self) -> dict[str, Generation]:
        """What each collection serves; those that serve nothing yet are left out."""
        return {name: parts.generation for name, parts in self._active.items()}

    def prepared(self) -> dict[str, Generation]:
        """What could be served next, by id."""
        return {name: parts.generation for name, parts in self._prepared.items()}

    def _is_active(self, generation_id: str) -> bool:
        return any(parts.generation.id == generation_id for parts in self._active.values())

    # --- calls ------------------------------------------------------------------------------------------------

    def served(self, collection: str) -> ServedCollection:
        """What a collection serves now. Raises NotFoundError, NotReadyError."""
        parts = self._parts(collection)
        generation = parts.generation
        return ServedCollection(
            name=collection,
            generation=generation.id,
            index_version=generation.index_version,
            rows=parts.recall.rows,
            kind=parts.kind,
            metric=parts.metric,
            encoder=parts.encoder.served,
            reranker=parts.scorer.served if parts.scorer else None,
            classifier=parts.classifier.served if parts.classifier else None,
            recall=parts.measured_recall,
            columns=parts.recall.columns,
            modes=generation.modes,
            classify_modes=generation.classify_modes,
        )

    async def search(self, collection: str, call: SearchCall, deadline: Deadline) -> SearchAnswer:
        """Recall among the documents that the call's filter lets through, and rerank.

        Raises:
            UnprocessableError: a filter, a field or a mode that the collection does not have. Else as `calls.Engine`.
        """
        parts = self._parts(collection)
        self._check(parts, call)
        reranks = call.rerank and parts.scorer is not None
        cost_s = 0.0 if call.mode == "lexical" else parts.encoder.predict(call.queries, Lane.QUERY)
        cost_s += 0.0 if call.mode == "dense" else _WORDS_S * len(call.queries)
        if reranks and parts.scorer is not None:
            pairs = len(call.queries) * min(call.recall_k, parts.recall.rows)
            # A search that is short of time reranks less, so no more than its time is reckoned.
            cost_s += min(parts.scorer.predict(pairs, Lane.RERANK), deadline.remaining_s() / 2)
        urgent = cost_s <= _URGENT_S
        with self._admit(cost_s, deadline, urgent=urgent):
            return await self._search(parts, call, deadline, urgent=urgent)

    async def embed(self, collection: str, call: EmbedCall, deadline: Deadline) -> EmbedAnswer:
        """Vectors of texts. Raises UnprocessableError for token ids that the encoder does not have."""
        parts = self._parts(collection)
        texts = list(call.texts) or parts.encoder.decode(call.token_ids)
        generation = parts.generation
        prefix = {
            "query": generation.query_prefix,
            "document": generation.document_prefix,
            None: "",
        }[call.role]
        lane = Lane.QUERY if len(texts) == 1 else Lane.BULK
        with self._admit(parts.encoder.predict(texts, lane), deadline, urgent=lane != Lane.BULK):
            # What is embedded as a document is cut as the index's own documents were.
            length = generation.document_max_length if call.role == "document" else None
            encoded = await parts.encoder.encode(texts, prefix, lane, deadline, length)
        return EmbedAnswer(
            generation=generation.id,
            index_version=generation.index_version,
            counts=encoded.counts,
            model=parts.encoder.served.name,
            vectors=encoded.vectors,
        )

    async def rerank(self, collection: str, call: RerankCall, deadline: Deadline) -> RerankAnswer:
        """The reranker's logits. Raises NotConfiguredError without one."""
        parts = self._parts(collection)
        if parts.scorer is None:
            raise NotConfiguredError(
                f"collection {collection!r} has no reranker; start the server with `reranker` set"
            )
        with self._admit(parts.scorer.predict(len(call.documents), Lane.BULK), deadline, urgent=False):
            scored = await _score(parts, Pairs([call.query], [call.documents], Lane.BULK), deadline)
        return RerankAnswer(
            generation=parts.generation.id,
            index_version=parts.generation.index_version,
            counts=scored.counts,
            model=parts.scorer.served.name,
            logits=scored.logits[0],
        )

    async def similarity(self, collection: str, call: SimilarityCall, deadline: Deadline) -> SimilarityAnswer:
        """Cosines of pairs of texts: the first text as a query, the second as a document.

        Raises:
            UnprocessableError: a text whose vector is zero, which has no cosine with anything.
        """
        parts = self._parts(collection)
        generation = parts.generation
        sides = [[pair[side] for pair in call.pairs] for side in (0, 1)]
        lane = Lane.QUERY if len(call.pairs) == 1 else Lane.BULK
        with self._admit(
            parts.encoder.predict([*sides[0], *sides[1]], lane), deadline, urgent=lane != Lane.BULK
        ):
            first, second = await asyncio.gather(
                parts.encoder.encode(sides[0], generation.query_prefix, lane, deadline),
                parts.encoder.encode(sides[1], generation.document_prefix, lane, deadline),
            )
        return SimilarityAnswer(
            generation=generation.id,
            index_version=generation.index_version,
            counts=first.counts + second.counts,
            model=parts.encoder.served.name,
            scores=_cosines(first.vectors, second.vectors),
        )

    async def classify(self, collection: str, call: ClassifyCall, deadline: Deadline) -> ClassifyAnswer:
        """Labels of texts, by the classifier, by the nearest label texts or by votes.

        Raises:
            NotConfiguredError: the collection does not have this mode, or none.
        """
        parts = self._parts(collection)
        modes = parts.generation.classify_modes
        mode = call.mode or (modes[0] if modes else None)
        if mode is None or mode not in modes:
            has = f"it has {', '.join(modes)}" if modes else "it has no classification"
            raise NotConfiguredError(
                f"collection {collection!r} does not classify by {mode or 'anything'}; {has}"
            )
        lane = Lane.QUERY if len(call.texts) == 1 else Lane.BULK
        model = parts.classifier if mode == "classifier" else parts.encoder
        if model is None:
            raise NotConfiguredError(f"collection {collection!r} has no classifier")
        with self._admit(model.predict(call.texts, lane), deadline, urgent=lane != Lane.BULK):
            if mode == "classifier":
                labels, counts = await _by_classifier(parts, call, lane, deadline)
            else:
                labels, counts = await _by_index(parts, call, mode, lane, deadline)
        return ClassifyAnswer(
            generation=parts.generation.id,
            index_version=parts.generation.index_version,
            counts=counts,
            model=model.served.name,
            mode=mode,
            labels=labels,
        )

    async def document(self, collection: str, id: str, deadline: Deadline) -> DocumentAnswer:
        """The document with an id; its text is None where there is none."""
        parts = self._parts(collection)
        found = await parts.recall.find(id, deadline)
        return DocumentAnswer(
            generation=parts.generation.id,
            index_version=parts.generation.index_version,
            id=id,
            text=found.text if found else None,
            metadata=found.metadata if found else None,
        )

    async def check(self) -> None:
        """Send a query through every collection to its answer's JSON. Raises what the first to fail raised.

        One that is late while requests are answered says that there is much to do: replaced for it, a process would
        leave its work to others that have as much.
        """
        answered = self.admission.answered
        for collection in self.collections:
            try:
                parts = self._parts(collection)
                await self._try(parts, _CHECK_MS, parts.generation.modes[0])
            except OutOfTimeError:
                if self.admission.answered == answered:
                    raise

    # --- stages -----------------------------------------------------------------------------------------------

    def _parts(self, collection: str) -> Parts:
        parts = self._active.get(collection)
        if parts is not None:
            return parts
        if collection not in self.collections:
            raise NotFoundError(
                f"there is no collection {collection!r} here; there are {', '.join(self.collections)}"
            )
        raise NotReadyError(
            f"collection {collection!r} is still being loaded; try again", headers={"Retry-After": "1"}
        )

    def _admit(self, cost_s: float, deadline: Deadline, *, urgent: bool) -> Ticket:
        lane = "urgent" if urgent else "bulk"
        try:
            ticket = self.admission.admit(cost_s, deadline, urgent=urgent)
        except OverloadedError:
            if self._metrics is not None:
                self._metrics.refused(lane, "overload")
            raise
        if self._metrics is not None:
            self._metrics.admitted(lane)
        return ticket

    async def _try(self, parts: Parts, timeout_ms: int, mode: Mode) -> None:
        """A query through a generation's parts to its JSON, whatever else there is to do."""
        call = replace(_WARM_UP, mode=mode)
        answer = await self._search(parts, call, Deadline.after(timeout_ms), urgent=True)
        if self._render is not None:
            self._render(parts.generation.collection, call, answer)

    @staticmethod
    def _check(parts: Parts, call: SearchCall) -> None:
        if call.mode not in parts.generation.modes:
            raise UnprocessableError(
                f"mode: is {call.mode!r}; this collection's index has no lexical side, so it must be 'dense'"
            )
        known = parts.recall.columns
        for name in call.fields or ():
            if name not in known:
                raise UnprocessableError(
                    f"fields: there is no column {name!r}; this collection has {', '.join(known)}"
                )
        if call.filter is not None:
            try:
                parts.recall.check_filter(call.filter)
            except InputError as error:
                raise UnprocessableError(str(error)) from error

    async def _search(
        self, parts: Parts, call: SearchCall, deadline: Deadline, *, urgent: bool
    ) -> SearchAnswer:
        lane = Lane.QUERY if urgent else Lane.BULK
        reranks = call.rerank and parts.scorer is not None
        clock = _Stages()
        deadline.check()
        encoded = None
        if call.mode != "lexical":
            prefix = parts.generation.query_prefix
            encoded = await parts.encoder.encode(call.queries, prefix, lane, deadline)
        clock.ended("encode")
        depth = max(call.k, call.recall_k) if reranks else call.k
        queries = EncodedQueries(call.queries, encoded.vectors if encoded else None)
        recalled = await _recall(parts, call, queries, depth, deadline)
        rows = [row[row >= 0] for row in recalled.rows]
        clock.ended("recall")
        scored = None
        if reranks:
            scored = await self._rerank(parts, call, rows, deadline, urgent=urgent, clock=clock)
        clock.ended("rerank")
        none = np.empty(0, np.float32)
        # Constants for the recall scores of one mode do not fit those of another.
        fusion = parts.fusion if parts.fusion is not None and parts.fusion.mode == call.mode else None
        logits = scored.logits if scored else [none] * len(rows)
        rankings = [
            rank(recalled.scores[query, : len(found)], logits[query], fusion, call.k)
            for query, found in enumerate(rows)
        ]
        documents = await _fetch(parts, call, rows, rankings, deadline)
        clock.ended("fetch")
        return SearchAnswer(
            generation=parts.generation.id,
            index_version=parts.generation.index_version,
            counts=(encoded.counts if encoded else TokenCounts())
            + (scored.counts if scored else TokenCounts()),
            mode=call.mode,
            wordless=recalled.wordless,
            hits=[
                _hits(recalled, query, ranking, logits[query], documents[query])
                for query, ranking in enumerate(rankings)
            ],
            timings_ms=clock.timings_ms,
            recall_ranks=[(ranking.places + 1).tolist() for ranking in rankings],
            reranked_k=scored.depth if scored else 0,
            missing_shards=recalled.missing,
        )

    @staticmethod
    async def _rerank(
        parts: Parts,
        call: SearchCall,
        rows: Sequence[NDArray[np.int64]],
        deadline: Deadline,
        *,
        urgent: bool,
        clock: _Stages,
    ) -> Scored | None:
        """Logits of the first candidates, as many as the time allows; None where it allows none."""
        heads = [found[: call.recall_k] for found in rows]
        try:
            fetched = await parts.recall.documents(
                np.concatenate([np.empty(0, np.int64), *heads]), [TEXT], deadline
            )
            clock.ended("fetch")
            texts = iter([document.text for document in fetched])
            pairs = Pairs(
                call.queries,
                [[next(texts) for _ in head] for head in heads],
                Lane.RERANK if urgent else Lane.BULK,
                may_shorten=True,
            )
            scored = await _score(parts, pairs, deadline.earlier(_reserve_ms(clock, deadline)))
        except OutOfTimeError:
            return None  # the order of recall is still an answer
        return scored if scored.depth else None


async def _score(parts: Parts, pairs: Pairs, deadline: Deadline) -> Scored:
    """Raises NotFiniteError: no order can be told from such logits, and that of recall would pass for theirs."""
    assert parts.scorer is not None
    scored = await parts.scorer.score(pairs, deadline)
    if not all(np.isfinite(logits).all() for logits in scored.logits):
        raise NotFiniteError(
            f"reranker {parts.scorer.served.name!r} gave a logit that is not a number (NaN or infinity); its weights "
            f"are damaged; generation {parts.generation.id}"
        )
    return scored


async def _recall(
    parts: Parts, call: SearchCall, queries: EncodedQueries, depth: int, deadline: Deadline
) -> Recalled:
    if call.mode == "lexical":
        return await parts.recall.search_lexical(queries.texts, depth, call.filter, deadline)
    if call.mode == "hybrid":
        return await parts.recall.search_hybrid(queries, depth, call.filter, parts.hybrid, deadline)
    assert queries.vectors is not None, "only mode lexical does without vectors"
    return await parts.recall.search(queries.vectors, depth, call.filter, deadline)


def _reserve_ms(clock: _Stages, deadline: Deadline) -> int:
    """Milliseconds to leave for what follows reranking; at most half of the time that is left."""
    reserve = max(_AFTER_RERANK_MS, _FETCHES_AFTER_RERANK * clock.timings_ms["fetch"])
    return int(min(reserve, deadline.remaining_s() * 500))


class _Stages:
    """Milliseconds of each stage."""

    def __init__(self) -> None:
        self.timings_ms = dict.fromkeys(("encode", "recall", "fetch", "rerank"), 0.0)
        self._since = time.perf_counter()

    def ended(self, stage: str) -> None:
        now = time.perf_counter()
        self.timings_ms[stage] += (now - self._since) * 1000
        self._since = now


async def _fetch(
    parts: Parts,
    call: SearchCall,
    rows: Sequence[NDArray[np.int64]],
    rankings: Sequence[Ranking],
    deadline: Deadline,
) -> list[list[Document]]:
    """The documents of each query's hits, in one call: query by query costs more than the search."""
    wanted = [found[ranking.places] for found, ranking in zip(rows, rankings, strict=True)]
    fields = (
        call.fields
        if call.fields is not None
        else tuple(name for name in parts.recall.columns if name != "id")
    )
    columns = [name for name in fields if name != "id"]
    flat = np.concatenate([np.empty(0, np.int64), *wanted])
    fetched = iter(await parts.recall.documents(flat, columns, deadline))
    return [[next(fetched) for _ in found] for found in wanted]


def _hits(
    recalled: Recalled,
    query: int,
    ranking: Ranking,
    logits: NDArray[np.float32],
    documents: Sequence[Document],
) -> list[Hit]:
    hits = []
    for number, (place, score, document) in enumerate(
        zip(ranking.places.tolist(), ranking.scores.tolist(), documents, strict=True), start=1
    ):
        logit = float(logits[place]) if place < len(logits) else None
        recall_score = float(recalled.scores[query, place])
        hits.append(Hit(document.id, document.text, document.metadata, recall_score, logit, score, number))
    return hits


def _cosines(first: NDArray[np.float32], second: NDArray[np.float32]) -> NDArray[np.float32]:
    """Cosines (N,) of vectors (N, D) with vectors (N, D)."""
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise NotFiniteError("the encoder gave a vector that holds NaN or infinity; its weights are damaged")
    try:
        return pair_cosines(first, second).astype(np.float32)
    except InputError as error:
        raise UnprocessableError(str(error)) from error


async def _by_classifier(
    parts: Parts, call: ClassifyCall, lane: Lane, deadline: Deadline
) -> tuple[list[list[tuple[str, float]]], TokenCounts]:
    assert parts.classifier is not None
    settings = parts.generation.settings_of("classifier")
    logits, counts = await parts.classifier.logits(call.texts, lane, deadline)
    try:
        depth = call.top_k if settings is None else settings.depth
        ranked = label_logits(parts.classifier.served.labels, logits, depth)
    except InputError as error:
        raise NotFiniteError(str(error)) from error
    return _decided(Decider.of("classifier", settings), ranked, call.top_k), counts


async def _by_index(
    parts: Parts, call: ClassifyCall, mode: ClassifyMode, lane: Lane, deadline: Deadline
) -> tuple[list[list[tuple[str, float]]], TokenCounts]:
    """By the labels of the nearest documents; see `raytower.annotation.labels`."""
    assert mode != "classifier"
    settings = parts.generation.settings_of(mode)
    encoded = await parts.encoder.encode(call.texts, parts.generation.query_prefix, lane, deadline)
    if mode == "votes":
        depth = _NEIGHBOURS if settings is None else settings.depth
        found = await _neighbours(parts, encoded.vectors, depth, mode, deadline)
        temperature = _TEMPERATURE if settings is None else settings.temperature or 1.0
        kind: VoteKind = "similarity" if settings is None or settings.votes is None else settings.votes
        ranked = [count_votes(row, temperature, kind) for row in found]
    else:
        depth = max(call.top_k, _LABEL_DEPTH) if settings is None else settings.depth
        found = await _labels(parts, encoded.vectors, min(depth, parts.generation.num_labels), deadline)
        ranked = [rank_labels(row)[:depth] for row in found]
    return _decided(Decider.of(mode, settings), ranked, call.top_k), encoded.counts


async def _labels(
    parts: Parts, vectors: Vectors, num_labels: int, deadline: Deadline
) -> list[list[tuple[str, float]]]:
    """Label and score of so many of the nearest documents that there are `num_labels` labels among them."""
    depth = max(num_labels, 1)
    found = await _neighbours(parts, vectors, depth, "labels", deadline)
    while depth < parts.recall.rows and (short := needs_more(found, num_labels)):
        depth = min(WIDER * depth, parts.recall.rows)
        at_once = max(1, DOCUMENTS_AT_ONCE // depth)
        for start in range(0, len(short), at_once):
            rows = short[start : start + at_once]
            wider = await _neighbours(parts, vectors[rows], depth, "labels", deadline)
            for row, each in zip(rows, wider, strict=True):
                found[row] = each
    return found


async def _neighbours(
    parts: Parts, vectors: Vectors, depth: int, mode: Literal["labels", "votes"], deadline: Deadline
) -> list[list[tuple[str, float]]]:
    """Label and score of the `depth` nearest documents of each vector, best first."""
    field = parts.generation.label_field
    columns = [name for name in (TEXT, field) if name in parts.recall.columns]
    recalled = await parts.recall.search(vectors, depth, None, deadline)
    found = [row[row >= 0] for row in recalled.rows]
    documents = iter(await parts.recall.documents(np.concatenate(found), columns, deadline))
    neighbours = []
    for row, scores in zip(found, recalled.scores, strict=True):
        own = []
        for _, score in zip(row, scores.tolist(), strict=False):
            document = next(documents)
            try:
                label = label_of(document.id, document.text, document.metadata, field, mode)
            except InputError as error:
                raise UnprocessableError(str(error)) from error
            own.append((label, score))
        neighbours.append(own)
    return neighbours


def _decided(
    decider: Decider, ranked: Sequence[Sequence[Prediction]], top_k: int
) -> list[list[tuple[str, float]]]:
    """The first labels with their final scores; none of a text that is not sure enough of any."""
    decisions = [decider.decide(row) for row in ranked]
    return [
        [] if each.label is None else [(item.label, item.score) for item in each.ranked[:top_k]]
        for each in decisions
    ]
