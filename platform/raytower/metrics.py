"""Metrics of rankings, classifications and pair scores, in NumPy alone.

Per-query values come back as arrays, so that a caller can average them, find the worst query or bootstrap an
interval. Array shapes: Q queries, D the deepest cut-off, N scored items.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

from raytower.errors import InputError

MRR_DEPTH = 10
NDCG_DEPTH = 10
# Resampled values held at once by the bootstrap (8 bytes of index and 8 of value each).
_BOOTSTRAP_BLOCK = 1 << 21
_CLASS_METRICS = ("precision", "recall", "f1")

Floats = NDArray[np.float64]


def ranking_metrics(
    ranked_ids: Sequence[Sequence[str]],
    relevant: Sequence[Mapping[str, float]],
    ks: Sequence[int],
    mrr_ks: Sequence[int] = (MRR_DEPTH,),
    ndcg_ks: Sequence[int] = (NDCG_DEPTH,),
) -> dict[str, Floats]:
    """Score one ranked list per query against its graded judgements.

    - `recall@k`: relevant documents among the first k, divided by all relevant documents of the query, as in
      trec_eval and BEIR.
    - `hit@k`: 1 where at least one relevant document is among the first k. Where every query has one relevant
      document the two are equal; systems that call this one "Recall@k" mean `hit@k`.
    - `mrr@k`: 1 / rank of the first relevant document among the first k, else 0; `mrr@10` unless told.
    - `ndcg@k`: gains as judged (linear), discount log2(rank + 1), against the ideal order of all judged
      documents; `ndcg@10` unless told.

    A document is relevant when its judgement is above 0. An id that a list repeats counts only at its
    first place.

    Args:
        ranked_ids: for each query the document ids, best first; lists may be shorter than a cut-off.
        relevant: for each query, judgement by document id.
        ks: cut-offs of recall and hit.
        mrr_ks: cut-offs of MRR.
        ndcg_ks: cut-offs of nDCG.

    Returns:
        Metric name to one value per query, float64 [Q].

    Raises:
        InputError: lists differ in number, a cut-off is below 1, or a query has no relevant document: its
            recall is undefined, so such queries must be left out (and counted) by the caller.
    """
    if len(ranked_ids) != len(relevant):
        raise InputError(
            f"{len(ranked_ids)} ranked lists for {len(relevant)} sets of judgements; there must be as many"
        )
    if not ks or min([*ks, *mrr_ks, *ndcg_ks]) < 1:
        raise InputError(
            f"cut-offs are {list(ks)}, of MRR {list(mrr_ks)} and of nDCG {list(ndcg_ks)}; give at least one, each 1 or "
            "more"
        )
    deepest_ndcg = max(ndcg_ks, default=0)
    depth = max([*ks, *mrr_ks, deepest_ndcg])
    gains, ideal, num_relevant = _gains(ranked_ids, relevant, depth, deepest_ndcg)
    found = gains > 0
    metrics: dict[str, Floats] = {}
    for k in ks:
        hits = found[:, :k].sum(axis=1)
        metrics[f"recall@{k}"] = hits / num_relevant
        metrics[f"hit@{k}"] = (hits > 0).astype(np.float64)
    for k in mrr_ks:
        metrics[f"mrr@{k}"] = reciprocal_rank(found[:, :k])
    discount = 1.0 / np.log2(np.arange(2, deepest_ndcg + 2))
    for k in ndcg_ks:
        metrics[f"ndcg@{k}"] = (gains[:, :k] @ discount[:k]) / (ideal[:, :k] @ discount[:k])
    return metrics


def _gains(
    ranked_ids: Sequence[Sequence[str]],
    relevant: Sequence[Mapping[str, float]],
    depth: int,
    ideal_depth: int,
) -> tuple[Floats, Floats, Floats]:
    """(Q, depth) gains of what was found, (Q, ideal_depth) in the ideal order, and (Q,) relevant documents.

    Raises:
        InputError: a query has no relevant document.
    """
    gains = np.zeros((len(ranked_ids), depth))  # [Q, D]
    ideal = np.zeros((len(ranked_ids), ideal_depth))
    num_relevant = np.zeros(len(ranked_ids))
    for row, (ids, judged) in enumerate(zip(ranked_ids, relevant, strict=True)):
        positive = sorted((gain for gain in judged.values() if gain > 0), reverse=True)
        if not positive:
            raise InputError(
                f"query number {row} has no relevant document; leave it out before computing metrics"
            )
        num_relevant[row] = len(positive)
        ideal[row, : len(positive)] = positive[:ideal_depth]
        gains[row, : len(ids)] = _gains_in_order(ids[:depth], judged)
    return gains, ideal, num_relevant


def _gains_in_order(ids: Sequence[str], judged: Mapping[str, float]) -> list[float]:
    seen: set[str] = set()
    gains = []
    for doc_id in ids:
        gains.append(0.0 if doc_id in seen else max(float(judged.get(doc_id, 0.0)), 0.0))
        seen.add(doc_id)
    return gains


def reciprocal_rank(found: NDArray[np.bool_]) -> Floats:
    """1 / (place of the first True, counted from 1) in each row of `found` [Q, D]; 0 where a row has none."""
    if found.shape[1] == 0:
        return np.zeros(found.shape[0])
    first = found.argmax(axis=1)
    return np.where(found.any(axis=1), 1.0 / (first + 1), 0.0)


def accuracy(predicted: Sequence[object], expected: Sequence[object]) -> float:
    """Share of places where both agree. Raises InputError for lengths that differ or no items."""
    if len(predicted) != len(expected) or not expected:
        raise InputError(
            f"{len(predicted)} predictions for {len(expected)} labels; give as many of each, at least one"
        )
    return sum(a == b for a, b in zip(predicted, expected, strict=True)) / len(expected)


def macro_f1(predicted: Sequence[str], expected: Sequence[str]) -> float:
    """F1 as `ClassScores` counts it. Raises InputError for lengths that differ or no items."""
    if len(predicted) != len(expected):
        raise InputError(f"{len(predicted)} predictions for {len(expected)} labels; give as many of each")
    scores = ClassScores()
    for label, right in zip(predicted, expected, strict=True):
        scores.add(label, right)
    return scores.macro()["f1_macro"]


class ClassScores:
    """Precision, recall and F1 of a single-label classification, counted as the rows pass.

    For a class with t rows right, p rows predicted and e rows expected:

        precision = t / p,    recall = t / e,    F1 = 2·t / (p + e),    0 where the divisor is 0

    The macro mean goes over every class that was expected or predicted, each counting the same however rare it is.
    The memory is that of the classes, not of the rows.
    """

    def __init__(self) -> None:
        self._right: Counter[str] = Counter()
        self._predicted: Counter[str] = Counter()
        self._expected: Counter[str] = Counter()

    def add(self, predicted: str, expected: str, rows: int = 1) -> None:
        """Count a row, or several alike."""
        self._predicted[predicted] += rows
        self._expected[expected] += rows
        if predicted == expected:
            self._right[expected] += rows

    def per_class(self) -> dict[str, dict[str, float]]:
        """`precision`, `recall`, `f1` and `rows` (expected ones) of each class, in the order of the names.

        Raises InputError where no row was counted.
        """
        classes = self._predicted.keys() | self._expected.keys()
        if not classes:
            raise InputError("no rows were classified; precision and recall need at least one")
        scores = {}
        for name in sorted(classes):
            right, predicted, expected = self._right[name], self._predicted[name], self._expected[name]
            scores[name] = {
                "precision": right / predicted if predicted else 0.0,
                "recall": right / expected if expected else 0.0,
                "f1": 2 * right / (predicted + expected),
                "rows": expected,
            }
        return scores

    def macro(self) -> dict[str, float]:
        """`precision_macro`, `recall_macro` and `f1_macro`. Raises InputError where no row was counted."""
        scores = self.per_class().values()
        return {f"{name}_macro": sum(one[name] for one in scores) / len(scores) for name in _CLASS_METRICS}

    def means(self) -> dict[str, float]:
        """What `macro` gives, the same weighted by the expected rows of each class (`f1_weighted`), and `f1_micro`.

        A row has one label and gets one, so that precision, recall and F1 over all rows are one number, the accuracy.
        Raises InputError where no row was counted.
        """
        scores = self.per_class().values()
        num_rows = sum(one["rows"] for one in scores)
        weighted = {
            f"{name}_weighted": sum(one[name] * one["rows"] for one in scores) / num_rows
            for name in _CLASS_METRICS
        }
        return {**self.macro(), **weighted, "f1_micro": sum(self._right.values()) / num_rows}


def midranks(values: ArrayLike) -> Floats:
    """Rank of each value from 1; equal values share the mean of their ranks. Float64 [N]."""
    _, inverse, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2.0)[inverse]


def auc(scores: ArrayLike, labels: ArrayLike) -> float:
    """Area under the ROC curve: the chance that a positive scores above a negative, a tie counting half.

    Args:
        scores: float [N]; any monotone scale.
        labels: 0 or 1 [N].

    Raises:
        InputError: lengths differ, a score is not finite, a label is neither 0 nor 1, or a class is missing.
    """
    values, positive = _checked(scores, labels)
    num_positive = int(positive.sum())
    num_negative = len(positive) - num_positive
    if not num_positive or not num_negative:
        only = 1 if num_positive else 0
        raise InputError(f"all {len(positive)} labels are {only}; AUC needs pairs of both classes, 0 and 1")
    rank_sum = midranks(values)[positive].sum()
    return float((rank_sum - num_positive * (num_positive + 1) / 2) / (num_positive * num_negative))


def auc_between(relevant: Floats, others: Floats) -> float:
    """As `auc`, of the scores of one class [P] and of the other [N], which are finite and at least one each."""
    falling = np.sort(others)
    below = np.searchsorted(falling, relevant, side="left") + np.searchsorted(falling, relevant, side="right")
    return float(below.sum() / (2 * len(relevant) * len(others)))


def accuracy_f1(scores: ArrayLike, labels: ArrayLike, threshold: float) -> tuple[float, float]:
    """Accuracy and F1 of the class 1 of N scores and labels, [N] each; `score >= threshold` predicts 1.

    F1 is 0 where nothing is found.

    Raises:
        InputError: as `auc`, except that one class alone is fine.
    """
    values, positive = _checked(scores, labels)
    predicted = values >= threshold
    true_positive = int((predicted & positive).sum())
    num_claims = int(predicted.sum()) + int(positive.sum())
    return float((predicted == positive).mean()), 2 * true_positive / num_claims if num_claims else 0.0


def best_threshold(scores: ArrayLike, labels: ArrayLike) -> float:
    """The threshold with the highest accuracy on these very scores [N] and labels [N]; ties take the lowest one.

    The result is one of the scores, or just above the highest where predicting 0 always is best. An accuracy
    measured with it on the same pairs flatters: apply it to others.
    """
    values, positive = _checked(scores, labels)
    candidates, inverse = np.unique(values, return_inverse=True)
    positives_at = np.bincount(inverse, weights=positive, minlength=len(candidates))
    negatives_at = np.bincount(inverse, weights=~positive, minlength=len(candidates))
    # At threshold candidates[i]: positives at or above it and negatives below it are right.
    positives_above = np.append(np.cumsum(positives_at[::-1])[::-1], 0)
    negatives_below = np.append(0, np.cumsum(negatives_at))
    choice = int(np.argmax(positives_above + negatives_below))
    return (
        float(candidates[choice]) if choice < len(candidates) else float(np.nextafter(candidates[-1], np.inf))
    )


def spearman(scores: ArrayLike, labels: ArrayLike) -> float:
    """Spearman's rank correlation of [N] and [N] with midranks; NaN where either side is constant.

    Raises:
        InputError: lengths differ, there are fewer than two items, or a score or label is not finite.
    """
    for name, values in (("scores", scores), ("labels", labels)):
        wrong = ~np.isfinite(np.asarray(values, dtype=np.float64))
        if wrong.any():
            raise InputError(f"{int(wrong.sum())} {name} are not finite; every one must be a number")
    left, right = midranks(scores), midranks(labels)
    if len(left) != len(right) or len(left) < 2:
        raise InputError(f"{len(left)} scores for {len(right)} labels; give as many of each, at least two")
    left, right = left - left.mean(), right - right.mean()
    norm = float(np.sqrt((left @ left) * (right @ right)))
    return float(left @ right) / norm if norm else float("nan")


def bootstrap_interval(
    values: ArrayLike, seed: int = 0, samples: int = 1000, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `values` [N]: the same seed gives the same interval.

    Raises:
        InputError: no values, values that are not finite, fewer than one sample, or a level outside (0, 1).
    """
    array = np.asarray(values, dtype=np.float64).ravel()
    if not len(array) or not np.isfinite(array).all():
        raise InputError(f"a bootstrap over {len(array)} values needs at least one, all finite")
    if samples < 1 or not 0 < level < 1:
        raise InputError(
            f"bootstrap samples {samples} and level {level}: need samples >= 1 and 0 < level < 1"
        )
    generator = np.random.default_rng(seed)
    block = max(1, _BOOTSTRAP_BLOCK // len(array))
    means = np.empty(samples)
    for start in range(0, samples, block):
        stop = min(start + block, samples)
        means[start:stop] = array[generator.integers(len(array), size=(stop - start, len(array)))].mean(
            axis=1
        )
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def wilson_interval(right: int, trials: int, level: float = 0.95) -> tuple[float, float]:
    """Interval of the share of `right` among `trials`, by the score test (Wilson 1927, JASA 22:209).

    With z the normal quantile of the level, p = right / trials and n = trials:

        (p + z²/2n ± z √(p(1 - p)/n + z²/4n²)) / (1 + z²/n)

    It lies within 0 and 1, and 3 of 3 give [0.44, 1], where a bootstrap draws nothing but ones and gives [1, 1].

    Raises:
        InputError: no trials, or not 0 <= right <= trials.
    """
    if trials < 1 or not 0 <= right <= trials:
        raise InputError(
            f"{right} right of {trials} trials; give at least one trial, and no more right than that"
        )
    z = NormalDist().inv_cdf((1 + level) / 2)
    share, square = right / trials, z * z / trials
    middle = share + square / 2
    half = z * math.sqrt(share * (1 - share) / trials + square / (4 * trials))
    # Rounding may miss the edges, which are exact where none or all are right.
    low = 0.0 if right == 0 else (middle - half) / (1 + square)
    high = 1.0 if right == trials else (middle + half) / (1 + square)
    return low, high


def mean_interval(values: ArrayLike, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean of `values` [N]: Wilson's where each is 0 or 1, else a bootstrap by `seed`.

    Raises:
        InputError: as `bootstrap_interval`.
    """
    array = np.asarray(values, dtype=np.float64).ravel()
    if len(array) and ((array == 0) | (array == 1)).all():
        return wilson_interval(int(array.sum()), len(array))
    return bootstrap_interval(array, seed=seed)


def _checked(scores: ArrayLike, labels: ArrayLike) -> tuple[Floats, NDArray[np.bool_]]:
    values = np.asarray(scores, dtype=np.float64).ravel()
    classes = np.asarray(labels, dtype=np.float64).ravel()
    if len(values) != len(classes) or not len(values):
        raise InputError(
            f"{len(values)} scores for {len(classes)} labels; give as many of each, at least one"
        )
    if not np.isfinite(values).all():
        raise InputError(
            f"{int((~np.isfinite(values)).sum())} scores are not finite; every score must be a number"
        )
    wrong = classes[(classes != 0) & (classes != 1)]
    if len(wrong):
        raise InputError(f"label {wrong[0]:g} is neither 0 nor 1; this metric needs two classes")
    return values, classes == 1
