"""Which texts show nothing: empty ones, whitespace, and characters without a glyph.

An encoder's tokenizer drops such characters, so a text of nothing else would leave it with no token.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

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


def shows_nothing(texts: pa.Array) -> np.ndarray:
    """bool [rows]: no character of the text can be seen; null is not such a text."""
    # Trim only from the left: for nearly every text that stops at the first character.
    rest = pc.utf8_ltrim(texts, characters=INVISIBLE)
    return pc.fill_null(pc.equal(pc.binary_length(rest), 0), False).to_numpy(zero_copy_only=False)


def describe_unseen(name: str, text: str) -> str:
    """The reason to reject a row whose `name` is `text`, which shows nothing."""
    return f"the {name} holds only invisible characters" if text.strip() else f"empty {name}"
