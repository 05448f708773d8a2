"""What the plots of a report show: recall by k, how scores lie, groups of queries, recall against time.

Shape legend: Q queries.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raytower.metrics import NDCG_DEPTH, Floats, auc_between, mean_interval

# Of a retrieval, in the order in which they work.
STAGES = ("encoder", "index", "lexical", "fusion", "run", "reranker")
GROUP_METRIC = f"ndcg@{NDCG_DEPTH}"
_CURVE_KS = (1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100, 200, 300, 500, 700, 1000)
_BINS = 40
# Scores that are kept; of more, those of every second query or fewer.
_MOST_SCORES = 1 << 20
_OUTLIERS = 0.001
# A script has its own name where it has this share of the letters.
_MAIN_SHARE = 0.8
_MOST_SCRIPTS = 7
_LEAST_QUERIES = 5
_NAMES_OF = {"cjk": "Han", "hiragana": "kana", "katakana": "kana", "fullwidth": "Latin", "halfwidth": "kana"}


def curve_ks(ks: Sequence[int], depth: int) -> list[int]:
    """At which k recall is drawn: the cut-offs asked for and others, as deep as the lists are."""
    return sorted({k for k in (*_CURVE_KS, *ks) if k <= depth})


def mean_of(values: Floats, seed: int) -> dict[str, float]:
    """`value`, the mean of [Q], and its 95 % interval from `low` to `high`."""
    low, high = mean_interval(values, seed)
    return {"value": float(values.mean()), "low": low, "high": high}


def recall_by_k(stages: Mapping[str, Mapping[str, Floats]], seed: int) -> list[dict[str, Any]]:
    """For each stage its mean recall at each k it has, with intervals."""
    return [
        {
            "stage": stage,
            "points": [
                {"k": int(name.removeprefix("recall@")), **mean_of(each, seed)}
                for name, each in values.items()
                if name.startswith("recall@")
            ],
        }
        for stage, values in stages.items()
    ]


class ScoreSample:
    """Scores of what was found, relevant and not; of many queries every second, third and so on.

    What a list has twice counts at its first place.
    """

    def __init__(self, num_queries: int, depth: int) -> None:
        self._stride = -(-num_queries * depth // _MOST_SCORES)
        self._relevant: list[float] = []
        self._others: list[float] = []
        self._areas: list[float] = []

    def add(
        self,
        first: int,
        ranked_ids: Sequence[Sequence[str]],
        scores: Sequence[Sequence[float]],
        relevant: Sequence[Mapping[str, float]],
    ) -> None:
        """The hits of the queries from number `first` on, with the judgements above 0 of each."""
        for place, (ids, own, wanted) in enumerate(zip(ranked_ids, scores, relevant, strict=True), first):
            # The first score of each document: later ones are written over.
            once = dict(zip(reversed(ids), reversed(own), strict=True))
            among = [score for doc_id, score in once.items() if wanted.get(doc_id, 0) > 0]
            others = [score for doc_id, score in once.items() if wanted.get(doc_id, 0) <= 0]
            if among and others:
                self._areas.append(auc_between(np.array(among), np.array(others)))
            if place % self._stride == 0:
                self._relevant += among
                self._others += others

    def counted(self) -> dict[str, list[float]]:
        """What was counted, as JSON can hold it, for `add_counted` of another sample."""
        return {"relevant": self._relevant, "others": self._others, "areas": self._areas}

    def add_counted(self, counted: Mapping[str, Sequence[float]]) -> None:
        """The scores of later queries, which another sample of as many queries in all has counted."""
        self._relevant += counted["relevant"]
        self._others += counted["others"]
        self._areas += counted["areas"]

    def areas(self, seed: int) -> dict[str, Any] | None:
        """The chance that a relevant document scores above another one that was found, a tie counting half.

        Returns:
            `by_query`, the mean over queries that have found both kinds, with its interval from `low` to `high`, and
            how many `queries` these are; `pooled`, that of all scores together, or null where the sample lacks a kind.
            None where no query has found both.
        """
        if not self._areas:
            return None
        mean = mean_of(np.array(self._areas), seed)
        pooled = None
        if self._relevant and self._others:
            pooled = auc_between(np.array(self._relevant), np.array(self._others))
        return {
            "by_query": mean["value"],
            "low": mean["low"],
            "high": mean["high"],
            "queries": len(self._areas),
            "pooled": pooled,
        }

    def histogram(self) -> dict[str, Any] | None:
        """`edges` of bins and the counts of `relevant` and `others`; None without a score.

        The first and the last bin hold the thousandth beyond them too.
        """
        every = np.array([*self._relevant, *self._others])
        if not len(every):
            return None
        low, high = np.quantile(every, [_OUTLIERS, 1 - _OUTLIERS]).tolist()
        if high <= low:
            low, high = low - 0.5, high + 0.5
        edges = np.linspace(low, high, _BINS + 1)
        counts = [np.histogram(np.clip(each, low, high), edges)[0] for each in (self._relevant, self._others)]
        return {
            "edges": edges.tolist(),
            "relevant": counts[0].tolist(),
            "others": counts[1].tolist(),
            "every": self._stride,
        }


def query_groups(texts: Sequence[str], values: Floats, seed: int) -> dict[str, list[dict[str, Any]]]:
    """The mean of a metric [Q] over queries of each quarter of lengths in characters (`length`), and of each script."""
    lengths = np.array([len(text) for text in texts])
    bounds = np.unique(np.quantile(lengths, [0.25, 0.5, 0.75], method="higher"))
    quarter = np.searchsorted(bounds, lengths, side="left")
    by_length = []
    for number in np.unique(quarter).tolist():
        places = np.flatnonzero(quarter == number)
        low, high = int(lengths[places].min()), int(lengths[places].max())
        name = f"{low}" if low == high else f"{low}–{high}"
        by_length.append(_group(name, places, values, seed))
    scripts = np.array([script_of(text) for text in texts])
    often = [
        name
        for name, count in Counter(scripts.tolist()).most_common(_MOST_SCRIPTS)
        if count >= _LEAST_QUERIES
    ]
    by_script = [_group(name, np.flatnonzero(scripts == name), values, seed) for name in often]
    rest = np.flatnonzero(~np.isin(scripts, often))
    if len(rest):
        by_script.append(_group("others", rest, values, seed))
    return {"length": by_length, "script": by_script}


def script_of(text: str) -> str:
    """The script of a text's letters, such as Han or Latin, or two where none has four fifths of them.

    Han among kana is Japanese. Scripts are told by the names of Unicode's characters.
    """
    counts = Counter(_script(character) for character in text if character.isalpha())
    total = sum(counts.values())
    if not total:
        return "no letters"
    if counts["kana"]:
        counts["Japanese"] = counts.pop("kana") + counts.pop("Han", 0)
    (first, most), *others = counts.most_common(2)
    if most >= _MAIN_SHARE * total:
        return first
    return " and ".join(sorted([first, others[0][0]]))


def _script(character: str) -> str:
    word = unicodedata.name(character, "other").split(" ")[0].split("-")[0].lower()
    return _NAMES_OF.get(word, word.capitalize())


def _group(name: str, places: NDArray[np.int64], values: Floats, seed: int) -> dict[str, Any]:
    return {"name": name, "queries": len(places), **mean_of(values[places], seed)}
