"""Checks of what other programs hand over: texts where texts are meant, each mistake said with its place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from raytower.errors import InputError


def texts_of(values: Any, name: str) -> list[str]:
    """`values` as a list of strings.

    Raises:
        InputError: one string where several are meant, no list (such as a data frame), or an element that is no string.
    """
    if isinstance(values, str | bytes) or not isinstance(values, Sequence | Iterator):
        raise InputError(f"{name} is {shown(values)}; it must be a list of strings{_remedy(values)}")
    texts = list(values)
    for place, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(f"{name}[{place}] is {shown(text)}; every text must be a string")
    return texts


def _remedy(values: Any) -> str:
    if isinstance(values, str):
        return f": write [{values[:20]!r}]" if len(values) <= 20 else ": put it into a list"
    return f": call list() on it, or pick one column of this {type(values).__name__}"


def shown(value: Any) -> str:
    """A value for a message, with its type."""
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} (of type {type(value).__name__})"
