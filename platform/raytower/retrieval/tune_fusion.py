"""Tuning the weight between recall score and rerank logit on queries with known answers."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from raytower.errors import InputError
from raytower.metrics import MRR_DEPTH, reciprocal_rank
from raytower.models.directory import INFO_NAME
from raytower.models.fusion import Fusion
from raytower.progress import Progress
from raytower.retrieval.retriever import Retriever, num_spare, without_own
from raytower.storage import Location

# Divided, not summed up, so that each of 0, 0.05 … 1 is the float nearest to what is written.
WEIGHTS = tuple(step / 20 for step in range(21))


@dataclass(frozen=True, kw_only=True)
class TunedFusion:
    """A tuned fusion and MRR@10 on the queries it was tuned on: recall alone, reranker alone, both fused.

    `curve` has the MRR@10 at each of `WEIGHTS`.
    """

    fusion: Fusion
    recall_mrr: float
    rerank_mrr: float
    fused_mrr: float
    curve: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _Padded:
    """Candidates of all queries, [Q, K]; `exists` is False where a query has fewer."""

    recall: NDArray[np.float64]
    rerank: NDArray[np.float64]
    relevant: NDArray[np.bool_]
    exists: NDArray[np.bool_]


def tune_fusion(
    recall_scores: Sequence[ArrayLike], rerank_logits: Sequence[ArrayLike], relevance: Sequence[ArrayLike]
) -> Fusion:
    """The weight among 0, 0.05 … 1 with the highest MRR@10. Of equal ones the smallest, which trusts recall more.

    Args:
        recall_scores: for each query the scores [K] of its candidates, best first.
        rerank_logits: the reranker's logits [K] of the same candidates.
        relevance: their judgements [K]; above 0 is relevant. A query without a relevant candidate changes nothing.

    Raises:
        InputError: there are no candidates, or the three differ in length.
    """
    return _best(*_curve(_pad(recall_scores, rerank_logits, relevance)))


def _curve(padded: _Padded) -> tuple[Fusion, tuple[float, ...]]:
    """A fusion by the scales of some candidates, and its MRR@10 at each of `WEIGHTS`."""
    recall, rerank = padded.recall[padded.exists], padded.rerank[padded.exists]
    base = Fusion(
        weight=0.0,
        recall_mean=float(recall.mean()),
        recall_std=_deviation(recall),
        rerank_mean=float(rerank.mean()),
        rerank_std=_deviation(rerank),
    )
    return base, tuple(_mrr(replace(base, weight=weight), padded) for weight in WEIGHTS)


def _best(base: Fusion, curve: Sequence[float]) -> Fusion:
    # index() finds the first of equal values, so the smallest weight. Without rounding, a sum's order would break ties.
    values = [round(value, 12) for value in curve]
    return replace(base, weight=WEIGHTS[values.index(max(values))])


def fused_mrr(
    fusion: Fusion,
    recall_scores: Sequence[ArrayLike],
    rerank_logits: Sequence[ArrayLike],
    relevance: Sequence[ArrayLike],
) -> float:
    """MRR@10 of the candidates ordered by `fusion`; ties keep their order. Arguments as for `tune_fusion`: [K] each."""
    return _mrr(fusion, _pad(recall_scores, rerank_logits, relevance))


def tune_on_queries(
    retriever: Retriever,
    queries: Sequence[str],
    relevant: Sequence[Mapping[str, float]],
    recall_k: int = 100,
    queries_at_once: int = 256,
    own: Sequence[Collection[str]] = (),
) -> TunedFusion:
    """Recall and rerank `queries` with `retriever` (its own fusion is ignored) and tune on the candidates.

    Args:
        retriever: must have a reranker.
        queries: dev queries, never the ones that are evaluated later.
        relevant: judgement by document id, for each query.
        recall_k: documents that are recalled for each query; all of them are reranked.
        queries_at_once: queries that are encoded, searched and reranked together.
        own: ids of documents that are no answer, for each query; see `Judgements.own`.
    """
    recall_scores: list[ArrayLike] = []
    logits: list[ArrayLike] = []
    relevance: list[ArrayLike] = []
    progress = Progress("reranked", "queries", len(queries))
    for start in range(0, len(queries), queries_at_once):
        batch = list(queries[start : start + queries_at_once])
        candidates = without_own(
            retriever.recall(retriever.encode(batch), recall_k + num_spare(own)),
            own[start : start + len(batch)],
            recall_k,
        )
        logits.extend(retriever.score(batch, candidates))
        for items, judged in zip(candidates, relevant[start : start + len(batch)], strict=True):
            recall_scores.append([item.score for item in items])
            relevance.append([judged.get(item.id, 0.0) for item in items])
        progress.advance(len(batch))
    base, curve = _curve(_pad(recall_scores, logits, relevance))
    fusion = replace(_best(base, curve), mode=retriever.mode)
    return TunedFusion(
        fusion=fusion,
        recall_mrr=curve[0],
        rerank_mrr=curve[-1],
        fused_mrr=curve[WEIGHTS.index(fusion.weight)],
        curve=curve,
    )


def store_fusion(reranker: str | Location, tuned: Fusion | TunedFusion) -> None:
    """Store a fusion in the raytower.json of a reranker directory, under `fusion`; the file is replaced atomically.

    Raises:
        InputError: there is no such directory.
    """
    folder = check_stores_fusion(reranker)
    place = folder / INFO_NAME
    info = place.read_json() if place.is_file() else {}
    fusion = tuned.fusion if isinstance(tuned, TunedFusion) else tuned
    info["fusion"] = fusion.to_dict()
    if isinstance(tuned, TunedFusion):
        info["fusion_tuning"] = {key: value for key, value in tuned.to_dict().items() if key != "fusion"}
    place.write_json(info)


def check_stores_fusion(reranker: str | Location) -> Location:
    """The directory of a reranker, which can store a fusion. Raises InputError for a hub id, which cannot."""
    folder = Location.of(reranker)
    if not (folder / "config.json").is_file():
        raise InputError(
            f"reranker {str(reranker)!r} is no directory with a config.json, in which its fusion could be stored; copy "
            "a hub model into a directory first"
        )
    return folder


def _mrr(fusion: Fusion, padded: _Padded) -> float:
    fused = np.where(padded.exists, fusion.fuse(padded.recall, padded.rerank), -np.inf)
    order = np.argsort(-fused, axis=1, kind="stable")[:, :MRR_DEPTH]
    return float(reciprocal_rank(np.take_along_axis(padded.relevant, order, axis=1)).mean())


def _pad(recall: Sequence[ArrayLike], rerank: Sequence[ArrayLike], relevance: Sequence[ArrayLike]) -> _Padded:
    if not len(recall) == len(rerank) == len(relevance):
        raise InputError(
            f"{len(recall)} queries have recall scores, {len(rerank)} logits, {len(relevance)} judgements; "
            "there must be as many of each"
        )
    rows = [
        tuple(np.asarray(part, dtype=np.float64) for part in row)
        for row in zip(recall, rerank, relevance, strict=True)
    ]
    width = max((len(row[0]) for row in rows), default=0)
    if not width:
        raise InputError("no query has a candidate; a fusion cannot be tuned on nothing")
    padded = np.zeros((3, len(rows), width))
    exists = np.zeros((len(rows), width), dtype=bool)
    for number, row in enumerate(rows):
        if not len(row[0]) == len(row[1]) == len(row[2]):
            raise InputError(
                f"query number {number} has {len(row[0])} recall scores, {len(row[1])} logits and {len(row[2])} "
                "judgements; there must be as many of each"
            )
        exists[number, : len(row[0])] = True
        for part in range(3):
            padded[part, number, : len(row[0])] = row[part]
    return _Padded(padded[0], padded[1], padded[2] > 0, exists)


def _deviation(values: NDArray[np.float64]) -> float:
    # Equal scores have no order. Their deviation is rounding noise, and dividing by it would invent an order.
    deviation = float(values.std())
    return deviation if deviation > 1e-9 * max(1.0, float(np.abs(values).max())) else 1.0
