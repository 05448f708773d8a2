"""POST /v1/search: recall, then rerank."""

from __future__ import annotations

import decimal
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictStr

from raytower.retrieval.retriever import Hit
from raytower.serving.calls import SearchAnswer, SearchCall, ServedCollection
from raytower.serving.errors import UnprocessableError
from raytower.serving.http.answers import (
    HttpAnswer,
    check_finite,
    dump,
    headers_of,
    json_value,
    usage,
    write,
)
from raytower.serving.http.bodies import measure_filter
from raytower.serving.http.exchange import Exchange
from raytower.serving.http.requests import (
    Positive,
    QueryText,
    Request,
    characters_of,
    check_at_most,
    check_text,
    check_texts,
    check_total,
    limit,
    shown,
)
from raytower.serving.http_config import Limits
from raytower.serving.work import Deadline

DEFAULT_K = 10
DEFAULT_RECALL_K = 100
_STAGES = ("encode", "recall", "fetch", "rerank")
# A number beyond these stands in no column, and takes long to write out.
_MOST_EXPONENT = 400
# Each filter inside another takes two; the index takes 16 of them.
_MOST_LEVELS = 64
_HIT_BYTES = 200
_EXCLUSIVE: list[Any] = [
    {
        "required": ["query"],
        "properties": {"query": {"type": "string"}, "queries": {"type": "null"}},
    },
    {
        "required": ["queries"],
        "properties": {"queries": {"type": "array"}, "query": {"type": "null"}},
    },
]


class SearchRequest(Request):
    """Recall, then rerank. Exactly one of `query` and `queries` is given.

    `k` beyond the rows of the index returns every row. `rerank` true (the default) on a collection without a reranker
    is no error: the answer says `reranked: false`.
    """

    model_config = ConfigDict(json_schema_extra={"oneOf": _EXCLUSIVE})
    examples: ClassVar = (
        {"query": "who pays for a flood", "k": 3},
        {
            "queries": ["term life", "pet insurance"],
            "k": 5,
            "recall_k": 50,
            "filter": {"year": {"$gte": 2020}},
            "fields": ["text", "year"],
            "explain": True,
        },
    )

    query: QueryText | None = Field(default=None, description="one query")
    queries: Annotated[
        list[QueryText] | None,
        Field(min_length=1, json_schema_extra=limit(maxItems="max_queries")),
    ] = Field(default=None, description="several queries, answered in this order")
    k: Positive | None = Field(
        default=None,
        description=f"results for each query; default {DEFAULT_K}",
        json_schema_extra=limit(maximum="max_k"),
    )
    recall_k: Positive | None = Field(
        default=None,
        description=f"candidates to rerank; fewer than k count as k; default {DEFAULT_RECALL_K}",
        json_schema_extra=limit(maximum="max_recall_k"),
    )
    rerank: StrictBool | None = Field(default=None, description="default true")
    filter: dict[str, Any] | None = Field(
        default=None,
        description='condition on the columns of documents, applied before ranking: {"year": {"$gte": 2020}}; {} lets '
        "all through",
    )
    mode: Literal["dense", "lexical", "hybrid"] | None = Field(
        default=None, description="how documents are recalled; default the first of the collection's modes"
    )
    fields: list[StrictStr] | None = Field(
        default=None,
        description="columns that a hit brings, `text` among them; default all. Id and scores always come",
    )
    explain: StrictBool | None = Field(
        default=None, description="say of each hit what the reranker did; default false"
    )

    def texts(self) -> list[str]:
        """The queries, in order."""
        return [self.query] if self.query is not None else list(self.queries or [])

    def depth(self, limits: Limits) -> tuple[int, int]:
        """`k` and `recall_k`, with defaults that keep to the limits."""
        k = self.k or min(DEFAULT_K, limits.max_k, limits.max_recall_k)
        affordable = limits.max_pairs // max(len(self.texts()), 1)
        default = min(DEFAULT_RECALL_K, limits.max_recall_k, max(affordable, 1))
        return k, max(self.recall_k or default, k)

    def check(self, limits: Limits) -> None:
        super().check(limits)
        if (self.query is None) == (self.queries is None):
            given = "neither" if self.query is None else "both"
            raise UnprocessableError(f"query, queries: {given} given; exactly one of the two must be")
        if self.query is not None:
            check_text("query", self.query, limits.max_query_characters)
        else:
            check_texts("queries", self.queries or (), limits.max_query_characters, limits.max_queries)
        check_total("query, queries", characters_of(self.texts()), limits)
        if self.k is not None:
            check_at_most("k", self.k, limits.max_k)
        if self.recall_k is not None:
            check_at_most("recall_k", self.recall_k, limits.max_recall_k)
        if self.filter is not None:
            _check_filter(self.filter, limits)

    def check_pairs(self, limits: Limits) -> None:
        """Bounds of a search that reranks. Raises UnprocessableError."""
        k, recall_k = self.depth(limits)
        if k > limits.max_recall_k:
            raise UnprocessableError(
                f"k: is {k}; with rerank at most {limits.max_recall_k} is accepted; rerank: false takes {limits.max_k}"
            )
        pairs = recall_k * len(self.texts())
        if pairs > limits.max_pairs:
            raise UnprocessableError(
                f"recall_k: {len(self.texts())} queries with recall_k {recall_k} are {pairs} pairs to rerank; at most "
                f"{limits.max_pairs} are accepted"
            )


class Explanation(BaseModel):
    recall_rank: int = Field(description="rank before reranking, from 1")
    moved: int = Field(description="recall_rank - rank: above 0 where the reranker moved the hit up")


class SearchHit(BaseModel):
    """Hits are ordered by `score`: the fused score if reranked, else the recall score."""

    id: str
    text: str | None = Field(default=None, description="absent where `fields` leaves it out")
    metadata: dict[str, Any] = Field(description="bytes are base64, times ISO 8601, decimals text")
    recall_score: float = Field(
        description="dense: cosine or inner product; lexical: BM25; hybrid: both in one, comparable within this query"
    )
    rerank_score: float | None = Field(
        description="the reranker's raw logit; null where it did not see this text"
    )
    score: float
    rank: int
    explain: Explanation | None = Field(default=None, description="there where it was asked for")


class Timings(BaseModel):
    """Milliseconds. `total` counts from the request's arrival, so it holds the time spent waiting too."""

    encode: float
    recall: float
    fetch: float
    rerank: float
    total: float


class Usage(BaseModel):
    prompt_tokens: int
    total_tokens: int
    truncated: int = Field(description="texts that were cut to the model's length")


class SearchResponse(BaseModel):
    collection: str
    index_version: str
    generation: str
    partial: bool = Field(description="true: documents of `missing_shards` are missing")
    missing_shards: list[int]
    mode: Literal["dense", "lexical", "hybrid"]
    reranked: bool
    reranked_k: int = Field(description="candidates of each query that the reranker saw")
    queries_without_words: int = Field(
        description="queries that share no token with a document: hybrid answers them as dense, lexical without hits"
    )
    usage: Usage
    timings_ms: Timings
    results: list[list[SearchHit]] = Field(description="for each query its hits, best first")


async def search(exchange: Exchange) -> HttpAnswer:
    """Recall documents and rerank them."""
    request = await exchange.read(SearchRequest)
    deadline = exchange.deadline(request.timeout_ms)
    answer = await run_search(exchange, request, deadline)
    size = sum(len(hit.text) + _HIT_BYTES for hits in answer.hits for hit in hits)
    body = await write(
        lambda: _pieces(exchange.collection, answer, deadline, request.fields, explain=bool(request.explain)),
        size,
        int(exchange.config.limits.max_answer_bytes),
    )
    return HttpAnswer(body, headers=headers_of(answer))


async def run_search(exchange: Exchange, request: SearchRequest, deadline: Deadline) -> SearchAnswer:
    """The engine's answer to a checked request, its scores looked at. Raises ApiError."""
    limits = exchange.config.limits
    served = exchange.served()
    rerank = request.rerank is not False and served.reranker is not None
    if rerank:
        request.check_pairs(limits)
    k, recall_k = request.depth(limits)
    call = SearchCall(
        queries=request.texts(),
        k=k,
        recall_k=recall_k if rerank else k,
        rerank=rerank,
        filter=_exact(request.filter) if request.filter else None,
        mode=_mode(request, served),
        fields=_fields(request, served),
    )
    answer = await exchange.ask(exchange.engine.search, call, deadline)
    check_scores(answer)
    return answer


def _mode(request: SearchRequest, served: ServedCollection) -> Literal["dense", "lexical", "hybrid"]:
    if request.mode is None:
        return served.modes[0]
    if request.mode not in served.modes:
        raise UnprocessableError(
            f"mode: is {request.mode!r}; collection {served.name!r} has {', '.join(served.modes)}"
        )
    return request.mode


def _fields(request: SearchRequest, served: ServedCollection) -> tuple[str, ...] | None:
    if request.fields is None:
        return None
    known = {"id", "text", *served.columns}
    for name in request.fields:
        if name not in known:
            raise UnprocessableError(
                f"fields: there is no column {shown(name)}; there are {', '.join(sorted(known))}"
            )
    # The id always comes, so the engine is not asked for it.
    return tuple(dict.fromkeys(name for name in request.fields if name != "id"))


def _check_filter(filter: Mapping[str, Any], limits: Limits) -> None:
    size = measure_filter(filter)
    for what, count, most in (
        ("conditions", size.conditions, limits.max_filter_conditions),
        ("members of lists", size.members, limits.max_filter_members),
        ("levels", size.levels, _MOST_LEVELS),
    ):
        if count > most:
            raise UnprocessableError(f"filter: has {count} {what}; at most {most} are accepted")


def _exact(value: Any) -> Any:
    """Numbers of a filter as floats where a float has all their digits, else as decimals."""
    if isinstance(value, Mapping):
        return {name: _exact(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_exact(item) for item in value]
    if not isinstance(value, decimal.Decimal):
        return value
    if value and abs(value.adjusted()) > _MOST_EXPONENT:
        raise UnprocessableError(f"filter: holds the number {shown(value)}, which no column can hold")
    near = float(value)
    return near if decimal.Decimal(repr(near)) == value else value


# --- the answer -----------------------------------------------------------------------------------------------


def render(collection: str, call: SearchCall, answer: SearchAnswer) -> bytes:
    """An answer's JSON as a caller would get it, to find out whether there is one. Raises NotFiniteError."""
    check_scores(answer)
    return b"".join(_pieces(collection, answer, Deadline.after(1), call.fields))


def check_scores(answer: SearchAnswer) -> None:
    """Raises NotFiniteError."""
    scores = [
        score
        for hits in answer.hits
        for hit in hits
        for score in (hit.recall_score, hit.score, hit.rerank_score or 0.0)
    ]
    check_finite("a score", scores, answer)


def _pieces(
    collection: str,
    answer: SearchAnswer,
    deadline: Deadline,
    fields: Sequence[str] | None,
    explain: bool = False,
) -> Iterator[bytes]:
    """The answer's JSON, one query after the other, so that a thread that writes it lets others in between."""
    yield b'{"results":['
    for number, hits in enumerate(answer.hits):
        values = [hit_value(hit, fields) for hit in hits]
        if explain:
            for value, hit, rank in zip(values, hits, answer.recall_ranks[number], strict=True):
                value["explain"] = {"recall_rank": rank, "moved": rank - hit.rank}
        yield b"," if number else b""
        yield dump(values)
    yield b"],"
    yield dump(search_facts(answer, collection, deadline))[1:]


def search_facts(answer: SearchAnswer, collection: str, deadline: Deadline) -> dict[str, Any]:
    """Everything of an answer but its hits."""
    timings = {name: round(answer.timings_ms.get(name, 0.0), 3) for name in _STAGES}
    return {
        "collection": collection,
        "index_version": answer.index_version,
        "generation": answer.generation,
        "partial": answer.partial,
        "missing_shards": list(answer.missing_shards),
        "mode": answer.mode,
        "reranked": answer.reranked,
        "reranked_k": answer.reranked_k,
        "queries_without_words": answer.wordless,
        "usage": usage(answer.counts),
        "timings_ms": {**timings, "total": round(deadline.elapsed_ms(), 3)},
    }


def hit_value(hit: Hit, fields: Sequence[str] | None = None) -> dict[str, Any]:
    """A hit as JSON has it, with the columns that `fields` names."""
    metadata = {
        name: json_value(value) for name, value in hit.metadata.items() if fields is None or name in fields
    }
    text = {} if fields is not None and "text" not in fields else {"text": hit.text}
    return {
        "id": hit.id,
        **text,
        "metadata": metadata,
        "recall_score": hit.recall_score,
        "rerank_score": hit.rerank_score,
        "score": hit.score,
        "rank": hit.rank,
    }
