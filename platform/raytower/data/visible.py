"""Which texts show nothing: empty ones, whitespace, and characters without a glyph.

An encoder's tokenizer drops such characters, so a text of nothing else would leave it with no token.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raytower.data.unseen import INVISIBLE


def shows_nothing(texts: pa.Array) -> np.ndarray:
    """bool [rows]: no character of the text can be seen; null is not such a text."""
    # Trim only from the left: for nearly every text that stops at the first character.
    rest = pc.utf8_ltrim(texts, characters=INVISIBLE)
    return pc.fill_null(pc.equal(pc.binary_length(rest), 0), False).to_numpy(zero_copy_only=False)


def describe_unseen(name: str, text: str) -> str:
    """The reason to reject a row whose `name` is `text`, which shows nothing."""
    return f"the {name} holds only invisible characters" if text.strip() else f"empty {name}"
