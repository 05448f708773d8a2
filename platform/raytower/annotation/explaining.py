"""Which words decide a text's label: what its score loses when each of them is left out.

Leave-one-out (Li et al. 2016, Understanding Neural Networks through Representation Erasure). It asks the labeller
alone, and so holds for nearest labels, votes and classifiers. Pure.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

MOST_PARTS = 64
MOST_SHOWN = 10
# Chinese, Japanese and Korean write no spaces: a character is a part of its own. Else a word is.
_CHARACTER = r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff]"
# Vowel signs and the like belong to the word that they stand in, and re's \w leaves them out; so does don't its sign.
_MARKS = "".join(mark for mark in map(chr, range(0x110000)) if unicodedata.category(mark)[0] == "M")
_PART = re.compile(rf"{_CHARACTER}|(?:(?!{_CHARACTER})\w)(?:(?!{_CHARACTER})[\w{_MARKS}]|['’](?=\w))*")


@dataclass(frozen=True, slots=True)
class Part:
    """A word of a text, or a run of words of a long text: its characters from `start` up to `end`."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Weight:
    """A part, and what the label's score loses without it; below 0 it speaks against the label."""

    word: str
    start: int
    drop: float


def parts_of(text: str, most: int = MOST_PARTS) -> list[Part]:
    """The words of a text in their order; of more than `most`, that many runs of neighbouring ones, about equally long.

    Of "借 loan now" they are 借, loan and now. Punctuation is no part.
    """
    words = [Part(found.start(), found.end()) for found in _PART.finditer(text)]
    if len(words) <= most:
        return words
    ends = [len(words) * number // most for number in range(most + 1)]
    return [Part(words[first].start, words[last - 1].end) for first, last in itertools.pairwise(ends)]


def without(text: str, part: Part) -> str:
    """The text without a part."""
    return text[: part.start] + text[part.end :]


def weigh_parts(text: str, parts: Sequence[Part], score: float, scores: Sequence[float]) -> list[Weight]:
    """The parts by falling loss, at most MOST_SHOWN of them, and none that the label loses nothing without.

    Args:
        score: of the label with the whole text.
        scores: of the same label without each part (P,).
    """
    weights = [
        Weight(text[part.start : part.end], part.start, score - other)
        for part, other in zip(parts, scores, strict=True)
    ]
    return sorted((each for each in weights if each.drop > 0), key=lambda each: -each.drop)[:MOST_SHOWN]


def in_words(weights: Sequence[Weight]) -> str:
    """One cell for people: `借 0.312, 钱 0.201`."""
    return ", ".join(f"{' '.join(each.word.split())} {each.drop:.3f}" for each in weights)
