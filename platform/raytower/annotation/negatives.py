"""Which recalled documents may be negatives of a training pair, and which of them are taken. Pure functions.

Shape legend: N pairs, K candidates of a query.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from raytower.annotation.config import Sampling
from raytower.data.plain_texts import plain_text
from raytower.retrieval.retriever import Candidate


class KnownPositives:
    """Which documents are positives of a query, by text and by id; at most 32 bytes for each pair.

    Pairs hold in both directions: where `b` is a positive of `a`, `a` is one of `b`. In pairs of texts of one kind,
    such as paraphrases, each text is a query in one row and a document in another. Texts that differ in case, width or
    space alone are one.

    Entries are kept as hashes of 64 bits. Of a thousand million lookups less than one is expected to find a wrong
    entry, and such an error only drops one candidate.
    """

    def __init__(self, keys: NDArray[np.uint64]) -> None:
        """`keys`: the hashes, (entries,), in any order."""
        self._keys = np.unique(keys)

    @staticmethod
    def keys_of(pairs: pa.Table) -> NDArray[np.uint64]:
        """The hashes of pairs with the columns query, document, query_id and document_id, (entries,)."""
        columns = (pairs[name].to_pylist() for name in ("query", "document", "query_id", "document_id"))
        keys = []
        for query, document, query_id, document_id in zip(*columns, strict=True):
            asked, found = plain_text(query), plain_text(document)
            keys.append(_key(asked, "text", found))
            keys.append(_key(found, "text", asked))
            if document_id is not None:
                keys.append(_key(asked, "id", document_id))
            if query_id is not None:
                keys.append(_key(found, "id", query_id))
        return np.array(keys, dtype=np.uint64)

    def include(self, query: str, candidates: Sequence[Candidate]) -> NDArray[np.bool_]:
        """Whether each candidate is a known positive of the text `query`, or has its own text; bool [K]."""
        asked, texts = plain_text(query), [plain_text(item.text) for item in candidates]
        keys = [
            (_key(asked, "text", text), _key(asked, "id", item.id))
            for item, text in zip(candidates, texts, strict=True)
        ]
        known = self._hold(np.array(keys, dtype=np.uint64).reshape(-1, 2)).any(axis=1)
        return known | np.array([text == asked for text in texts], dtype=bool)

    def _hold(self, keys: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Whether each of some hashes, of any shape, is an entry."""
        if not len(self._keys):
            return np.zeros(keys.shape, dtype=bool)
        # Not np.isin, which sorts all entries for each pair: seconds each where there are millions.
        places = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        found: NDArray[np.bool_] = self._keys[places] == keys
        return found


def score_limits(positive: ArrayLike, ratio: float | None, margin: float | None) -> NDArray[np.float64]:
    """The score above which a candidate is too near to be a negative, float64 [N]; infinite without ratio and margin.

    A ratio of 0.95 takes 5 % off a positive's score whatever its sign: of 2.0 the limit is 1.9, of -2.0 it is -2.1.
    The two limits of NV-Retriever (Moreira et al. 2024), "TopK-PercPos" and "TopK-MarginPos".

    Args:
        positive: score of each pair's own document, [N].
        ratio: share of it; None sets no limit.
        margin: what a candidate must lie below it, in scores; None sets no limit.
    """
    scores = np.asarray(positive, dtype=np.float64)
    limits = np.full(scores.shape, np.inf)
    if ratio is not None:
        limits = scores - np.abs(scores) * (1 - ratio)
    if margin is not None:
        limits = np.minimum(limits, scores - margin)
    return limits


def draw_order(
    scores: ArrayLike, sampling: Sampling, temperature: float, generator: np.random.Generator
) -> NDArray[np.int64]:
    """The order in which candidates [K] are taken: the first n of it are the sample of n. Their places, int64 [K].

    - `top`: as they were recalled.
    - `random`: each order is as likely as any other.
    - `score`: without replacement, each time with a chance proportional to exp(score / temperature), by the
      Gumbel-top-k trick (Kool et al. 2019).
    """
    values = np.asarray(scores, dtype=np.float64)
    if sampling == "top":
        return np.arange(len(values))
    if sampling == "random":
        return generator.permutation(len(values))
    return np.argsort(-(values / temperature + generator.gumbel(size=len(values))), kind="stable")


def distinct_texts(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The first candidate of each text."""
    by_text: dict[str, Candidate] = {}
    for item in candidates:
        by_text.setdefault(item.text, item)
    return list(by_text.values())


def _key(query: str, kind: str, value: str) -> int:
    # Lengths part the fields, so that no two triples of strings feed the same bytes.
    content = f"{kind}{len(query)}:{query}{value}".encode()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
