"""Scores that are written to files: a reranker's logits, of which none may be infinite or no number."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from raytower.errors import InputError
from raytower.retrieval.retriever import PairScorer


def finite_logits(
    scorer: PairScorer, queries: Sequence[str], documents: Sequence[str], *, name: str | None, role: str
) -> NDArray[np.float32]:
    """The logits, float32 (N,), of the pairs (queries[i], documents[i]).

    Args:
        scorer: the reranker.
        queries: N texts.
        documents: N texts.
        name: the reranker's, for messages.
        role: the key of the config that names it, such as `reranker` or `teacher`.

    Raises:
        InputError: a logit is infinite or no number; the first such query is named.
    """
    logits = scorer.score(queries, documents)
    bad = np.flatnonzero(~np.isfinite(logits))
    if len(bad):
        raise InputError(
            f"{role} {name!r} scores query {queries[bad[0]][:80]!r} with {logits[bad[0]]}; scores must be finite; set "
            f"dtype to float32, or name another {role}"
        )
    return logits
