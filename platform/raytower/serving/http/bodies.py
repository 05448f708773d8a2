"""From the bytes of a body to exact JSON values: decompressed, UTF-8, no floats.

Numbers with a point or an exponent become `decimal.Decimal`, so that a filter compares by the digits that were written.
"""

from __future__ import annotations

import decimal
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from raytower.serving.errors import BadRequestError, TooLargeError, UnprocessableError, UnsupportedError

# zlib's window bits: gzip's head, zlib's head, or none. RFC 9110 says deflate has zlib's; some clients send none.
_GZIP_BITS, _ZLIB_BITS, _RAW_BITS = 31, 15, -15
_ENCODINGS = ("gzip", "deflate")
# Half of a surrogate pair can only come into a text by such an escape.
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89abAB-F]", re.IGNORECASE)
_JSON_TYPE = re.compile(r"application/(?:[\w.+-]+\+)?json")
_CHARSETS = ("", "utf-8", "utf8", "us-ascii", "ascii")
_BOM = b"\xef\xbb\xbf"


def decompress(body: bytes, encodings: str, max_bytes: int) -> bytes:
    """A body as it was before `Content-Encoding`, at most `max_bytes` of it.

    Raises:
        UnsupportedError: another encoding than gzip, deflate or identity. BadRequestError: damaged data.
        TooLargeError: more comes out.
    """
    names = [name.strip().lower() for name in encodings.split(",") if name.strip()]
    for name in reversed(names):
        if name in ("identity", ""):
            continue
        if name.removeprefix("x-") not in _ENCODINGS:
            raise UnsupportedError(
                f"Content-Encoding {name!r} is not taken; send gzip, deflate, or the body as it is",
                headers={"Accept-Encoding": ", ".join(_ENCODINGS)},
            )
        body = _inflate(body, name.removeprefix("x-"), max_bytes)
    return body


def _inflate(body: bytes, name: str, max_bytes: int) -> bytes:
    bits = _GZIP_BITS
    if name == "deflate":
        bits = _ZLIB_BITS if _has_zlib_head(body) else _RAW_BITS
    inflater = zlib.decompressobj(bits)
    try:
        plain = inflater.decompress(body, max_bytes + 1)
    except zlib.error as error:
        raise BadRequestError(
            f"the body is not valid {name}, which Content-Encoding names", "invalid_encoding"
        ) from error
    if len(plain) > max_bytes:
        raise TooLargeError(f"the body is larger than {max_bytes} bytes once it is decompressed")
    if not inflater.eof:
        raise BadRequestError(f"the body's {name} data ends too early", "invalid_encoding")
    if inflater.unused_data:
        raise BadRequestError(f"the body goes on behind the end of its {name} data", "invalid_encoding")
    return plain


def _has_zlib_head(body: bytes) -> bool:
    return len(body) >= 2 and body[0] & 0x0F == 8 and int.from_bytes(body[:2], "big") % 31 == 0


def check_content_type(content_type: str) -> None:
    """Raises UnsupportedError unless it is JSON in UTF-8, which no page of another site may just send."""
    kind, _, parameters = content_type.partition(";")
    if not _JSON_TYPE.fullmatch(kind.strip().lower()):
        given = f"is {kind.strip()!r}" if kind.strip() else "is missing"
        raise UnsupportedError(
            f"Content-Type {given}; send a JSON object with Content-Type: application/json"
        )
    for parameter in parameters.split(";"):
        name, _, value = parameter.partition("=")
        if name.strip().lower() == "charset" and value.strip().strip('"').lower() not in _CHARSETS:
            raise UnsupportedError(f"charset {value.strip()!r} is not taken; send JSON in UTF-8")


def parse_json(body: bytes) -> Any:
    """The value of a body. Texts hold no lone surrogates.

    Raises:
        BadRequestError: not UTF-8, not JSON, or nested too deeply. UnprocessableError: a lone surrogate.
    """
    try:
        text = body.removeprefix(_BOM).decode()
    except UnicodeDecodeError as error:
        guess = _other_encoding(body)
        named = f"; it looks like {guess}" if guess else f" (byte {error.start})"
        raise BadRequestError(
            f"the body is not UTF-8{named}; send JSON in UTF-8", "invalid_encoding"
        ) from error
    if guess := _other_encoding(body):
        raise BadRequestError(f"the body looks like {guess}; send JSON in UTF-8", "invalid_encoding")
    try:
        value = _load(text)
    except json.JSONDecodeError as error:
        raise BadRequestError(
            f"the body is not valid JSON: {error.msg} (line {error.lineno}, column {error.colno})"
        ) from error
    except RecursionError as error:
        raise BadRequestError("the body's JSON is nested too deeply") from error
    if _SURROGATE_ESCAPE.search(body):
        _refuse_surrogates(value)
    return value


def _load(text: str) -> Any:
    try:
        return json.loads(text, parse_float=_decimal, parse_constant=_refuse_constant)
    except json.JSONDecodeError:
        raise
    except ValueError:
        # Python turns no more than 4,300 digits into an integer; a decimal takes them all.
        return json.loads(text, parse_float=_decimal, parse_int=_long, parse_constant=_refuse_constant)


def _long(digits: str) -> int | decimal.Decimal:
    return int(digits) if len(digits) < 1000 else decimal.Decimal(digits)


def _decimal(digits: str) -> decimal.Decimal:
    try:
        return decimal.Decimal(digits)
    except decimal.InvalidOperation as error:
        raise BadRequestError(f"the number {digits[:40]} has an exponent beyond all sense") from error


def _refuse_constant(name: str) -> Any:
    raise BadRequestError(f"the body is not valid JSON: {name} is no JSON value")


def _other_encoding(body: bytes) -> str | None:
    head = body[:4]
    if head.startswith((b"\xff\xfe\x00\x00", b"\x00\x00\xfe\xff")) or (
        len(head) == 4 and head[:3] == b"\0\0\0"
    ):
        return "UTF-32"
    # JSON begins with an ASCII character, so a zero byte beside it is UTF-16 without its mark.
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or (len(head) >= 2 and 0 in head[:2]):
        return "UTF-16"
    return None


def _refuse_surrogates(value: Any) -> None:
    for place, text, is_name in _texts(value):
        if text.isascii():
            continue
        try:
            text.encode()
        except UnicodeEncodeError as error:
            if is_name:
                raise UnprocessableError("the body has a field whose name is not valid Unicode") from error
            raise UnprocessableError(
                f"{place}: has a lone surrogate at character {error.start}; it must be valid Unicode"
            ) from error


def _texts(value: Any) -> Iterator[tuple[str, str, bool]]:
    """Every text in a value with its place, names of fields too. Names come before what they name."""
    waiting: list[tuple[str, Any]] = [("", value)]
    while waiting:
        place, item = waiting.pop()
        if isinstance(item, str):
            yield place or "the body", item, False
        elif isinstance(item, Mapping):
            for name in item:
                yield place, name, True
            waiting += [(_join(place, name), inner) for name, inner in item.items()]
        elif isinstance(item, list):
            waiting += [(_join(place, str(number)), inner) for number, inner in enumerate(item)]


def _join(place: str, part: str) -> str:
    return f"{place}.{part}" if place else part


@dataclass(frozen=True)
class FilterSize:
    """Conditions of a filter, members of its lists, and how deeply it is nested."""

    conditions: int
    members: int
    levels: int


def measure_filter(value: Any) -> FilterSize:
    """Counts what any reading of a filter would meet, in one pass that no depth breaks."""
    conditions = members = levels = 0
    waiting: list[tuple[Any, int]] = [(value, 1)]
    while waiting:
        item, level = waiting.pop()
        inner = item
        if isinstance(item, Mapping):
            conditions += len(item)
            inner = item.values()
        else:
            members += len(item)
        levels = max(levels, level)
        waiting += [(part, level + 1) for part in inner if isinstance(part, (Mapping, list))]
    return FilterSize(conditions, members, levels)
