"""What an evaluation has measured so far, and the figures that it becomes."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from raytower.evaluation.figures import GROUP_METRIC, STAGES, ScoreSample, query_groups, recall_by_k
from raytower.evaluation.judgements import Judgements, absent_text
from raytower.evaluation.measures import Measures, count_unjudged
from raytower.metrics import MRR_DEPTH, Floats, mean_interval, ranking_metrics
from raytower.retrieval.retriever import Hit, num_spare

RANKING_METRIC = f"mrr@{MRR_DEPTH}"  # what the worst queries are chosen by
SHOWN_HITS = 5
_WORST_QUERIES = 20

Figures = dict[str, dict[str, float]]
"""By metric: `value`, the mean over queries, and its 95 % interval from `low` to `high`."""


@dataclass(frozen=True)
class _WorstQuery:
    value: float
    place: int
    hits: Sequence[Hit] = field(compare=False)

    def __lt__(self, other: _WorstQuery) -> bool:
        # For a heap whose first item is the least bad one: the highest value, of equals the latest query.
        return (self.value, self.place) > (other.value, other.place)


@dataclass
class Measured:
    """Per-query values by metric, of the final order and of recall alone; the worst queries; counts.

    All batches of queries are added before any figure is read.
    """

    measures: Measures
    judgements: Judgements
    ks: Sequence[int]
    """Cut-offs at which unjudged documents are counted."""
    seed: int
    final_parts: list[dict[str, Floats]] = field(default_factory=list)
    recall_parts: list[dict[str, Floats]] = field(default_factory=list)
    unjudged: dict[int, int] = field(default_factory=dict)
    """Documents among the first k of all lists that nobody has judged, by k."""
    identical_ids: int = 0
    """Documents that were left out because their id is the query's."""
    ignores_identical: bool = False
    """Whether such documents are left out."""
    curve_ks: Sequence[int] = ()
    """At which k each stage's recall is kept; none where nothing shows it."""
    stage_parts: dict[str, list[dict[str, Floats]]] = field(default_factory=dict)
    scores: ScoreSample | None = None
    """Scores of the final order; None measures no AUC."""
    wordless: int = 0
    """Queries that share no token with a document, where tokens were looked for."""
    milliseconds: dict[str, float] = field(
        default_factory=lambda: {"encode": 0.0, "recall": 0.0, "rerank": 0.0}
    )
    _worst: list[_WorstQuery] = field(default_factory=list)

    def left_out(self, part: slice) -> list[set[str]]:
        """For each query of `part` the documents that are no answers to it: its own text and, if asked, its own id."""
        ids = self.judgements.ids[part]
        own = self.judgements.own[part] if self.judgements.own else [()] * len(ids)
        same_ids = [{query_id} if self.ignores_identical else set() for query_id in ids]
        return [{*texts} | same for texts, same in zip(own, same_ids, strict=True)]

    @cached_property
    def num_spare(self) -> int:
        """How much deeper to look, so that as many hits remain where some are left out."""
        return num_spare(self.judgements.own) + self.ignores_identical

    def add(self, part: slice, ranked_ids: Sequence[Sequence[str]], shown: Sequence[Sequence[Hit]]) -> None:
        """The final order of the queries in `part`.

        Args:
            part: places of the queries in the judgements.
            ranked_ids: for each of them the document ids, best first.
            shown: for each of them the first hits, which a page shows of a bad query.
        """
        ids, relevant, unwanted = self._counted(part, ranked_ids)
        values = self.measures.values(ids, relevant, unwanted)
        self.final_parts.append(values)
        judged = [{**one, **other} for one, other in zip(relevant, unwanted, strict=True)]
        for k, count in count_unjudged(ids, [one.__contains__ for one in judged], self.ks).items():
            self.unjudged[k] = self.unjudged.get(k, 0) + count
        ranks = values.get(RANKING_METRIC)
        if ranks is None:
            ranks = ranking_metrics(ids, relevant, [1], ndcg_ks=())[RANKING_METRIC]
        for place, (value, hits) in enumerate(zip(ranks.tolist(), shown, strict=True), start=part.start):
            self._keep_worst(_WorstQuery(value, place, hits[:SHOWN_HITS]))

    def add_recall(self, part: slice, ranked_ids: Sequence[Sequence[str]]) -> None:
        """The order of the same queries before they were reranked."""
        self.recall_parts.append(self.measures.values(*self._counted(part, ranked_ids)))

    def add_stage(self, stage: str, part: slice, ranked_ids: Sequence[Sequence[str]]) -> None:
        """The order of the queries in `part` after a stage, for what is told of stages; batches follow one another."""
        if self.curve_ks:
            self.stage_parts.setdefault(stage, []).append(self.stage_values(part, ranked_ids))

    def stage_values(self, part: slice, ranked_ids: Sequence[Sequence[str]]) -> dict[str, Floats]:
        """recall@k at each of `curve_ks`, and nDCG, one value a query of `part`."""
        if self.num_spare:
            ranked_ids = [
                [doc_id for doc_id in ids if doc_id not in out]
                for out, ids in zip(self.left_out(part), ranked_ids, strict=True)
            ]
        ids, relevant, _ = self._counted(part, ranked_ids)
        values = ranking_metrics(ids, relevant, self.curve_ks)
        return {name: each for name, each in values.items() if name.startswith(("recall@", "ndcg@"))}

    def add_scores(
        self, part: slice, ranked_ids: Sequence[Sequence[str]], scores: Sequence[Sequence[float]]
    ) -> None:
        """The scores of the final order, for what is told of them."""
        if self.scores is not None:
            ids, relevant, _ = self._counted(part, ranked_ids)
            self.scores.add(part.start, ids, scores, relevant)

    def counted(self) -> dict[str, Any]:
        """What was measured of some queries, as JSON can hold it, for `add_counted`; hits without their metadata."""
        return {
            "final": _as_lists(self.final_parts),
            "recall": _as_lists(self.recall_parts),
            "stages": {stage: _as_lists(parts) for stage, parts in self.stage_parts.items()},
            "scores": None if self.scores is None else self.scores.counted(),
            "unjudged": list(self.unjudged.items()),
            "identical_ids": self.identical_ids,
            "wordless": self.wordless,
            "milliseconds": self.milliseconds,
            "worst": [
                [item.value, item.place, [asdict(replace(hit, metadata={})) for hit in item.hits]]
                for item in self._worst
            ],
        }

    def add_counted(self, counted: Mapping[str, Any]) -> None:
        """Take over what was measured of the next queries, which were numbered as all are here."""
        self.final_parts += _as_arrays(counted["final"])
        self.recall_parts += _as_arrays(counted["recall"])
        for stage, values in counted["stages"].items():
            self.stage_parts.setdefault(stage, []).extend(_as_arrays(values))
        if self.scores is not None:
            self.scores.add_counted(counted["scores"])
        for k, count in counted["unjudged"]:
            self.unjudged[k] = self.unjudged.get(k, 0) + count
        self.identical_ids += counted["identical_ids"]
        self.wordless += counted["wordless"]
        for name, spent in counted["milliseconds"].items():
            self.milliseconds[name] += spent
        for value, place, hits in counted["worst"]:
            self._keep_worst(_WorstQuery(value, place, [Hit(**hit) for hit in hits]))

    @cached_property
    def stages(self) -> dict[str, dict[str, Floats]]:
        """By stage, in their order, what `stage_values` gives, of all queries."""
        return {stage: _joined(self.stage_parts[stage]) for stage in STAGES if stage in self.stage_parts}

    def figures(self) -> dict[str, Any]:
        """What the plots of a report show; empty where no stage was kept."""
        if not self.stages:
            return {}
        last = list(self.stages.values())[-1]
        # Qrels of TREC alone have no texts, and then ids stand for them.
        has_texts = self.judgements.texts != self.judgements.ids
        return {
            "recall_by_k": recall_by_k(self.stages, self.seed),
            "scores": None if self.scores is None else self.scores.histogram(),
            "group_metric": GROUP_METRIC,
            "groups": query_groups(self.judgements.texts, last[GROUP_METRIC], self.seed) if has_texts else {},
        }

    def _counted(
        self, part: slice, ranked_ids: Sequence[Sequence[str]]
    ) -> tuple[list[Sequence[str]], list[Mapping[str, float]], Sequence[Mapping[str, float]]]:
        counted = [
            self.judgements.counted_once(ids, relevant)
            for ids, relevant in zip(ranked_ids, self.judgements.relevant[part], strict=True)
        ]
        unwanted = self.judgements.unwanted[part] if self.judgements.unwanted else [{}] * len(counted)
        return [ids for ids, _ in counted], [relevant for _, relevant in counted], unwanted

    @cached_property
    def values(self) -> dict[str, Floats]:
        """One value per query of the final order, by metric: float64 [Q]."""
        return _joined(self.final_parts)

    @cached_property
    def final(self) -> Figures:
        """Figures of the final order."""
        return _figures(self.values, self.seed)

    @cached_property
    def recall(self) -> Figures | None:
        """Figures of recall alone; None where nothing was reranked."""
        return _figures(_joined(self.recall_parts), self.seed) if self.recall_parts else None

    def summary(self) -> dict[str, Any]:
        """The part of an evaluation's result that any ranked lists have."""
        return {
            "queries": len(self.judgements.ids),
            **{name: metric["value"] for name, metric in self.final.items()},
            "intervals": {name: [metric["low"], metric["high"]] for name, metric in self.final.items()},
            "unjudged": {str(k): count for k, count in self.unjudged.items()},
            "auc": None if self.scores is None else self.scores.areas(self.seed),
            "relevant_missing": self.judgements.num_missing,
            "queries_without_relevant": self.judgements.num_without_relevant,
            "identical_ids": self.identical_ids,
            "queries_in_corpus": self.judgements.num_own,
            "reranked": self.recall is not None,
            "recall_stage": None
            if self.recall is None
            else {name: metric["value"] for name, metric in self.recall.items()},
        }

    @property
    def worst_places(self) -> list[int]:
        """Places of the worst queries, the worst first."""
        return [item.place for item in self._ordered_worst()]

    def describe_worst(self, texts: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
        """The worst queries with their first hits and what was wanted; `texts` by id, where they are known."""
        described = []
        for item in self._ordered_worst():
            relevant = self.judgements.relevant[item.place]
            described.append(
                {
                    "query_id": self.judgements.ids[item.place],
                    "query": self.judgements.texts[item.place],
                    RANKING_METRIC: item.value,
                    "relevant": [self._describe(doc_id, texts) for doc_id in list(relevant)[:SHOWN_HITS]],
                    "hits": [
                        {**asdict(hit), "metadata": {}, "relevant": relevant.get(hit.id, 0) > 0}
                        for hit in item.hits
                    ],
                }
            )
        return described

    def _describe(self, doc_id: str, texts: Mapping[str, Sequence[str]]) -> str:
        text = absent_text(doc_id)
        if text is not None:
            return f"{text} (not in the index)"
        if doc_id in texts:
            return f"{doc_id}: {texts[doc_id][0]}"
        return doc_id if self.judgements.num_missing is None else f"{doc_id} (not in the index)"

    def _ordered_worst(self) -> list[_WorstQuery]:
        return sorted(self._worst, key=lambda item: (item.value, item.place))

    def _keep_worst(self, item: _WorstQuery) -> None:
        if item.value >= 1:
            return
        if len(self._worst) < _WORST_QUERIES:
            heapq.heappush(self._worst, item)
        else:
            heapq.heappushpop(self._worst, item)


def _as_lists(parts: Sequence[Mapping[str, Floats]]) -> dict[str, list[float]]:
    return {name: values.tolist() for name, values in _joined(parts).items()}


def _as_arrays(values: Mapping[str, Sequence[float]]) -> list[dict[str, Floats]]:
    """One part; none where nothing was measured."""
    return [{name: np.array(each, np.float64) for name, each in values.items()}] if values else []


def _joined(parts: Sequence[Mapping[str, Floats]]) -> dict[str, Floats]:
    return {name: np.concatenate([part[name] for part in parts]) for name in (parts[0] if parts else ())}


def _figures(values: Mapping[str, Floats], seed: int) -> Figures:
    figures: Figures = {}
    for name, per_query in values.items():
        low, high = mean_interval(per_query, seed)
        figures[name] = {"value": float(per_query.mean()), "low": low, "high": high}
    return figures


def report_of(
    result: Mapping[str, Any],
    measured: Measured,
    settings: Mapping[str, Any],
    texts: Mapping[str, Sequence[str]],
) -> dict[str, Any]:
    """What report.json and report.html hold; `texts` of documents by id, where they are known."""
    stages = [
        {"title": "recall" if measured.recall is None else "recall, then rerank", "metrics": measured.final}
    ]
    if measured.recall is not None:
        stages.insert(0, {"title": "recall alone", "metrics": measured.recall})
    counts = ("queries", "queries_without_relevant", "relevant_missing", "seconds", "queries_per_second")
    return {
        **result,
        "counts": {name: result[name] for name in counts},
        "stages": stages,
        "milliseconds": {name: round(value, 1) for name, value in measured.milliseconds.items()},
        "settings": dict(settings),
        "figures": measured.figures(),
        "worst_queries": measured.describe_worst(texts),
    }
