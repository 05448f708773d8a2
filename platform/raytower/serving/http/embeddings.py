"""Embeddings in three shapes: OpenAI's, Cohere's (v1 and v2), and that of text-embeddings-inference."""

from __future__ import annotations

import decimal
import uuid
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, BeforeValidator, Field, StrictBool, StrictStr, WithJsonSchema

from raytower.serving.calls import EmbedAnswer, EmbedCall, Role
from raytower.serving.errors import TooLargeError, UnprocessableError
from raytower.serving.http.answers import (
    HttpAnswer,
    check_finite,
    dump,
    encode_base64,
    headers_of,
    shorten,
    usage,
    write,
)
from raytower.serving.http.exchange import Exchange
from raytower.serving.http.requests import (
    TEXT_SCHEMA,
    ClientRequest,
    DocumentText,
    Positive,
    characters_of,
    characters_of_tokens,
    check_count,
    check_texts,
    check_total,
    limit,
    shown,
    whole,
)
from raytower.serving.http.search import Usage
from raytower.serving.http.token_ids import with_texts
from raytower.serving.http_config import Limits

Vectors = NDArray[np.float32]
_VECTORS_A_PIECE = 64
_NUMBER_BYTES = 21
_TOKEN_LIST = {
    "type": "array",
    "minItems": 1,
    "items": {"type": "integer", "minimum": 0, "maximum": 2**31 - 1},
}
_COUNT = limit(maxItems="max_inputs")
_COHERE_ROLES: dict[str, Role] = {"search_query": "query", "search_document": "document"}


def _whole_ids(given: Any) -> Any:
    """Token ids that were written with a point, as whole numbers."""
    if not isinstance(given, list):
        return given
    return [_whole_list(item) if isinstance(item, list) else item for item in _whole_list(given)]


def _whole_list(items: list[Any]) -> list[Any]:
    return list(map(whole, items)) if decimal.Decimal in set(map(type, items)) else items


class EmbeddingsRequest(ClientRequest):
    """OpenAI's shape. `model` and `user` are accepted for its clients; the answer names the model that was used."""

    examples: ClassVar = (
        {"input": "who pays for a flood", "model": "any"},
        {"input": ["term life", "pet insurance"], "encoding_format": "base64", "input_type": "document"},
    )

    input: Annotated[
        Any,
        BeforeValidator(_whole_ids),
        WithJsonSchema(
            {
                "anyOf": [
                    TEXT_SCHEMA,
                    {"type": "array", "minItems": 1, "items": TEXT_SCHEMA, **_COUNT},
                    _TOKEN_LIST,
                    {"type": "array", "minItems": 1, "items": _TOKEN_LIST, **_COUNT},
                ]
            }
        ),
    ] = Field(description="one text or several, or their token ids")
    model: StrictStr | None = None
    encoding_format: Literal["float", "base64"] | None = Field(
        default=None,
        description="default float; base64: the little-endian float32 values of one vector",
    )
    dimensions: Positive | None = Field(
        default=None,
        description="keep this many leading components and bring the vector back to length 1; one of those that the "
        "model was trained for, which /v1/models tells",
    )
    user: StrictStr | None = None
    input_type: Literal["query", "document"] | None = Field(
        default=None, description="put the model's prefix of that role before each text; default none"
    )

    def call(self) -> EmbedCall:
        """What is asked of the engine."""
        if isinstance(self.input, str):
            return EmbedCall(texts=[self.input], role=self.input_type)
        if self.input and isinstance(self.input[0], str):
            return EmbedCall(texts=self.input, role=self.input_type)
        token_ids = [self.input] if isinstance(self.input[0], int) else self.input
        return EmbedCall(token_ids=token_ids, role=self.input_type)

    def check(self, limits: Limits) -> None:
        super().check(limits)
        _check_input(self.input, limits)


def _check_input(given: Any, limits: Limits) -> None:
    if isinstance(given, str):
        return _check_texts("input", [given], limits)
    if not isinstance(given, list):
        raise UnprocessableError(
            "input: must be a string, a list of strings, or lists of token ids (integers)"
        )
    check_count("input", len(given), max(limits.max_inputs, limits.max_document_characters))
    kinds = set(map(type, given))
    if kinds == {str}:
        return _check_texts("input", given, limits)
    lists = [given] if kinds == {int} else given
    check_count("input", len(lists), limits.max_inputs)
    for number, ids in enumerate(lists):
        place = "input" if kinds == {int} else f"input.{number}"
        if not isinstance(ids, list) or not set(map(type, ids)) <= {int}:
            raise UnprocessableError(f"{place}: must be a string or a list of token ids, as all others are")
        if not ids:
            raise UnprocessableError(f"{place}: is an empty list; it must hold token ids")
        if not 0 <= min(ids) <= max(ids) < 2**31:
            raise UnprocessableError(
                f"{place}: holds {shown(min(ids) if min(ids) < 0 else max(ids))}, no token id"
            )
        if len(ids) > limits.max_document_characters:
            raise TooLargeError(
                f"{place}: has {len(ids)} token ids; at most {limits.max_document_characters} are accepted"
            )
    return check_total("input", characters_of_tokens(lists), limits)


def _check_texts(field: str, texts: Sequence[str], limits: Limits) -> None:
    check_texts(field, texts, limits.max_document_characters, limits.max_inputs)
    check_total(field, characters_of(texts), limits)


class Embedding(BaseModel):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingsResponse(BaseModel):
    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: Usage
    index_version: str
    generation: str


async def embeddings(exchange: Exchange) -> HttpAnswer:
    """Vectors of texts, in OpenAI's shape."""
    request = await exchange.read(EmbeddingsRequest)
    answer = await _embed(
        exchange, await with_texts(request.call(), exchange.config.token_ids), request.timeout_ms
    )
    vectors = shorten(answer.vectors, request.dimensions, exchange.served().encoder.dimensions)
    as_text = request.encoding_format == "base64"
    facts = {
        "model": answer.model,
        "usage": usage(answer.counts),
        "index_version": answer.index_version,
        "generation": answer.generation,
    }

    def item(number: int, vector: Vectors) -> dict[str, Any]:
        value = encode_base64(vector) if as_text else vector.tolist()
        return {"object": "embedding", "index": number, "embedding": value}

    return await _answer(
        exchange, answer, vectors, b'{"object":"list","data":[', item, b"]," + dump(facts)[1:]
    )


class CohereEmbedRequest(ClientRequest):
    """Cohere's shape, v1 and v2."""

    examples: ClassVar = (
        {
            "model": "any",
            "texts": ["term life"],
            "input_type": "search_document",
            "embedding_types": ["float"],
        },
    )

    texts: Annotated[list[DocumentText], Field(min_length=1, json_schema_extra=_COUNT)]
    model: StrictStr | None = None
    input_type: StrictStr | None = Field(
        default=None, description="search_query and search_document put the model's prefix before each text"
    )
    embedding_types: list[Literal["float", "base64", "binary", "ubinary"]] | None = Field(
        default=None, description="default float"
    )
    output_dimension: Positive | None = Field(default=None, description="as `dimensions` of OpenAI")
    truncate: Literal["NONE", "END"] | None = Field(
        default=None, description="NONE refuses texts that are longer than the model takes; default END"
    )

    def check(self, limits: Limits) -> None:
        super().check(limits)
        _check_texts("texts", self.texts, limits)


class CohereEmbedResponse(BaseModel):
    id: str
    response_type: Literal["embeddings_by_type", "embeddings_floats"]
    embeddings: dict[str, list[list[float] | str]] | list[list[float]] = Field(
        description="by type; v1 without embedding_types has the vectors alone"
    )
    texts: list[str]
    meta: dict[str, Any]


def _converted(convert: Callable[[NDArray[np.float32]], Any], _: int, vector: NDArray[np.float32]) -> Any:
    return convert(vector)


async def cohere_embed(exchange: Exchange, version: str = "2") -> HttpAnswer:
    """Vectors of texts, in Cohere's shape."""
    request = await exchange.read(CohereEmbedRequest)
    call = EmbedCall(texts=request.texts, role=_COHERE_ROLES.get(request.input_type or ""))
    answer = await _embed(exchange, call, request.timeout_ms, refuse_cut=request.truncate == "NONE")
    vectors = shorten(answer.vectors, request.output_dimension, exchange.served().encoder.dimensions)
    facts = {
        "texts": request.texts,
        "meta": cohere_meta(answer, version, {"input_tokens": answer.counts.tokens}),
    }
    bare = version == "1" and not request.embedding_types
    kinds = dict.fromkeys(request.embedding_types or ("float",))
    head = {"id": str(uuid.uuid4()), "response_type": "embeddings_floats" if bare else "embeddings_by_type"}
    by_type = {kind: _of_type(kind) for kind in kinds}

    def pieces() -> Iterator[bytes]:
        yield dump(head)[:-1] + b',"embeddings":' + (b"" if bare else b"{")
        for number, (kind, convert) in enumerate(by_type.items()):
            yield (b"," if number else b"") + (b"" if bare else dump(kind) + b":")
            yield b"["
            yield from _vectors(vectors, partial(_converted, convert))
            yield b"]"
        yield (b"," if bare else b"},") + dump(facts)[1:]

    size = len(by_type) * vectors.size * _NUMBER_BYTES + characters_of(request.texts)
    body = await write(pieces, size, int(exchange.config.limits.max_answer_bytes))
    return HttpAnswer(body, headers=headers_of(answer))


async def cohere_embed_v1(exchange: Exchange) -> HttpAnswer:
    """Vectors of texts, in the shape of Cohere's v1."""
    return await cohere_embed(exchange, "1")


def cohere_meta(answer: Any, version: str, billed: dict[str, int]) -> dict[str, Any]:
    """Cohere's `meta`; a warning says how many texts were cut."""
    counts = answer.counts
    cut = f"{counts.truncated} of the texts were cut to the model's length"
    return {
        "api_version": {"version": version},
        "billed_units": billed,
        "tokens": {"input_tokens": counts.tokens},
        "truncated": counts.truncated,
        **({"warnings": [cut]} if counts.truncated else {}),
    }


def _of_type(kind: str) -> Callable[[Vectors], Any]:
    if kind == "base64":
        return encode_base64
    if kind == "ubinary":
        return lambda vector: np.packbits(vector > 0).tolist()
    if kind == "binary":
        # Cohere's own: the bytes of ubinary moved into the range of signed ones.
        return lambda vector: (np.packbits(vector > 0).astype(np.int16) - 128).tolist()
    return lambda vector: vector.tolist()


class TeiEmbedRequest(ClientRequest):
    """The shape of text-embeddings-inference, which Hugging Face's clients send."""

    examples: ClassVar = ({"inputs": ["term life", "pet insurance"]},)

    inputs: Annotated[
        Any,
        WithJsonSchema(
            {"anyOf": [TEXT_SCHEMA, {"type": "array", "minItems": 1, "items": TEXT_SCHEMA, **_COUNT}]}
        ),
    ] = Field(description="one text or several")
    truncate: StrictBool | None = Field(
        default=None, description="false refuses texts that are longer than the model takes; default true"
    )
    prompt_name: StrictStr | None = Field(
        default=None, description="query or document put the model's prefix before each text"
    )
    dimensions: Positive | None = None

    def texts(self) -> list[str]:
        return [self.inputs] if isinstance(self.inputs, str) else self.inputs

    def check(self, limits: Limits) -> None:
        super().check(limits)
        texts = self.texts()
        if not isinstance(texts, list) or not set(map(type, texts)) <= {str}:
            raise UnprocessableError("inputs: must be a string or a list of strings")
        _check_texts("inputs", texts, limits)


async def tei_embed(exchange: Exchange) -> HttpAnswer:
    """Vectors of texts, as a bare list."""
    request = await exchange.read(TeiEmbedRequest)
    roles: dict[str, Role] = {"query": "query", "document": "document", "passage": "document"}
    call = EmbedCall(texts=request.texts(), role=roles.get(request.prompt_name or ""))
    answer = await _embed(exchange, call, request.timeout_ms, refuse_cut=request.truncate is False)
    vectors = shorten(answer.vectors, request.dimensions, exchange.served().encoder.dimensions)
    return await _answer(exchange, answer, vectors, b"[", lambda _, vector: vector.tolist(), b"]")


async def _embed(
    exchange: Exchange, call: EmbedCall, timeout_ms: int | None, refuse_cut: bool = False
) -> EmbedAnswer:
    deadline = exchange.deadline(timeout_ms)
    exchange.served()
    answer = await exchange.ask(exchange.engine.embed, call, deadline)
    check_finite("a vector", answer.vectors, answer)
    if refuse_cut:
        refuse_cut_texts(answer, exchange.served().encoder.max_length)
    return answer


def refuse_cut_texts(answer: Any, max_length: int | None) -> None:
    """For callers that said they want no text cut. Raises TooLargeError."""
    if answer.counts.truncated:
        raise TooLargeError(
            f"{answer.counts.truncated} of the texts are longer than the {max_length} tokens that the model takes; "
            "shorten them, or let them be cut by leaving `truncate` out"
        )


async def _answer(
    exchange: Exchange,
    answer: EmbedAnswer,
    vectors: Vectors,
    head: bytes,
    item: Callable[[int, Vectors], Any],
    tail: bytes,
) -> HttpAnswer:
    def pieces() -> Iterator[bytes]:
        yield head
        yield from _vectors(vectors, item)
        yield tail

    size = vectors.size * _NUMBER_BYTES
    body = await write(pieces, size, int(exchange.config.limits.max_answer_bytes))
    return HttpAnswer(body, headers=headers_of(answer))


def _vectors(vectors: Vectors, item: Callable[[int, Vectors], Any]) -> Iterator[bytes]:
    """The members of a JSON list of vectors [N, D], some at a time."""
    for start in range(0, len(vectors), _VECTORS_A_PIECE):
        values = [
            item(start + number, vector)
            for number, vector in enumerate(vectors[start : start + _VECTORS_A_PIECE])
        ]
        yield (b"," if start else b"") + dump(values)[1:-1]
