"""How an index is searched: by vectors, by words or by both. Imports neither FAISS nor Lance."""

from __future__ import annotations

from typing import Literal

from raytower.config import Config, FractionField

HybridWay = Literal["standardised", "reciprocal_ranks"]


class HybridConfig(Config):
    """How mode hybrid makes one score of a document's dense and its lexical one (`index/hybrid.py`)."""

    fusion: HybridWay | None = None
    """standardised adds both scores, each standardised over the candidates of the query; reciprocal_ranks adds 1 / (60
    + rank). Null is the way that the index was tuned for by tune-fusion, else standardised."""
    weight: FractionField | None = None
    """Share of the lexical score; null is the one that was tuned for this index and this way, else 0.3."""
