"""One text in the form in which two of them count as the same. Imports no library of data."""

from __future__ import annotations

import re
import unicodedata


def plain_text(text: str) -> str:
    """A text in Unicode's NFKC and lower case, with single spaces: `Ａ  b ` is `a b`. See `normalised` of columns."""
    return re.sub(r"\s+", " ", unicodedata.normalize("NFKC", text).lower()).strip()
