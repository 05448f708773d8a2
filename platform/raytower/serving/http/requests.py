"""What all requests share: how a body becomes a request, the rules of texts and counts, and the words of an error.

Null means absent for every optional field, so such a field is dropped before anything looks at it.
"""

from __future__ import annotations

import decimal
import difflib
import functools
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictInt, StrictStr, ValidationError
from pydantic_core import ErrorDetails

from raytower.data.visible import INVISIBLE
from raytower.serving.errors import TooLargeError, UnprocessableError
from raytower.serving.http_config import Limits

RequestT = TypeVar("RequestT", bound="Request")
_SHOWN_CHARACTERS = 40
_SHOWN_ERRORS = 3
_TOKEN_CHARACTERS = 4


def whole(value: object) -> object:
    """3.0 as 3: JSON knows one kind of number, and some clients write all of them with a point."""
    # `adjusted` is the exponent of the first digit. It is asked first, for no other way is quick for 1e999999999.
    if isinstance(value, decimal.Decimal) and value.adjusted() < 16 and value == value.to_integral_value():
        return int(value)
    return value


def _pattern() -> str:
    """A regular expression that finds a character which shows, for schemas."""
    codes = sorted(map(ord, INVISIBLE))
    starts = [code for code in codes if code - 1 not in codes]
    ends = [code for code in codes if code + 1 not in codes]
    runs = "".join(f"\\u{first:04x}-\\u{last:04x}" for first, last in zip(starts, ends, strict=True))
    return f"[^{runs}]"


def limit(**rules: str) -> dict[str, Any]:
    """Rules of a schema whose bounds are keys of `Limits`; `openapi.py` puts the numbers in."""
    return {rule: f"limits.{name}" for rule, name in rules.items()}


_SHOWS = {"minLength": 1, "pattern": _pattern()}
TEXT_SCHEMA = {"type": "string", **_SHOWS, **limit(maxLength="max_document_characters")}
"""A document's text, where a schema is written by hand."""
# Bounds stand inside, beside the type: those around a union with None are kept to, but no schema tells them.
WholeNumber = Annotated[StrictInt, Field(ge=0), BeforeValidator(whole)]
Positive = Annotated[StrictInt, Field(ge=1), BeforeValidator(whole)]
QueryText = Annotated[
    StrictStr, Field(json_schema_extra={**_SHOWS, **limit(maxLength="max_query_characters")})
]
DocumentText = Annotated[
    StrictStr, Field(json_schema_extra={**_SHOWS, **limit(maxLength="max_document_characters")})
]
Timeout = Annotated[
    Positive | None,
    Field(
        description="milliseconds from the request's arrival; default: the server's",
        json_schema_extra=limit(maximum="max_timeout_ms"),
    ),
]


class Request(BaseModel):
    """Base of every request. Values are not converted between types; fields that nobody knows are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)
    examples: ClassVar[tuple[dict[str, Any], ...]] = ()
    """Bodies that are answered, for openapi.json."""

    timeout_ms: Timeout = None

    def check(self, limits: Limits) -> None:
        """Raises UnprocessableError or TooLargeError, naming the field and its rule."""
        check_timeout("timeout_ms", self.timeout_ms, limits)


class ClientRequest(Request):
    """Base of requests in the shape of another service. Its clients send fields that mean nothing here: ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True)


def read_request(kind: type[RequestT], value: Any, limits: Limits) -> RequestT:
    """A checked request from a body's value. Raises UnprocessableError or TooLargeError."""
    if not isinstance(value, dict):
        raise UnprocessableError("the body must be a JSON object")
    given = {name: item for name, item in value.items() if item is not None}
    try:
        request = kind.model_validate(given)
    except ValidationError as error:
        raise _describe_all(kind, given, error) from error
    request.check(limits)
    return request


# --- rules ----------------------------------------------------------------------------------------------------


def check_text(field: str, text: str, max_characters: int) -> None:
    """Raises UnprocessableError for a text that shows nothing, TooLargeError for a long one."""
    if not text.lstrip(INVISIBLE):
        problem = "holds only invisible characters" if text.strip() else "is empty or only whitespace"
        raise UnprocessableError(f"{field}: {problem}; it must hold text")
    if len(text) > max_characters:
        raise TooLargeError(f"{field}: has {len(text)} characters; at most {max_characters} are accepted")


def check_texts(field: str, texts: Sequence[str], max_characters: int, most: int) -> None:
    """Raises as `check_count` and `check_text`."""
    check_count(field, len(texts), most)
    for number, text in enumerate(texts):
        check_text(f"{field}.{number}", text, max_characters)


def check_count(field: str, count: int, most: int) -> None:
    """Raises UnprocessableError unless there are 1 to `most` items."""
    if not 1 <= count <= most:
        raise UnprocessableError(f"{field}: has {count} items; there must be 1 to {most}")


def check_at_most(field: str, value: int, most: int) -> None:
    if value > most:
        raise UnprocessableError(f"{field}: is {shown(value)}; at most {most} is accepted")


def check_timeout(field: str, timeout_ms: int | None, limits: Limits) -> None:
    if timeout_ms is not None:
        check_at_most(field, timeout_ms, limits.max_timeout_ms)


def check_total(what: str, characters: int, limits: Limits) -> None:
    """Raises TooLargeError where a model would be given more than `limits.max_characters`."""
    if characters > limits.max_characters:
        raise TooLargeError(
            f"{what}: make {characters} characters in all; at most {limits.max_characters} are accepted, so send "
            "several requests"
        )


def characters_of(texts: Sequence[str]) -> int:
    return sum(map(len, texts))


def characters_of_tokens(token_ids: Sequence[Sequence[int]]) -> int:
    """What token ids count as."""
    return _TOKEN_CHARACTERS * sum(map(len, token_ids))


# --- words ----------------------------------------------------------------------------------------------------


def shown(value: Any) -> str:
    """A value in a message: huge numbers and long texts shortened, lists and objects by their kind."""
    if isinstance(value, (list, dict)):
        # Their text may be nested too deeply to be written.
        return "a list" if isinstance(value, list) else "an object"
    if isinstance(value, int) and abs(value) >= 10**_SHOWN_CHARACTERS:
        value = decimal.Decimal(value)
    if isinstance(value, decimal.Decimal) and value.is_finite() and value.adjusted() >= _SHOWN_CHARACTERS:
        digits = "".join(map(str, value.as_tuple().digits[:10]))
        return f"{digits}… ({value.adjusted() + 1} digits)"
    text = str(value) if isinstance(value, (int, decimal.Decimal)) else repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"


def _describe_all(
    kind: type[Request], value: Mapping[str, Any], error: ValidationError
) -> UnprocessableError:
    # URLs of pydantic's own pages say nothing to a caller; the input is shown by our own words.
    details = error.errors(include_url=False)
    known = _names_of(kind)
    messages = dict.fromkeys(_describe(detail, kind, known) for detail in details[: 2 * _SHOWN_ERRORS])
    unknown = details[0]["type"] == "extra_forbidden"
    return UnprocessableError(
        "; ".join(list(messages)[:_SHOWN_ERRORS]), "unknown_field" if unknown else "invalid_value"
    )


@functools.lru_cache
def _names_of(kind: type[BaseModel]) -> set[str]:
    """Names of fields in a request and in what lies inside it."""
    schema = kind.model_json_schema()
    parts = [schema, *schema.get("$defs", {}).values()]
    return {name for part in parts for name in part.get("properties", {})}


def _describe(detail: ErrorDetails, kind: type[Request], known: set[str]) -> str:
    unknown = detail["type"] == "extra_forbidden"
    last = detail["loc"][-1] if unknown and detail["loc"] else None
    # Branch names of unions (str, list[str]) say nothing to a caller.
    names = [str(part) for part in detail["loc"] if isinstance(part, int) or part in known or part is last]
    place = ".".join(name[:_SHOWN_CHARACTERS] for name in names) or "the body"
    if unknown:
        return f"{place}: unknown field{_nearest(str(last), kind) if len(names) == 1 else ''}"
    if detail["type"] == "missing":
        return f"{place}: is required"
    rule = detail["msg"][:1].lower() + detail["msg"][1:]
    number = isinstance(detail["input"], (int, decimal.Decimal)) and not isinstance(detail["input"], bool)
    given = f"is {shown(detail['input'])}; " if number else ""
    return f"{place}: {given}{rule}"


def _nearest(name: str, kind: type[BaseModel]) -> str:
    near = difflib.get_close_matches(name, kind.model_fields, n=1, cutoff=0.6)
    meant = f"; did you mean {near[0]}?" if near else ""
    return f"{meant}; known are {', '.join(kind.model_fields)}"
