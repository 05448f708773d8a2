"""What reranking did to the demo's questions: each recalled answer's rank before and after, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from raytower.models.fusion import Fusion
from raytower.retrieval.retriever import Candidate, Retriever

_SHOWN_RANKS = 3
_SHOWN_CHARACTERS = 80


@dataclass(frozen=True, kw_only=True)
class RankedAnswer:
    """A recalled answer with both scores, and its rank from 1 by recall, by the reranker alone, and by both fused."""

    id: str
    text: str
    recall_score: float
    rerank_score: float
    recall_rank: int
    rerank_rank: int
    fused_rank: int

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "text"}


def rank_answers(
    retriever: Retriever, fusion: Fusion, questions: Sequence[str], recall_k: int
) -> list[list[RankedAnswer]]:
    """For each question its recalled answers, best recalled first.

    Args:
        retriever: must have a reranker; its own fusion plays no part.
        fusion: how both scores mix.
        questions: texts.
        recall_k: answers that are recalled for each question; all of them are reranked.
    """
    candidates = retriever.recall(retriever.encode(questions), recall_k)
    logits = retriever.score(questions, candidates)
    return [_rank(items, scores, fusion) for items, scores in zip(candidates, logits, strict=True)]


def _rank(candidates: Sequence[Candidate], logits: ArrayLike, fusion: Fusion) -> list[RankedAnswer]:
    rerank = np.asarray(logits, dtype=np.float64)
    recall = np.array([item.score for item in candidates], dtype=np.float64)
    by_rerank, by_both = _ranks(rerank), _ranks(fusion.fuse(recall, rerank))
    return [
        RankedAnswer(
            id=item.id,
            text=item.text,
            recall_score=float(item.score),
            rerank_score=float(rerank[position]),
            recall_rank=position + 1,
            rerank_rank=by_rerank[position],
            fused_rank=by_both[position],
        )
        for position, item in enumerate(candidates)
    ]


def _ranks(scores: ArrayLike) -> list[int]:
    """The rank of each score, the highest first: 0.2, 0.9, 0.5 have the ranks 3, 1, 2. Ties keep their order."""
    order = np.argsort(-np.asarray(scores), kind="stable")
    return (np.argsort(order) + 1).tolist()


def orders_table(question: str, answers: Sequence[RankedAnswer], weight: float, fused: bool) -> str:
    """A table of the answers that are among the first three in any order.

    Args:
        question: the text.
        answers: its recalled answers.
        weight: of the rerank score in the fused one.
        fused: whether the fused order is served; else the order of recall is.
    """
    recall, both = "recall", f"both (weight {weight:.2f})"
    recall, both = (recall, f"{both}, served") if fused else (f"{recall}, served", both)
    lines = [
        f"\n{question}",
        f"| rank by {recall} | by the reranker | by {both} | recall score | rerank score | answer |",
        "|---" * 6 + "|",
    ]
    for answer in answers:
        if min(answer.recall_rank, answer.rerank_rank, answer.fused_rank) > _SHOWN_RANKS:
            continue
        text = answer.text if len(answer.text) <= _SHOWN_CHARACTERS else answer.text[:_SHOWN_CHARACTERS] + "…"
        lines.append(
            f"| {answer.recall_rank} | {answer.rerank_rank} | {answer.fused_rank} | {answer.recall_score:.3f} "
            f"| {answer.rerank_score:.3f} | [{answer.id}] {text} |"
        )
    return "\n".join(lines)
