"""Characters that show nothing. No NumPy and no Arrow: a config checks a text at no cost."""

from __future__ import annotations

# First and last character of each run: whitespace (Unicode's White_Space), control characters (category Cc), format
# characters (category Cf) that have no glyph, and variation selectors.
_RUNS = (
    ("\u0000", "\u0020"),
    ("\u007f", "\u00a0"),
    ("\u00ad", "\u00ad"),  # soft hyphen
    ("\u061c", "\u061c"),  # Arabic letter mark
    ("\u1680", "\u1680"),
    ("\u180e", "\u180e"),
    ("\u2000", "\u200f"),  # spaces, zero-width space, joiners, direction marks
    ("\u2028", "\u202f"),  # separators, directional embeddings
    ("\u205f", "\u2064"),  # word joiner, invisible operators
    ("\u2066", "\u206f"),
    ("\u3000", "\u3000"),
    ("\ufe00", "\ufe0f"),  # variation selectors
    ("\ufeff", "\ufeff"),  # byte order mark
    ("\ufff9", "\ufffb"),  # interlinear annotation
)
INVISIBLE = "".join(chr(code) for first, last in _RUNS for code in range(ord(first), ord(last) + 1))


def is_unseen(text: str) -> bool:
    """Whether no character of the text can be seen: it is empty, or blank to people."""
    return not text.lstrip(INVISIBLE)
