"""Columns of texts in the form in which two of them count as the same; `plain_texts` has it of one text."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

_SPACES = r"[\s\p{Z}\x1c-\x1f\x85]+"  # Python's \s, as RE2 writes it, whose own is that of ASCII


def normalised(texts: pa.ChunkedArray | pa.Array) -> pa.ChunkedArray | pa.Array:
    """Texts (N,) in Unicode's NFKC and lower case, with single spaces: `Ａ  b ` is `a b`."""
    folded = pc.utf8_lower(pc.utf8_normalize(texts, form="NFKC"))
    return pc.utf8_trim_whitespace(pc.replace_substring_regex(folded, pattern=_SPACES, replacement=" "))
