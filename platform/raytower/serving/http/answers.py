"""From answers to bytes: exact JSON, no value that is not a number, no more bytes than an answer may have."""

from __future__ import annotations

import asyncio
import base64
import datetime
import decimal
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic_core import to_json

from raytower.serving.calls import Answer, TokenCounts
from raytower.serving.errors import ApiError, NotFiniteError, UnprocessableError
from raytower.serving.http.requests import shown

GENERATION_HEADER = "x-raytower-generation"
TRUNCATED_HEADER = "x-raytower-truncated"
_JSON = "application/json"
# Smaller answers are written faster than a thread is found.
_THREAD_BYTES = 128 * 1024


@dataclass
class HttpAnswer:
    """What goes back over the wire."""

    body: bytes
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    content_type: str = _JSON


def json_answer(value: Any, answer: Answer | None = None, status: int = 200) -> HttpAnswer:
    """A value as JSON, with the headers that say by which generation `answer` was made and what it cut."""
    return HttpAnswer(dump(value), status, headers_of(answer))


def dump(value: Any) -> bytes:
    return to_json(value, inf_nan_mode="constants")


def headers_of(answer: Answer | None) -> dict[str, str]:
    """For clients whose answer's shape has no room: the generation, and how many texts were cut."""
    if answer is None:
        return {}
    headers = {GENERATION_HEADER: answer.generation}
    if answer.counts.truncated:
        headers[TRUNCATED_HEADER] = str(answer.counts.truncated)
    return headers


def usage(counts: TokenCounts) -> dict[str, int]:
    """OpenAI's usage, and how many texts were cut to the model's length."""
    return {
        "prompt_tokens": counts.tokens,
        "total_tokens": counts.tokens,
        "truncated": counts.truncated,
    }


async def write(pieces: Callable[[], Iterable[bytes]], expected_bytes: int, most: int) -> bytes:
    """The pieces of a body, joined; in a thread where much is expected, so that other requests go on.

    Raises:
        UnprocessableError: more than `most` bytes.
    """
    if expected_bytes < _THREAD_BYTES:
        return _join(pieces(), most)
    return await asyncio.to_thread(lambda: _join(pieces(), most))


def _join(pieces: Iterable[bytes], most: int) -> bytes:
    body = bytearray()
    for piece in pieces:
        body += piece
        if len(body) > most:
            raise _too_much(most)
    return bytes(body)


def _too_much(most: int) -> UnprocessableError:
    return UnprocessableError(
        f"the answer would have more than {most} bytes; ask for fewer queries, inputs or k, or name `fields`",
        "answer_too_large",
    )


def error_value(message: str, error_type: str, code: str) -> dict[str, Any]:
    """The shape of every error. Characters that UTF-8 cannot carry (lone surrogates) are written as escapes."""
    safe = message.encode("utf-8", "backslashreplace").decode()
    return {"error": {"message": safe, "type": error_type, "code": code}}


def error_answer(error: ApiError) -> HttpAnswer:
    return HttpAnswer(dump(error_value(str(error), error.type, error.code)), error.status, error.headers)


def check_finite(what: str, values: NDArray[np.floating[Any]] | Iterable[float], answer: Answer) -> None:
    """Raises NotFiniteError where a value is NaN or infinite: JSON has no such numbers, and null would hide it."""
    finite = np.isfinite(values).all() if isinstance(values, np.ndarray) else all(map(math.isfinite, values))
    if not finite:
        raise NotFiniteError(
            f"the model gave {what} that is not a number (NaN or infinity); generation {answer.generation} is damaged"
        )


def json_value(value: Any) -> Any:
    """A document's value as JSON has it: bytes as base64, times in ISO 8601, decimals by their digits as text.

    Integers keep all digits. NaN and infinity, for which JSON has no word, are null.
    """
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, (bytes, bytearray, memoryview)):
        return base64.b64encode(value).decode("ascii")
    if isinstance(value, Mapping):
        return {str(name): json_value(item) for name, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [json_value(item) for item in value]
    if isinstance(value, np.ndarray):
        return [json_value(item) for item in value.tolist()]
    if isinstance(value, np.generic):
        return json_value(value.item())
    if isinstance(value, decimal.Decimal):
        return format(value, "f")
    if isinstance(value, (datetime.datetime, datetime.date, datetime.time)):
        return value.isoformat()
    return str(value)


def encode_base64(vector: NDArray[np.generic], kind: str = "<f4") -> str:
    """The bytes of a vector [D] as text: little-endian float32, as OpenAI's clients read it."""
    return base64.b64encode(np.ascontiguousarray(vector, dtype=kind).tobytes()).decode("ascii")


def shorten(
    vectors: NDArray[np.float32], dimensions: int | None, trained: Iterable[int]
) -> NDArray[np.float32]:
    """Keep the leading components of vectors [N, D] and bring each back to length 1; all of them when None.

    Raises:
        UnprocessableError: the model was trained neither for `dimensions` nor is it D.
    """
    width = vectors.shape[1]
    if dimensions is None or dimensions == width:
        return vectors
    lengths = sorted({width, *trained})
    if dimensions not in lengths:
        raise UnprocessableError(
            f"dimensions: is {shown(dimensions)}; this model was trained for {', '.join(map(str, lengths))}"
        )
    head = vectors[:, :dimensions]
    norms = np.linalg.norm(head, axis=1, keepdims=True)
    return np.divide(head, norms, out=np.zeros_like(head), where=norms > 0)
