"""Precision, recall and F1 of a single-label classification, each the mean over classes, counted as the rows pass.

For a class with t rows right, p rows predicted and e rows expected:

    precision = t / p,    recall = t / e,    F1 = 2·t / (p + e),    0 where the divisor is 0

The macro mean goes over every class that was expected or predicted, each counting the same however rare it is.
"""

from __future__ import annotations

from collections import Counter

from raytower.errors import InputError


class ClassScores:
    """Counts by class; the memory is that of the classes, not of the rows."""

    def __init__(self) -> None:
        self._right: Counter[str] = Counter()
        self._predicted: Counter[str] = Counter()
        self._expected: Counter[str] = Counter()

    def add(self, predicted: str, expected: str) -> None:
        """Count one row."""
        self._predicted[predicted] += 1
        self._expected[expected] += 1
        if predicted == expected:
            self._right[expected] += 1

    def macro(self) -> dict[str, float]:
        """`precision_macro`, `recall_macro` and `f1_macro`. Raises InputError where no row was counted."""
        classes = self._predicted.keys() | self._expected.keys()
        if not classes:
            raise InputError("no rows were classified; precision and recall need at least one")
        totals = {"precision_macro": 0.0, "recall_macro": 0.0, "f1_macro": 0.0}
        for name in sorted(classes):
            right, predicted, expected = self._right[name], self._predicted[name], self._expected[name]
            totals["precision_macro"] += right / predicted if predicted else 0.0
            totals["recall_macro"] += right / expected if expected else 0.0
            totals["f1_macro"] += 2 * right / (predicted + expected)
        return {metric: total / len(classes) for metric, total in totals.items()}
