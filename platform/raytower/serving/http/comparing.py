"""POST /v1/similarity and /v1/classify."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field

from raytower.serving.calls import Answer, ClassifyCall, SimilarityCall
from raytower.serving.errors import NotConfiguredError, UnprocessableError
from raytower.serving.http.answers import HttpAnswer, check_finite, json_answer, usage
from raytower.serving.http.exchange import Exchange
from raytower.serving.http.requests import (
    DocumentText,
    Positive,
    Request,
    characters_of,
    check_at_most,
    check_count,
    check_texts,
    check_total,
    limit,
)
from raytower.serving.http.search import Usage
from raytower.serving.http_config import Limits

DEFAULT_TOP_K = 5
_COUNT = limit(maxItems="max_inputs")


class SimilarityRequest(Request):
    """Pairs of texts to compare."""

    examples: ClassVar = ({"pairs": [["car insurance", "motor cover"], ["car insurance", "a will"]]},)

    pairs: Annotated[
        list[Annotated[list[DocumentText], Field(min_length=2, max_length=2)]],
        Field(min_length=1, json_schema_extra=_COUNT),
    ]

    def check(self, limits: Limits) -> None:
        super().check(limits)
        check_count("pairs", len(self.pairs), limits.max_inputs)
        for number, pair in enumerate(self.pairs):
            check_texts(f"pairs.{number}", pair, limits.max_document_characters, 2)
        check_total("pairs", sum(map(characters_of, self.pairs)), limits)


class SimilarityResponse(BaseModel):
    scores: list[float] = Field(description="cosine of each pair, in order")
    model: str
    usage: Usage
    index_version: str
    generation: str


class ClassifyRequest(Request):
    """Texts to label."""

    examples: ClassVar = ({"texts": ["my car was stolen"], "top_k": 2},)

    texts: Annotated[list[DocumentText], Field(min_length=1, json_schema_extra=_COUNT)]
    top_k: Positive | None = Field(
        default=None,
        description=f"labels of each text; default {DEFAULT_TOP_K}",
        json_schema_extra=limit(maximum="max_k"),
    )
    mode: Literal["classifier", "labels", "votes"] | None = Field(
        default=None,
        description="by a trained classifier, by the nearest label text, or by the labels of the nearest documents; "
        "default the first that the collection has",
    )

    def check(self, limits: Limits) -> None:
        super().check(limits)
        check_texts("texts", self.texts, limits.max_document_characters, limits.max_inputs)
        check_total("texts", characters_of(self.texts), limits)
        if self.top_k is not None:
            check_at_most("top_k", self.top_k, limits.max_k)


class LabelScore(BaseModel):
    label: str
    score: float


class ClassifyResponse(BaseModel):
    mode: Literal["classifier", "labels", "votes"]
    model: str
    results: list[list[LabelScore]] = Field(
        description="labels of each text, best first; none where tuned settings find none sure enough"
    )
    usage: Usage
    index_version: str
    generation: str


async def similarity(exchange: Exchange) -> HttpAnswer:
    """Compare pairs of texts by the cosine of their vectors."""
    request = await exchange.read(SimilarityRequest)
    deadline = exchange.deadline(request.timeout_ms)
    call = SimilarityCall(pairs=[(first, second) for first, second in request.pairs])
    exchange.served()
    answer = await exchange.ask(exchange.engine.similarity, call, deadline)
    check_finite("a cosine", answer.scores, answer)
    return json_answer(
        {"scores": answer.scores.tolist(), "model": answer.model, **_facts(answer)},
        answer,
    )


async def classify(exchange: Exchange) -> HttpAnswer:
    """Label texts."""
    request = await exchange.read(ClassifyRequest)
    deadline = exchange.deadline(request.timeout_ms)
    served = exchange.served()
    if not served.classify_modes:
        raise NotConfiguredError(f"collection {served.name!r} has neither a classifier nor labels")
    if request.mode is not None and request.mode not in served.classify_modes:
        raise UnprocessableError(
            f"mode: is {request.mode!r}; collection {served.name!r} has {', '.join(served.classify_modes)}"
        )
    top_k = request.top_k or min(DEFAULT_TOP_K, exchange.config.limits.max_k)
    call = ClassifyCall(texts=request.texts, top_k=top_k, mode=request.mode)
    answer = await exchange.ask(exchange.engine.classify, call, deadline)
    check_finite("a score", [score for labels in answer.labels for _, score in labels], answer)
    results = [
        [{"label": label, "score": float(score)} for label, score in labels] for labels in answer.labels
    ]
    return json_answer(
        {"mode": answer.mode, "model": answer.model, "results": results, **_facts(answer)}, answer
    )


def _facts(answer: Answer) -> dict[str, Any]:
    return {
        "usage": usage(answer.counts),
        "index_version": answer.index_version,
        "generation": answer.generation,
    }
