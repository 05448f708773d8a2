"""Texts for a terminal: what would move its cursor, colour it or turn its lines around is shown by its code."""

from __future__ import annotations

import re

# Control characters (Unicode's Cc), line and paragraph separators, and what sets or overrides the direction of text.
_CONTROLS = "\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069"
_ALL = re.compile(f"[{_CONTROLS}]")
_IN_LINES = re.compile(rf"(?![\n\t])[{_CONTROLS}]")
_COLOURS = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")


def one_cell(text: str) -> str:
    """`text` as part of a line: line breaks and tabs are shown by their codes too."""
    return _ALL.sub(_code, text)


def lines(text: str) -> str:
    """`text` with its own line breaks and tabs."""
    return _IN_LINES.sub(_code, text)


def without_colours(text: str) -> str:
    """A line that another program wrote for a terminal: colours left out, all else as in `lines`."""
    return lines(_COLOURS.sub("", text))


def in_json(text: str) -> str:
    """JSON of the same value; JSON itself escapes only the first 32 control characters."""
    return _ALL.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def _code(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode()
