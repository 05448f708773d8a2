"""The wire contract: every request, response and error of the HTTP interface, and the limits they keep to.

This module alone decides what goes over the wire. `app.py` answers such requests, `page.html` makes them.
"""

from __future__ import annotations

import base64
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr

from raytower.config import ByteSize, Config
from raytower.errors import RaytowerError

DEFAULT_RECALL_K = 100


class Limits(Config):
    """The limits of one request. Longer texts and bodies are answered 413, larger counts 422."""

    max_body_bytes: ByteSize = Field(default=ByteSize(4 * 1024 * 1024), ge=1024)
    """Bytes of a request's body."""
    max_query_characters: int = Field(default=8192, ge=1)
    """Characters of a query."""
    max_queries: int = Field(default=64, ge=1)
    """Queries of a request."""
    max_k: int = Field(default=1000, ge=1)
    """Hits that may be asked for."""
    max_recall_k: int = Field(default=1000, ge=1)
    """Documents that the first stage may be asked to recall."""
    max_inputs: int = Field(default=256, ge=1)
    """Texts of an embeddings request."""
    max_documents: int = Field(default=1000, ge=1)
    """Documents of a rerank request."""
    max_document_characters: int = Field(default=65536, ge=1)
    """Characters of a document."""
    max_timeout_ms: int = Field(default=60_000, ge=1)
    """Milliseconds that a request may ask for."""


# --- requests -------------------------------------------------------------------------------------------------


class Request(BaseModel):
    """Base of every request: unknown fields are refused, values are not converted between types."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class SearchRequest(Request):
    """Recall, then rerank. Exactly one of `query` and `queries` is given.

    `k` beyond the rows of the index returns every row. `rerank` true (the default) on a server without a reranker
    is no error: the answer says `reranked: false`.
    """

    query: StrictStr | None = Field(default=None, description="one query")
    queries: list[StrictStr] | None = Field(
        default=None, description="several queries, answered in this order"
    )
    k: StrictInt = Field(default=10, ge=1, description="results for each query")
    recall_k: StrictInt | None = Field(
        default=None,
        ge=1,
        description=f"candidates to rerank, at least k; default max({DEFAULT_RECALL_K}, k)",
    )
    rerank: StrictBool = True
    filter: dict[str, Any] | None = Field(
        default=None,
        description='condition on the columns of documents, applied before ranking: {"year": {"$gte": 2020}}',
    )
    timeout_ms: StrictInt | None = Field(default=None, ge=1, description="default: the server's")

    def texts(self) -> list[str]:
        """The queries, in order."""
        return [self.query] if self.query is not None else list(self.queries or [])

    def depth(self, limits: Limits) -> int:
        """How many candidates are recalled for the reranker."""
        return self.recall_k or max(min(DEFAULT_RECALL_K, limits.max_recall_k), self.k)

    def check(self, limits: Limits) -> None:
        """Raises UnprocessableError or TooLargeError, naming the field and its rule."""
        if (self.query is None) == (self.queries is None):
            given = "neither" if self.query is None else "both"
            raise UnprocessableError(f"query, queries: {given} given; exactly one of the two must be")
        if self.query is not None:
            check_text("query", self.query, limits.max_query_characters)
        else:
            check_count("queries", len(self.queries or ()), limits.max_queries)
            for number, text in enumerate(self.queries or ()):
                check_text(f"queries.{number}", text, limits.max_query_characters)
        _check_at_most("k", self.k, limits.max_k)
        if self.recall_k is not None:
            _check_at_most("recall_k", self.recall_k, limits.max_recall_k)
            if self.recall_k < self.k:
                raise UnprocessableError(
                    f"recall_k: is {self.recall_k}, below k {self.k}; it must be at least k"
                )
        check_timeout(self.timeout_ms, limits)


class EmbeddingsRequest(Request):
    """OpenAI's shape. `model` and `user` are accepted for its clients; the answer names the model that was used."""

    input: StrictStr | list[StrictStr] = Field(description="one text or several")
    model: StrictStr | None = None
    encoding_format: Literal["float", "base64"] = Field(
        default="float", description="base64: the little-endian float32 values of one vector"
    )
    dimensions: StrictInt | None = Field(
        default=None,
        ge=1,
        description="keep this many leading components and bring the vector back to length 1",
    )
    user: StrictStr | None = None
    input_type: Literal["query", "document"] | None = Field(
        default=None, description="put the model's prefix of that role before each text; default none"
    )
    timeout_ms: StrictInt | None = Field(default=None, ge=1)

    def texts(self) -> list[str]:
        return [self.input] if isinstance(self.input, str) else list(self.input)

    def check(self, limits: Limits) -> None:
        """Raises UnprocessableError or TooLargeError, naming the field and its rule."""
        check_count("input", len(self.texts()), limits.max_inputs)
        for number, text in enumerate(self.texts()):
            field = "input" if isinstance(self.input, str) else f"input.{number}"
            check_text(field, text, limits.max_document_characters)
        check_timeout(self.timeout_ms, limits)


class RerankDocument(Request):
    text: StrictStr


class RerankRequest(Request):
    """The Jina and Cohere shape. `relevance_score` is the logistic of the reranker's logit, 0 to 1."""

    query: StrictStr
    documents: list[StrictStr | RerankDocument]
    model: StrictStr | None = None
    top_n: StrictInt | None = Field(default=None, ge=1, description="default: all documents")
    return_documents: StrictBool = False
    timeout_ms: StrictInt | None = Field(default=None, ge=1)

    def texts(self) -> list[str]:
        """The documents' texts, in order."""
        return [item if isinstance(item, str) else item.text for item in self.documents]

    def check(self, limits: Limits) -> None:
        """Raises UnprocessableError or TooLargeError, naming the field and its rule."""
        check_text("query", self.query, limits.max_query_characters)
        check_count("documents", len(self.documents), limits.max_documents)
        for number, text in enumerate(self.texts()):
            check_text(f"documents.{number}", text, limits.max_document_characters)
        check_timeout(self.timeout_ms, limits)


# --- responses ------------------------------------------------------------------------------------------------


class SearchHit(BaseModel):
    """Hits are ordered by `score`: the fused score if reranked, else the recall score."""

    id: str
    text: str
    metadata: dict[str, Any]
    recall_score: float
    rerank_score: float | None = Field(
        description="the reranker's raw logit; null where it did not see this text"
    )
    score: float
    rank: int


class Timings(BaseModel):
    """Milliseconds. `total` counts from the request's arrival, so it holds the time spent waiting too."""

    encode: float
    recall: float
    rerank: float
    total: float


class SearchResponse(BaseModel):
    index_version: str
    partial: bool = Field(description="true: a shard did not answer in time and its documents are missing")
    reranked: bool
    timings_ms: Timings
    results: list[list[SearchHit]] = Field(description="for each query its hits, best first")


class Embedding(BaseModel):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class Usage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class EmbeddingsResponse(BaseModel):
    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: Usage
    index_version: str


class RerankResult(BaseModel):
    index: int
    relevance_score: float
    document: RerankDocument | None = None


class RerankResponse(BaseModel):
    model: str
    results: list[RerankResult] = Field(description="highest relevance first")
    index_version: str


class StatusResponse(BaseModel):
    status: str
    index_version: str | None = None


class ErrorDetail(BaseModel):
    message: str
    type: str
    code: str


class ErrorResponse(BaseModel):
    error: ErrorDetail


# --- errors ---------------------------------------------------------------------------------------------------


class ApiError(RaytowerError):
    """A failure that the caller is told about, with its HTTP status. The message is safe to show."""

    status = 500
    type = "server_error"
    code = "internal_error"

    def __init__(self, message: str, code: str | None = None, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.code = code or self.code
        self.headers = headers or {}


class UnprocessableError(ApiError):
    status, type, code = 422, "invalid_request_error", "invalid_value"


class TooLargeError(ApiError):
    status, type, code = 413, "invalid_request_error", "too_large"


class UnauthorisedError(ApiError):
    status, type, code = 401, "authentication_error", "invalid_api_key"


class NotConfiguredError(ApiError):
    status, type, code = 404, "invalid_request_error", "not_configured"


class NotFoundError(ApiError):
    status, type, code = 404, "invalid_request_error", "not_found"


class OverloadedError(ApiError):
    status, type, code = 429, "rate_limit_error", "overloaded"


class NotReadyError(ApiError):
    status, type, code = 503, "server_error", "not_ready"


class OutOfTimeError(ApiError):
    status, type, code = 504, "timeout_error", "out_of_time"


def error_body(message: str, error_type: str, code: str) -> bytes:
    """The JSON of an error. Characters that UTF-8 cannot carry (lone surrogates) are written as escapes."""
    safe = message.encode("utf-8", "backslashreplace").decode()
    detail = ErrorDetail(message=safe, type=error_type, code=code)
    return ErrorResponse(error=detail).model_dump_json().encode()


# --- rules that several requests share ------------------------------------------------------------------------


def check_text(field: str, text: str, max_characters: int) -> None:
    """Raises UnprocessableError for a blank or invalid text, TooLargeError for a long one."""
    if not text.strip():
        raise UnprocessableError(f"{field}: is empty or only whitespace; it must hold text")
    if len(text) > max_characters:
        raise TooLargeError(f"{field}: has {len(text)} characters; at most {max_characters} are accepted")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        # JSON can spell half of a surrogate pair; no tokenizer takes it.
        problem = f"{field}: has a lone surrogate at character {error.start}; it must be valid Unicode"
        raise UnprocessableError(problem) from error


def check_count(field: str, count: int, most: int) -> None:
    """Raises UnprocessableError unless there are 1 to `most` items."""
    if not 1 <= count <= most:
        raise UnprocessableError(f"{field}: has {count} items; there must be 1 to {most}")


def check_timeout(timeout_ms: int | None, limits: Limits) -> None:
    if timeout_ms is not None:
        _check_at_most("timeout_ms", timeout_ms, limits.max_timeout_ms)


def _check_at_most(field: str, value: int, most: int) -> None:
    if value > most:
        raise UnprocessableError(f"{field}: is {value}; at most {most} is accepted")


# --- vectors on the wire --------------------------------------------------------------------------------------

VectorText = Annotated[str, "base64 of little-endian float32"]


def encode_base64(vector: NDArray[np.float32]) -> VectorText:
    """The bytes of a vector [D] as text."""
    return base64.b64encode(np.asarray(vector, dtype="<f4").tobytes()).decode("ascii")


def shorten(vectors: NDArray[np.float32], dimensions: int | None) -> NDArray[np.float32]:
    """Keep the leading components of vectors [N, D] and bring each back to length 1; all of them when None.

    Raises:
        UnprocessableError: `dimensions` is more than D.
    """
    if dimensions is None:
        return vectors
    if dimensions > vectors.shape[1]:
        raise UnprocessableError(f"dimensions: is {dimensions}; this model's vectors have {vectors.shape[1]}")
    head = vectors[:, :dimensions]
    norms = np.linalg.norm(head, axis=1, keepdims=True)
    return np.divide(head, norms, out=np.zeros_like(head), where=norms > 0)
