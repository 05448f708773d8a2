"""Labels of the same parent as hard negatives of labelled rows: `A##C` and `A##D` of `A##B`, and not `E##F`. Pure.

Which siblings a text gets depends on the seed and the text alone: the same on any number of workers, in a run that goes
on, and in every epoch. The texts of one label get different ones, so that all are met.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

LEVEL_MARK = "##"
Siblings = Mapping[str, Sequence[str]]


def siblings_of(labels: Iterable[str]) -> dict[str, list[str]]:
    """Of each label the others of the same parent, sorted; labels of one level are the root's.

    A label above or below another one is no sibling of it: `A` is no negative of a text of `A##B`.
    """
    children: defaultdict[str, list[str]] = defaultdict(list)
    for label in sorted(set(labels)):
        children[label.rpartition(LEVEL_MARK)[0]].append(label)
    return {label: [other for other in own if other != label] for own in children.values() for label in own}


def draw_siblings(
    texts: Sequence[str], labels: Sequence[str], siblings: Siblings, count: int, seed: int
) -> list[list[str | None]]:
    """`count` columns of labels, no label twice in a row; None where a label has fewer siblings.

    Args:
        texts: (B,) which decide, with the seed, what is drawn.
        labels: (B,) of these texts.
        siblings: as `siblings_of`.
    """
    drawn: list[list[str | None]] = []
    for text, label in zip(texts, labels, strict=True):
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        random = np.random.default_rng([seed, int.from_bytes(digest, "little")])
        own = siblings[label]
        chosen: list[str | None] = [own[place] for place in random.permutation(len(own))[:count]]
        drawn.append(chosen + [None] * (count - len(chosen)))
    return [list(column) for column in zip(*drawn, strict=True)]
