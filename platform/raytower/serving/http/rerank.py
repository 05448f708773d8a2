"""Reranking in the shapes of Jina and Cohere (v1 and v2), and of text-embeddings-inference (`texts`)."""

from __future__ import annotations

import uuid
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictStr

from raytower.serving.calls import RerankAnswer, RerankCall
from raytower.serving.errors import NotConfiguredError, UnprocessableError
from raytower.serving.http.answers import HttpAnswer, check_finite, json_answer, usage
from raytower.serving.http.embeddings import cohere_meta, refuse_cut_texts
from raytower.serving.http.exchange import Exchange
from raytower.serving.http.requests import (
    ClientRequest,
    DocumentText,
    QueryText,
    WholeNumber,
    characters_of,
    check_text,
    check_texts,
    check_total,
    limit,
)
from raytower.serving.http.search import Usage
from raytower.serving.http_config import Limits

_EXCLUSIVE: list[Any] = [
    {"required": ["documents"], "properties": {"documents": {"type": "array"}, "texts": {"type": "null"}}},
    {"required": ["texts"], "properties": {"texts": {"type": "array"}, "documents": {"type": "null"}}},
]


class RerankText(BaseModel):
    """A text inside an object, as some clients send it; what else they put there is ignored."""

    model_config = ConfigDict(frozen=True)

    text: DocumentText


class RerankRequest(ClientRequest):
    """Jina's and Cohere's shape with `documents`, that of text-embeddings-inference with `texts`.

    `relevance_score` is the logistic of the reranker's logit, 0 to 1.
    """

    model_config = ConfigDict(json_schema_extra={"oneOf": _EXCLUSIVE})
    examples: ClassVar = (
        {
            "query": "who pays",
            "documents": ["a will names who inherits", {"text": "a pet policy"}],
            "top_n": 1,
        },
        {"query": "who pays", "texts": ["a will names who inherits"], "return_text": True},
    )

    query: QueryText
    documents: Annotated[
        list[DocumentText | RerankText] | None,
        Field(min_length=1, json_schema_extra=limit(maxItems="max_documents")),
    ] = None
    texts: Annotated[
        list[DocumentText] | None,
        Field(min_length=1, json_schema_extra=limit(maxItems="max_documents")),
    ] = Field(default=None, description="in place of `documents`; the answer is then a bare list")
    model: StrictStr | None = None
    top_n: WholeNumber | None = Field(default=None, description="default, and 0: all documents")
    return_documents: StrictBool | None = Field(default=None, description="default false")
    return_text: StrictBool | None = Field(default=None, description="with `texts`; default false")
    raw_scores: StrictBool | None = Field(
        default=None, description="with `texts`: logits in place of 0 to 1; default false"
    )
    truncate: StrictBool | None = Field(
        default=None, description="false refuses pairs that are longer than the model takes; default true"
    )

    def passages(self) -> list[str]:
        """The documents' texts, in order."""
        return [item if isinstance(item, str) else item.text for item in self.documents or self.texts or ()]

    def check(self, limits: Limits) -> None:
        super().check(limits)
        if (self.documents is None) == (self.texts is None):
            given = "neither" if self.texts is None else "both"
            raise UnprocessableError(f"documents, texts: {given} given; exactly one of the two must be")
        check_text("query", self.query, limits.max_query_characters)
        field = "texts" if self.documents is None else "documents"
        passages = self.passages()
        check_texts(field, passages, limits.max_document_characters, limits.max_documents)
        check_total(
            f"query with each of {field}", len(self.query) * len(passages) + characters_of(passages), limits
        )


class RerankedDocument(BaseModel):
    text: str


class RerankResult(BaseModel):
    index: int
    relevance_score: float
    document: RerankedDocument | str | None = Field(
        default=None,
        description="absent unless return_documents asks for it; a bare text below /infinity",
    )


class RerankResponse(BaseModel):
    id: str
    model: str
    results: list[RerankResult] = Field(description="highest relevance first")
    meta: dict[str, Any] = Field(description="Cohere's")
    usage: Usage
    index_version: str
    generation: str


class ScoredText(BaseModel):
    """One row of the answer to a request with `texts`."""

    index: int
    score: float
    text: str | None = None


async def rerank(exchange: Exchange, version: str = "1", bare_texts: bool = False) -> HttpAnswer:
    """Score documents for a query."""
    request = await exchange.read(RerankRequest)
    deadline = exchange.deadline(request.timeout_ms)
    served = exchange.served()
    if served.reranker is None:
        raise NotConfiguredError(
            f"collection {served.name!r} has no reranker; start the server with `reranker` set"
        )
    passages = request.passages()
    call = RerankCall(query=request.query, documents=passages)
    answer = await exchange.ask(exchange.engine.rerank, call, deadline)
    check_finite("a logit", answer.logits, answer)
    if request.truncate is False:
        refuse_cut_texts(answer, served.reranker.max_length)
    # Order by the logits: the logistic function maps all large ones to 1.0.
    order = np.argsort(-answer.logits, kind="stable")[: request.top_n or len(passages)].tolist()
    if request.texts is not None:
        return json_answer(_tei_rows(request, answer, passages, order), answer)
    value = _jina_value(request, answer, passages, order)
    value["meta"] = cohere_meta(answer, version, {"search_units": 1})
    if bare_texts and request.return_documents:
        value["results"] = [{**row, "document": row["document"]["text"]} for row in value["results"]]
    return json_answer(value, answer)


async def rerank_infinity(exchange: Exchange) -> HttpAnswer:
    """Score documents for a query; returned documents are bare texts, as Infinity's clients read them."""
    return await rerank(exchange, bare_texts=True)


async def rerank_v2(exchange: Exchange) -> HttpAnswer:
    """Score documents for a query, for clients of Cohere's v2."""
    return await rerank(exchange, "2")


def relevance(answer: RerankAnswer) -> list[float]:
    """The logistic of each logit [N], 0 to 1."""
    # Of the hyperbolic tangent no large logit overflows.
    values: list[float] = (0.5 * (1 + np.tanh(answer.logits.astype(np.float64) / 2))).tolist()
    return values


def _jina_value(
    request: RerankRequest, answer: RerankAnswer, passages: list[str], order: list[int]
) -> dict[str, Any]:
    scores = relevance(answer)
    # Strict clients refuse `document: null`, so the key is left out.
    results = [
        {
            "index": number,
            "relevance_score": scores[number],
            **({"document": {"text": passages[number]}} if request.return_documents else {}),
        }
        for number in order
    ]
    return {
        "id": str(uuid.uuid4()),
        "model": answer.model,
        "results": results,
        "usage": usage(answer.counts),
        "index_version": answer.index_version,
        "generation": answer.generation,
    }


def _tei_rows(
    request: RerankRequest, answer: RerankAnswer, passages: list[str], order: list[int]
) -> list[dict[str, Any]]:
    scores = answer.logits.tolist() if request.raw_scores else relevance(answer)
    return [
        {
            "index": number,
            "score": scores[number],
            **({"text": passages[number]} if request.return_text else {}),
        }
        for number in order
    ]
