"""Figures of labels that were given, against those expected: ranks, levels of a tree, chances, abstention, one class.

Shape legend: N rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raytower.annotation.deciding import Decider, Decision
from raytower.annotation.label_page import NO_LABEL
from raytower.annotation.labels import at_level, num_levels
from raytower.errors import import_extra
from raytower.metrics import ClassScores, mean_interval
from raytower.progress import log

Floats = NDArray[np.float64]
HIT_CUTOFFS = (5, 10, 20)
BINS = 10
_SHARES_OF_ROWS = tuple(tenth / 10 for tenth in range(1, 11))


class LabelTally:
    """Counts decisions as the rows pass. Memory is some numbers a row, and the classes."""

    def __init__(self, decider: Decider, cutoffs: Sequence[int], seed: int) -> None:
        """`cutoffs` of `hit@k`, of which each text has so many ranked labels; `seed` of the bootstrap."""
        self._decider = decider
        self._cutoffs = cutoffs
        self._seed = seed
        self._ranks: list[int] = []  # from 1; 0 where the right label was not ranked
        self._scores: list[float] = []
        self._given: list[bool] = []
        self._positive_scores: list[float] = []
        self._is_positive: list[bool] = []
        self._called_positive: list[bool] = []
        # How often each (expected, first label) came about; the label is empty where there was none.
        self._firsts: Counter[tuple[str, str]] = Counter()

    def add(self, decision: Decision, expected: str) -> None:
        """Count a row. A text without a label counts as wrong, but for `accuracy_answered`."""
        order = [item.label for item in decision.ranked]
        self._ranks.append(order.index(expected) + 1 if expected in order else 0)
        self._scores.append(decision.score)
        self._given.append(decision.label is not None)
        first = order[0] if order else ""
        self._firsts[expected, first] += 1
        if (positive := self._decider.positive) is not None:
            self._positive_scores.append(self._decider.score_of(decision.ranked, positive))
            self._is_positive.append(expected == positive)
            self._called_positive.append(first == positive)

    def counted(self) -> dict[str, Any]:
        """What was counted, as JSON can hold it, for `add_counted` of another tally."""
        return {
            "ranks": self._ranks,
            "scores": self._scores,
            "given": self._given,
            "positive_scores": self._positive_scores,
            "is_positive": self._is_positive,
            "called_positive": self._called_positive,
            "firsts": [[expected, first, rows] for (expected, first), rows in self._firsts.items()],
        }

    def add_counted(self, counted: Mapping[str, Any]) -> None:
        """Count the rows of another tally after those of this one, which has the same decider."""
        self._ranks += counted["ranks"]
        self._scores += counted["scores"]
        self._given += counted["given"]
        self._positive_scores += counted["positive_scores"]
        self._is_positive += counted["is_positive"]
        self._called_positive += counted["called_positive"]
        for expected, first, rows in counted["firsts"]:
            self._firsts[expected, first] += rows

    @property
    def pairs(self) -> Counter[tuple[str, str]]:
        """How often each (expected, first label) came about."""
        pairs: Counter[tuple[str, str]] = Counter()
        for (expected, first), rows in self._firsts.items():
            pairs[expected, first or NO_LABEL] += rows
        return pairs

    @property
    def label_counts(self) -> dict[str, int]:
        """Rows that expect each label, in the order of their first ones."""
        counts: dict[str, int] = {}
        for (expected, _), rows in self._firsts.items():
            counts[expected] = counts.get(expected, 0) + rows
        return counts

    def figures(self) -> dict[str, Any]:
        """`accuracy`, `hit@k`, their `intervals`, means of precision, recall and F1, and what else these rows have.

        `levels` where labels are paths; `reliability` and `ece` where scores are chances; `coverage` always;
        `answered`, `accuracy_answered` with a threshold; `positive` with a positive class.
        """
        ranks = np.array(self._ranks)
        values = {"accuracy": ranks == 1}
        values |= {f"hit@{k}": (ranks >= 1) & (ranks <= k) for k in self._cutoffs}
        figures: dict[str, Any] = {
            **{name: float(value.mean()) for name, value in values.items()},
            **self._classes().means(),
            "intervals": {name: list(mean_interval(value, self._seed)) for name, value in values.items()},
        }
        scores, right = np.array(self._scores), ranks == 1
        if self._decider.abstain_below is not None:
            given = np.array(self._given)
            figures["answered"] = float(given.mean())
            figures["accuracy_answered"] = float(right[given].mean()) if given.any() else None
        if self._decider.positive is not None:
            figures["positive"] = self._of_positive(self._decider.positive)
        levels = self._levels()
        if len(levels) > 1:
            figures["levels"] = [
                {"level": number, **level.figures()} for number, level in enumerate(levels, start=1)
            ]
        if self._decider.gives_chances:
            figures["ece"] = expected_calibration_error(scores, right)
            figures["reliability"] = reliability(scores, right)
        figures["coverage"] = coverage_curve(scores, right)
        return figures

    def classes(self) -> dict[str, dict[str, float]]:
        """`precision`, `recall`, `f1` and `rows` of each label."""
        return self._classes().per_class()

    def _classes(self) -> ClassScores:
        classes = ClassScores()
        for (expected, first), rows in self._firsts.items():
            classes.add(first, expected, rows)
        return classes

    def _levels(self) -> list[_Level]:
        levels: list[_Level] = []
        for (expected, first), rows in self._firsts.items():
            for level in range(1, num_levels(expected) + 1):
                if level > len(levels):
                    levels.append(_Level())
                levels[level - 1].add(at_level(first, level), at_level(expected, level), rows)
        return levels

    def _of_positive(self, positive: str) -> dict[str, Any]:
        """Figures of the positive class; null where the rows do not have what one needs."""
        metrics = import_extra("sklearn.metrics")
        expected, called = np.array(self._is_positive), np.array(self._called_positive)
        precision, recall, f1, _ = metrics.precision_recall_fscore_support(
            expected, called, average="binary", zero_division=0.0
        )
        if not expected.any():
            log(f"no row has the label {positive!r}, so it has neither average precision nor recall nor F1")
        return {
            "label": positive,
            "rows": int(expected.sum()),
            "called": int(called.sum()),
            "average_precision": (
                float(metrics.average_precision_score(expected, self._positive_scores))
                if expected.any()
                else None
            ),
            "precision": float(precision) if called.any() else None,
            "recall": float(recall) if expected.any() else None,
            "f1": float(f1) if expected.any() else None,
            "cut": self._decider.cut,
        }


class _Level:
    """One level of the tree, over the rows whose label reaches it."""

    def __init__(self) -> None:
        self._classes = ClassScores()
        self._num_rows = 0
        self._num_right = 0

    def add(self, predicted: str, expected: str, rows: int) -> None:
        self._classes.add(predicted, expected, rows)
        self._num_rows += rows
        self._num_right += rows * (predicted == expected)

    def figures(self) -> dict[str, Any]:
        return {
            "rows": self._num_rows,
            "accuracy": self._num_right / self._num_rows,
            **self._classes.means(),
        }


def reliability(chances: Floats, right: NDArray[np.bool_]) -> list[dict[str, Any]]:
    """How often chances (N,) came true, in BINS of equal width from 0 to 1; a bin without a row is left out.

    A bin holds its lower edge; the last one holds 1 too.
    """
    bins = np.clip((chances * BINS).astype(np.int64), 0, BINS - 1)
    return [
        {
            "from": number / BINS,
            "to": (number + 1) / BINS,
            "rows": int((bins == number).sum()),
            "chance": float(chances[bins == number].mean()),
            "accuracy": float(right[bins == number].mean()),
        }
        for number in np.unique(bins).tolist()
    ]


def expected_calibration_error(chances: Floats, right: NDArray[np.bool_]) -> float:
    """The mean distance of chance and accuracy over the bins of `reliability`, by rows (Naeini et al. 2015)."""
    return sum(
        each["rows"] * abs(each["chance"] - each["accuracy"]) for each in reliability(chances, right)
    ) / len(chances)


def coverage_curve(scores: Floats, right: NDArray[np.bool_]) -> list[dict[str, Any]]:
    """Accuracy of the surest tenth of the rows, of the surest two tenths and so on: what a threshold costs and gives.

    Rows with the score of the last one belong to it too, as a threshold takes them: `coverage` is their true share.
    """
    order = np.argsort(-scores, kind="stable")
    falling, hits = scores[order], np.cumsum(right[order])
    curve: dict[float, dict[str, Any]] = {}
    for share in _SHARES_OF_ROWS:
        threshold = falling[max(1, round(share * len(scores))) - 1]
        count = int(np.searchsorted(-falling, -threshold, side="right"))
        curve[float(threshold)] = {
            "threshold": float(threshold),
            "coverage": count / len(scores),
            "accuracy": float(hits[count - 1] / count),
        }
    return list(curve.values())


def threshold_for(scores: Floats, right: NDArray[np.bool_], min_accuracy: float) -> float | None:
    """The lowest score from which on `min_accuracy` of the rows are right; None where no score gives that."""
    order = np.argsort(-scores, kind="stable")
    falling, accuracy = scores[order], np.cumsum(right[order]) / np.arange(1, len(scores) + 1)
    # A threshold takes all rows of one score.
    ends = np.append(falling[1:] != falling[:-1], True)
    good = np.flatnonzero(ends & (accuracy >= min_accuracy))
    return float(falling[good[-1]]) if len(good) else None
