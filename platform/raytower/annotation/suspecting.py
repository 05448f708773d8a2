"""Labels that the votes of other texts contradict: likely mistakes, each with its reason. Pure.

Each row is left out of its own vote, and so is every copy of its text: cross-validation with one row a fold, whose
disagreement marks wrong labels (Brodley and Friedl 1999, Identifying Mislabeled Training Data).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from raytower.annotation.labels import Prediction

COLUMNS = ("text", "label", "suggested", "share", "reason")
_SHOWN_CHARACTERS = 60


@dataclass(frozen=True, slots=True)
class Suspicion:
    """Why a label may be wrong."""

    suggested: str
    share: float
    """Of the votes for the row's own label."""
    reason: str


def suspect(
    label: str,
    ranked: Sequence[Prediction],
    voters: Sequence[tuple[str, float]],
    same: Sequence[str],
    nearest: str | None,
    most_share: float,
) -> Suspicion | None:
    """Whether a row's label is suspected: copies of its text have another one, or its share of the votes is small.

    Args:
        label: the row's own.
        ranked: labels by the share that other texts' votes give them, best first.
        voters: label and score of each of those texts.
        same: labels of the documents with the row's very text, itself among them.
        nearest: the nearest other text.
        most_share: of the votes, with which a label is still suspected.
    """
    share = next((item.score for item in ranked if item.label == label), 0.0)
    others = Counter(other for other in same if other != label)
    if others:
        (other, count), *_ = others.most_common()
        own = sum(copy == label for copy in same)
        reason = f"the same text is labelled {other} ({count} times) and {label} ({own} times)"
        return Suspicion(other, share, reason)
    if not ranked or ranked[0].label == label or share > most_share:
        return None
    best = ranked[0]
    counts = Counter(voter for voter, _ in voters)
    shown = " ".join((nearest or "").split())[:_SHOWN_CHARACTERS]
    reason = (
        f"{counts[best.label]} of the {len(voters)} nearest other texts are {best.label} (share {best.score:.2f}), "
        f"{counts[label]} are {label} (share {share:.2f}); the nearest: {shown}"
    )
    return Suspicion(best.label, share, reason)
