"""Texts of strangers inside HTML and SVG."""

from __future__ import annotations

import html
import json
import re
from typing import Any

SHOWN_CHARACTERS = 400
# XML, which an SVG file is, has no place for them; lone surrogates cannot be encoded. Marks that turn the direction of
# writing would turn what stands beside the text too.
_FORBIDDEN = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff\u202a-\u202e\u2066-\u2069]"
)


def escaped(value: Any, most: int = SHOWN_CHARACTERS) -> str:
    """A text, or another value as JSON, for an element or a quoted attribute; cut to `most` characters."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = _FORBIDDEN.sub("\ufffd", text)
    return html.escape(text if len(text) <= most else text[: max(most - 2, 1)] + " …")


def text_width(text: str, size: float = 12) -> float:
    """About how wide a text of some font size is, in the same unit; East Asian characters are as wide as high."""
    return sum(size if ord(character) >= 0x1100 else size * 0.56 for character in text)


def fitted(text: str, width: float, size: float = 12) -> str:
    """A text cut to a width; not escaped yet."""
    if text_width(text, size) <= width:
        return text
    while text and text_width(text + "…", size) > width:
        text = text[:-1]
    return text + "…"
