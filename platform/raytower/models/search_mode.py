"""The modes of search. A module of its own, since configs name them and import no NumPy."""

from __future__ import annotations

from typing import Literal

SearchMode = Literal["dense", "lexical", "hybrid"]
"""Documents are recalled by vectors, by words (BM25), or by both."""
