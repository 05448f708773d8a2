"""An engine without models: three documents in one collection, one in another; what it was asked is kept."""

from __future__ import annotations

import datetime
import decimal
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from raytower.retrieval.retriever import Hit
from raytower.serving.calls import (
    ClassifyAnswer,
    ClassifyCall,
    DocumentAnswer,
    EmbedAnswer,
    EmbedCall,
    RerankAnswer,
    RerankCall,
    SearchAnswer,
    SearchCall,
    ServedCollection,
    ServedModel,
    SimilarityAnswer,
    SimilarityCall,
    TokenCounts,
)
from raytower.serving.errors import NotFoundError, NotReadyError
from raytower.serving.work import Deadline

TEXTS = ["月亮 moon", "sun", "star"]
METADATA: list[dict[str, Any]] = [
    {"lang": "zh", "year": 2020},
    {"lang": "en", "year": 2**62 + 1},
    {
        "raw": b"\xff\x00",
        "price": decimal.Decimal("32.90"),
        "day": datetime.date(2024, 1, 31),
        "parts": [b"a", float("nan")],
    },
]
LONGEST = 100
"""Characters, each of them a token here, that the models read of a text."""


class DummyEngine:
    """Vectors are (3, 4, 12) / 13; logits and token counts are the texts' lengths; texts beyond LONGEST are cut."""

    def __init__(self) -> None:
        self.ready = True
        self.has_reranker = True
        self.calls: list[Any] = []
        self.deadlines: list[Deadline] = []
        self.work: Callable[[], Awaitable[None]] | None = None
        self.changes: dict[str, Any] = {}
        """Fields of answers to replace."""
        self.checks = 0

    @property
    def collections(self) -> Sequence[str]:
        return ("default", "laws")

    def served(self, collection: str) -> ServedCollection:
        if collection not in self.collections:
            raise NotFoundError(collection)
        if not self.ready:
            raise NotReadyError("no index is loaded yet")
        is_default = collection == "default"
        return ServedCollection(
            name=collection,
            generation="0123456789ab",
            index_version="v7",
            rows=3,
            kind="flat",
            metric="cosine",
            encoder=ServedModel(name="org/dummy", max_length=LONGEST, dim=3, dimensions=(2,)),
            reranker=ServedModel(name="judge", max_length=LONGEST) if self.has_reranker else None,
            columns={"lang": "string", "year": "int64"},
            modes=("dense", "hybrid") if is_default else ("dense",),
            classify_modes=("labels", "votes") if is_default else (),
        )

    async def search(self, collection: str, call: SearchCall, deadline: Deadline) -> SearchAnswer:
        await self._begin(call, deadline)
        hits = [
            Hit(f"d:{row}", text, metadata, 1.0 - row, 0.5 if call.rerank else None, 2.0 - row, row + 1)
            for row, (text, metadata) in enumerate(zip(TEXTS, METADATA, strict=True))
        ][: call.k]
        answer = SearchAnswer(
            **self._facts(call.queries),
            hits=[hits for _ in call.queries],
            timings_ms={"encode": 1.0, "recall": 2.0, "fetch": 0.5, "rerank": 3.0},
            recall_ranks=[[3, 1, 2][: len(hits)] for _ in call.queries],
            reranked_k=call.recall_k if call.rerank else 0,
            mode=call.mode,
        )
        return replace(answer, **self.changes)

    async def embed(self, collection: str, call: EmbedCall, deadline: Deadline) -> EmbedAnswer:
        await self._begin(call, deadline)
        texts = call.texts or [" " * len(ids) for ids in call.token_ids]
        vectors = np.array([[3, 4, 12] for _ in texts], dtype=np.float32) / 13
        answer = EmbedAnswer(**self._facts(texts), model="org/dummy", vectors=vectors)
        return replace(answer, **self.changes)

    async def rerank(self, collection: str, call: RerankCall, deadline: Deadline) -> RerankAnswer:
        await self._begin(call, deadline)
        logits = np.array([len(text) for text in call.documents], dtype=np.float32)
        answer = RerankAnswer(**self._facts(call.documents), model="judge", logits=logits)
        return replace(answer, **self.changes)

    async def similarity(self, collection: str, call: SimilarityCall, deadline: Deadline) -> SimilarityAnswer:
        await self._begin(call, deadline)
        scores = np.array([float(first == second) for first, second in call.pairs], dtype=np.float32)
        answer = SimilarityAnswer(
            **self._facts([text for pair in call.pairs for text in pair]), model="org/dummy", scores=scores
        )
        return replace(answer, **self.changes)

    async def classify(self, collection: str, call: ClassifyCall, deadline: Deadline) -> ClassifyAnswer:
        await self._begin(call, deadline)
        labels = [("night", 0.75), ("day", 0.25)][: call.top_k]
        return ClassifyAnswer(
            **self._facts(call.texts),
            model="org/dummy",
            mode=call.mode or "labels",
            labels=[labels for _ in call.texts],
        )

    async def document(self, collection: str, id: str, deadline: Deadline) -> DocumentAnswer:
        await self._begin(id, deadline)
        row = {f"d:{row}": row for row in range(3)}.get(id)
        return DocumentAnswer(
            **self._facts([]),
            id=id,
            text=None if row is None else TEXTS[row],
            metadata=None if row is None else METADATA[row],
        )

    async def check(self) -> None:
        self.checks += 1
        if not self.ready:
            raise NotReadyError("no index is loaded yet")
        if self.work is not None:
            await self.work()

    async def _begin(self, call: Any, deadline: Deadline) -> None:
        self.calls.append(call)
        self.deadlines.append(deadline)
        if self.work is not None:
            await self.work()

    def _facts(self, texts: Sequence[str]) -> dict[str, Any]:
        counts = TokenCounts(
            tokens=sum(min(len(text), LONGEST) for text in texts),
            truncated=sum(len(text) > LONGEST for text in texts),
        )
        return {"generation": "0123456789ab", "index_version": "v7", "counts": counts}
