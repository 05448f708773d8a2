"""Doctests of docstrings become blocks of code; as text, `>>>` would be a quotation and `[0]["id"]` a link."""

from __future__ import annotations

import re
from typing import Any

import griffe


class Doctests(griffe.Extension):
    """Told by griffe of every object that it reads."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)


def fenced(text: str) -> str:
    """`text` with a fence around each paragraph that begins with `>>>`."""
    # What griffe hands over is dedented already.
    return re.sub(r"(?:(?<=\n\n)|^)>>> .+?(?=\n\n|$(?!\n))", r"```pycon\n\g<0>\n```", text, flags=re.DOTALL)
