"""Stand-ins for what retrieval needs: an encoder of words, a scorer by table, an exact index in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raytower.retrieval.retriever import Candidate


class WordEncoder:
    """Counts of known words, normalised: the cosine of two texts can be worked out by hand."""

    def __init__(self, vocabulary: Sequence[str]) -> None:
        self.vocabulary = list(vocabulary)
        self.seen: list[str] = []

    def encode(self, texts: Sequence[str], prefix: str = "") -> NDArray[np.float32]:
        self.seen += [prefix + text for text in texts]
        counts = np.array(
            [[(prefix + text).split().count(word) for word in self.vocabulary] for text in texts],
            dtype=np.float32,
        ).reshape(len(texts), len(self.vocabulary))
        norms = np.linalg.norm(counts, axis=1, keepdims=True)
        return np.divide(counts, norms, out=np.zeros_like(counts), where=norms > 0)


@dataclass
class TableScorer:
    """Looks a pair's logit up by the document's text."""

    logits: Mapping[str, float]
    calls: list[list[tuple[str, str]]] = field(default_factory=list)

    def score(self, queries: Sequence[str], documents: Sequence[str]) -> NDArray[np.float32]:
        self.calls.append(list(zip(queries, documents, strict=True)))
        return np.array([self.logits[text] for text in documents], dtype=np.float32)


class ListIndex:
    """Exact search over a few texts, with the interface of an Index."""

    def __init__(self, encoder: WordEncoder, texts: Mapping[str, str]) -> None:
        self._ids = list(texts)
        self._texts = list(texts.values())
        self._vectors = encoder.encode(self._texts)
        encoder.seen.clear()

    def search(self, vectors: NDArray[np.float32], k: int, *, filter: object = None) -> Any:
        assert filter is None, "this stand-in has no metadata to filter on"
        scores = vectors @ self._vectors.T
        rows = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        return SimpleNamespace(scores=np.take_along_axis(scores, rows, axis=1), rows=rows)

    def documents(self, rows: NDArray[np.int64]) -> list[Any]:
        return [
            SimpleNamespace(id=self._ids[row], text=self._texts[row], metadata={"row": int(row)})
            for row in rows
        ]


def candidates(scores: Mapping[str, float]) -> list[Candidate]:
    """Candidates whose id and text are the key, in the order given."""
    return [Candidate(name, name, {}, score) for name, score in scores.items()]
