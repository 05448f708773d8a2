"""The metrics of an evaluation: by default those that training counts too, by name any of the library ir-measures.

Four names are raytower's own, in lower case: `recall@k`, `hit@k`, `mrr@k` and `ndcg@k` (see `ranking_metrics`). All
others are the library's: `R@100`, `AP`, `nDCG@10`, `MRR@10`, `P@5`, `Success@1`, `Judged@10`. The library
calls trec_eval's own code where that has the metric.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from raytower.errors import InputError, import_extra
from raytower.metrics import MRR_DEPTH, NDCG_DEPTH, Floats, ranking_metrics

_OWN = re.compile(r"(recall|hit|mrr|ndcg)@([1-9][0-9]*)")
# No document has such an id: readers of ids refuse the character.
_REPEATED = "\x00again "


class Measures:
    """Metrics by name, in the order in which they were asked for.

    Args:
        names: metrics; None is recall and hit at each of `ks`, mrr@10 and ndcg@10.
        ks: cut-offs of recall and hit where there are no names.

    Raises:
        InputError: a name that is no metric, or one whose program is not installed.
        MissingExtraError: a name of the library, which is not installed.
    """

    def __init__(self, names: Sequence[str] | None, ks: Sequence[int]) -> None:
        if names is None:
            names = [f"{kind}@{k}" for k in ks for kind in ("recall", "hit")]
            names += [f"mrr@{MRR_DEPTH}", f"ndcg@{NDCG_DEPTH}"]
        self.names = tuple(names)
        own = {name: found for name in names if (found := _OWN.fullmatch(name))}
        self._ks = {
            kind: [int(found[2]) for found in own.values() if found[1] == kind]
            for kind in ("recall", "hit", "mrr", "ndcg")
        }
        self._theirs = {name: _find_measure(name) for name in names if name not in own}
        cutoffs = [k for ks_of in self._ks.values() for k in ks_of]
        for measure in self._theirs.values():
            cutoffs += [int(measure.params["cutoff"])] if "cutoff" in measure.params else []
        self.depth = max(cutoffs, default=1)
        """The deepest cut-off. A metric without one, such as AP, counts as deep as the lists are."""

    def values(
        self,
        ranked_ids: Sequence[Sequence[str]],
        relevant: Sequence[Mapping[str, float]],
        unwanted: Sequence[Mapping[str, float]] = (),
    ) -> dict[str, Floats]:
        """One value per query for each metric, float64 [Q].

        Args:
            ranked_ids: for each query the document ids, best first. An id that a list repeats counts only at its
                first place; its other places are those of documents that nobody judged.
            relevant: for each query, judgement above 0 by document id.
            unwanted: for each query, documents judged 0 or less; none where nothing is known of such.

        Raises:
            InputError: as `ranking_metrics`, or a judgement that is no whole number, where the library counts.
        """
        found: dict[str, Floats] = {}
        if any(self._ks.values()):
            ks = sorted({*self._ks["recall"], *self._ks["hit"]}) or [1]
            found = ranking_metrics(ranked_ids, relevant, ks, self._ks["mrr"], self._ks["ndcg"])
        if self._theirs:
            found |= self._by_library(ranked_ids, relevant, unwanted or [{}] * len(relevant))
        return {name: found[name] for name in self.names}

    def _by_library(
        self,
        ranked_ids: Sequence[Sequence[str]],
        relevant: Sequence[Mapping[str, float]],
        unwanted: Sequence[Mapping[str, float]],
    ) -> dict[str, Floats]:
        library = import_extra("ir_measures")
        # Documents go by numbers: trec_eval's C code ends an id at a NUL, with which names that are made here begin.
        numbers: dict[str, str] = {}

        def number_of(doc_id: str) -> str:
            return numbers.setdefault(doc_id, str(len(numbers)))

        qrels = {
            str(row): {
                number_of(doc_id): value
                for doc_id, value in {**dict.fromkeys(others, 0), **_whole_numbers(judged)}.items()
            }
            for row, (judged, others) in enumerate(zip(relevant, unwanted, strict=True))
        }
        # The library orders by score, so the score of a document here is its place from the end.
        run = {
            str(row): {
                number_of(doc_id): float(len(ids) - place) for place, doc_id in enumerate(_told_apart(ids))
            }
            for row, ids in enumerate(ranked_ids)
            if len(ids)
        }
        values = {measure: np.zeros(len(relevant)) for measure in self._theirs.values()}
        for metric in library.iter_calc(list(values), qrels, run):
            values[metric.measure][int(metric.query_id)] = metric.value
        return {name: values[measure] for name, measure in self._theirs.items()}


def count_unjudged(
    ranked_ids: Sequence[Sequence[str]], judged: Sequence[Callable[[str], bool]], ks: Sequence[int]
) -> dict[int, int]:
    """Documents among the first k of all lists that nobody has judged, for each k.

    Args:
        ranked_ids: for each query the document ids, best first.
        judged: for each query, whether a document was judged for it.
        ks: cut-offs.
    """
    counts = dict.fromkeys(ks, 0)
    for ids, is_judged in zip(ranked_ids, judged, strict=True):
        known = np.fromiter(map(is_judged, ids[: max(ks)]), dtype=bool)
        for k in ks:
            counts[k] += int(np.count_nonzero(~known[:k]))
    return counts


def _find_measure(name: str) -> Any:
    library = import_extra("ir_measures")
    remedy = (
        "names are recall@k, hit@k, mrr@k and ndcg@k, and those of https://ir-measur.es, such as nDCG@10, MRR@10, "
        "R@100, P@5, AP, Judged@10"
    )
    try:
        measure = library.parse_measure(name)
    except (NameError, ValueError, TypeError, SyntaxError, AttributeError) as error:
        raise InputError(f"metrics has {name!r}, which is no metric ({error}); {remedy}") from error
    try:
        supported = library.DefaultPipeline.supports(measure)
    except AssertionError as error:  # how the library says that a parameter is missing or wrong
        raise InputError(f"metrics has {name!r}, which cannot be counted: {error}; {remedy}") from error
    if measure.params.get("cutoff", 1) < 1:
        raise InputError(f"metrics has {name!r}, whose cut-off is {measure.params['cutoff']}; give 1 or more")
    if not supported:
        raise InputError(
            f"metrics has {name!r}, for which the library ir-measures has no program here; install what it needs for "
            f"it, or take another; {remedy}"
        )
    return measure


def _whole_numbers(judged: Mapping[str, float]) -> dict[str, int]:
    whole = {doc_id: int(value) for doc_id, value in judged.items()}
    if any(whole[doc_id] != value for doc_id, value in judged.items()):
        doc_id, value = next(item for item in judged.items() if int(item[1]) != item[1])
        raise InputError(
            f"document {doc_id!r} is judged {value:g}, and this metric of trec_eval's needs whole numbers; round the "
            "judgements, or take recall@k, hit@k, mrr@k and ndcg@k, which need none"
        )
    return whole


def _told_apart(ids: Sequence[str]) -> list[str]:
    """The ids, with a name of its own for each place at which one stands again."""
    if len(set(ids)) == len(ids):
        return list(ids)
    seen: set[str] = set()
    different = []
    for place, doc_id in enumerate(ids):
        different.append(f"{_REPEATED}{place}" if doc_id in seen else doc_id)
        seen.add(doc_id)
    return different
