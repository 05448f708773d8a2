"""Columns of texts in the form in which two of them count as the same; `plain_texts` has it of one text."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc


def normalised(texts: pa.ChunkedArray | pa.Array) -> pa.ChunkedArray | pa.Array:
    """Texts (N,) in Unicode's NFKC and lower case, with single spaces: `Ａ  b ` is `a b`."""
    folded = pc.utf8_lower(pc.utf8_normalize(texts, form="NFKC"))
    return pc.utf8_trim_whitespace(pc.replace_substring_regex(folded, pattern=r"\s+", replacement=" "))
