"""Metrics against values worked out by hand, and against trec_eval's own code (pytrec_eval), scikit-learn and SciPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import pytrec_eval
import scipy.stats
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st

from raytower.errors import InputError
from raytower.metrics import (
    ClassScores,
    accuracy,
    accuracy_f1,
    auc,
    best_threshold,
    bootstrap_interval,
    macro_f1,
    mean_interval,
    midranks,
    ranking_metrics,
    reciprocal_rank,
    spearman,
    wilson_interval,
)

RUN = ["d1", "d2", "d3", "d4"]


def test_values_worked_out_by_hand() -> None:
    # Relevant: d2 (gain 2) at rank 2, d4 (gain 1) at rank 4, d9 (gain 3) never found.
    metrics = ranking_metrics([RUN], [{"d2": 2, "d4": 1, "d9": 3, "d3": 0}], ks=[1, 2, 5])
    assert metrics["recall@1"][0] == 0
    assert metrics["recall@2"][0] == pytest.approx(1 / 3)
    assert metrics["recall@5"][0] == pytest.approx(2 / 3)
    assert (metrics["hit@1"][0], metrics["hit@2"][0], metrics["hit@5"][0]) == (0, 1, 1)
    assert metrics["mrr@10"][0] == 0.5
    dcg = 2 / math.log2(3) + 1 / math.log2(5)
    ideal = 3 / math.log2(2) + 2 / math.log2(3) + 1 / math.log2(4)
    assert metrics["ndcg@10"][0] == pytest.approx(dcg / ideal)


def test_the_last_query_counts() -> None:
    metrics = ranking_metrics([["a"], ["b"], ["x"]], [{"a": 1}, {"b": 1}, {"c": 1}], ks=[1])
    assert metrics["recall@1"].tolist() == [1, 1, 0]
    assert metrics["recall@1"].mean() == pytest.approx(2 / 3)


def test_recall_at_5_is_not_recall_at_1() -> None:
    metrics = ranking_metrics([["x", "y", "a"]], [{"a": 1}], ks=[1, 5])
    assert (metrics["recall@1"][0], metrics["recall@5"][0]) == (0, 1)


def test_recall_divides_by_all_relevant_and_hit_does_not() -> None:
    metrics = ranking_metrics([["a", "x"]], [{"a": 1, "b": 1, "c": 1, "d": 1}], ks=[1])
    assert (metrics["recall@1"][0], metrics["hit@1"][0]) == (0.25, 1)


def test_a_repeated_id_counts_once() -> None:
    metrics = ranking_metrics([["a", "a", "a"]], [{"a": 1, "b": 1}], ks=[3])
    assert metrics["recall@3"][0] == 0.5
    assert metrics["ndcg@10"][0] == pytest.approx(1 / (1 + 1 / math.log2(3)))


def test_mrr_and_ndcg_stop_at_ten() -> None:
    ranked = [[f"x{place}" for place in range(10)] + ["a"]]
    metrics = ranking_metrics(ranked, [{"a": 1}], ks=[20])
    assert (metrics["mrr@10"][0], metrics["ndcg@10"][0], metrics["recall@20"][0]) == (0, 0, 1)


def test_the_callers_lists_stay_as_they_were() -> None:
    ranked, relevant = [["a", "b"]], [{"b": 1.0}]
    ranking_metrics(ranked, relevant, ks=[1])
    assert (ranked, relevant) == ([["a", "b"]], [{"b": 1.0}])


@pytest.mark.parametrize(
    ("ranked", "relevant", "ks", "message"),
    [
        ([["a"]], [], [1], "1 ranked lists for 0"),
        ([["a"]], [{"a": 0}], [1], "no relevant document"),
        ([["a"]], [{"a": 1}], [5, 0], "cut-offs"),
        ([["a"]], [{"a": 1}], [], "cut-offs"),
    ],
)
def test_refusals(ranked: list, relevant: list, ks: list, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ranking_metrics(ranked, relevant, ks)


_DOCUMENTS = [f"d{number}" for number in range(30)]


@st.composite
def _judged_runs(draw: st.DrawFn) -> tuple[list[list[str]], list[dict[str, float]]]:
    num_queries = draw(st.integers(1, 5))
    ranked = [
        draw(st.permutations(_DOCUMENTS))[: draw(st.integers(1, len(_DOCUMENTS)))] for _ in range(num_queries)
    ]
    judged = st.dictionaries(st.sampled_from(_DOCUMENTS), st.integers(0, 4), min_size=1).filter(
        lambda gains: any(gains.values())
    )
    return ranked, [draw(judged) for _ in range(num_queries)]


@settings(max_examples=100, deadline=None)
@given(_judged_runs())
def test_agrees_with_trec_eval(judged_runs: tuple[list[list[str]], list[dict[str, float]]]) -> None:
    ranked, relevant = judged_runs
    qrels = {
        f"q{row}": {doc: int(gain) for doc, gain in judged.items()} for row, judged in enumerate(relevant)
    }
    run = {f"q{row}": {doc: float(-place) for place, doc in enumerate(ids)} for row, ids in enumerate(ranked)}
    top = {query: dict(sorted(docs.items(), key=lambda item: -item[1])[:10]) for query, docs in run.items()}
    expected = pytrec_eval.RelevanceEvaluator(
        qrels, {"recall.1,5,20", "ndcg_cut.10", "success.1,5,10"}
    ).evaluate(run)
    expected_mrr = pytrec_eval.RelevanceEvaluator(qrels, {"recip_rank"}).evaluate(top)
    got = ranking_metrics(ranked, relevant, ks=[1, 5, 20, 10])
    names = {
        "recall@1": "recall_1",
        "recall@5": "recall_5",
        "recall@20": "recall_20",
        "ndcg@10": "ndcg_cut_10",
    }
    names |= {"hit@1": "success_1", "hit@5": "success_5", "hit@10": "success_10"}
    for row in range(len(ranked)):
        for name, theirs in names.items():
            assert got[name][row] == pytest.approx(expected[f"q{row}"][theirs], abs=1e-6), name
        assert got["mrr@10"][row] == pytest.approx(expected_mrr[f"q{row}"]["recip_rank"], abs=1e-6)


def test_accuracy() -> None:
    assert accuracy(["a", "b", "c"], ["a", "x", "c"]) == pytest.approx(2 / 3)
    with pytest.raises(InputError, match="0 predictions"):
        accuracy([], [])
    with pytest.raises(InputError, match="1 predictions for 2 labels"):
        accuracy(["a"], ["a", "b"])
    with pytest.raises(InputError, match="1 predictions for 2 labels"):
        macro_f1(["a"], ["a", "b"])


def test_macro_scores_by_hand() -> None:
    scores = ClassScores()
    expected = ["a", "a", "a", "b", "b", "c"]
    predicted = ["a", "a", "a", "a", "d", "a"]
    for label, right in zip(predicted, expected, strict=True):
        scores.add(label, right)
    macro = scores.macro()
    # Precision: a 3/5, d 0/1, b and c none predicted. Recall: a 3/3, b 0/2, c 0/1, d none expected.
    assert macro["precision_macro"] == pytest.approx((3 / 5) / 4)
    assert macro["recall_macro"] == pytest.approx((3 / 3) / 4)
    assert macro["f1_macro"] == pytest.approx((6 / 8) / 4)
    assert macro["f1_macro"] == pytest.approx(macro_f1(predicted, expected))
    with pytest.raises(InputError, match="at least one"):
        ClassScores().macro()


def test_midranks() -> None:
    assert midranks([10, 20, 20, 5]).tolist() == [2, 3.5, 3.5, 1]


def test_auc_by_hand() -> None:
    # Pairs (positive, negative): .8>.5, .8>.2, .5=.5 (half), .5>.2.
    assert auc([0.8, 0.5, 0.5, 0.2], [1, 1, 0, 0]) == pytest.approx(3.5 / 4)


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 1)), min_size=2, max_size=40).filter(
        lambda rows: len({label for _, label in rows}) == 2
    )
)
def test_auc_is_the_share_of_pairs_in_order(rows: list[tuple[int, int]]) -> None:
    positive = [score for score, label in rows if label]
    negative = [score for score, label in rows if not label]
    wins = sum((p > n) + (p == n) / 2 for p in positive for n in negative)
    scores, labels = zip(*rows, strict=True)
    assert auc(scores, labels) == pytest.approx(wins / (len(positive) * len(negative)))


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([0.1, 0.2], [1, 1], "labels are 1"),
        ([0.1, 0.2], [0, 0], "labels are 0"),
        ([0.1, 0.2], [0, 2], "label 2 is neither"),
        ([0.1, np.nan], [0, 1], "not finite"),
        ([0.1], [0, 1], "1 scores for 2 labels"),
        ([], [], "0 scores"),
    ],
)
def test_auc_refusals(scores: list[float], labels: list[int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        auc(scores, labels)


def test_accuracy_and_f1_by_hand() -> None:
    # At 0.5: predicted 1, 1, 0, 1 against 1, 0, 1, 1; the score at the threshold counts as 1.
    accuracy_at, f1 = accuracy_f1([0.9, 0.5, 0.4, 0.8], [1, 0, 1, 1], threshold=0.5)
    assert (accuracy_at, f1) == (0.5, pytest.approx(2 * 2 / (3 + 3)))
    assert accuracy_f1([0.1, 0.2], [0, 0], threshold=0.5) == (1.0, 0.0)


@given(st.lists(st.tuples(st.integers(-4, 4), st.integers(0, 1)), min_size=1, max_size=25))
def test_best_threshold_beats_every_other(rows: list[tuple[int, int]]) -> None:
    scores = [score for score, _ in rows]
    labels = [label for _, label in rows]
    best = accuracy_f1(scores, labels, best_threshold(scores, labels))[0]
    for threshold in [*scores, max(scores) + 1]:
        assert best >= accuracy_f1(scores, labels, threshold)[0]


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([0, 1, 1], 2),
        ([1, 1, 1], 1),
        ([0, 0, 0], math.nextafter(3, math.inf)),  # predicting 0 always is best
        ([1, 0, 1], 1),  # 1 and 3 are right twice: the lower one
    ],
)
def test_best_threshold_by_hand(labels: list[int], expected: float) -> None:
    assert best_threshold([1, 2, 3], labels) == expected


def test_spearman_by_hand() -> None:
    assert spearman([1, 2, 3], [10, 20, 30]) == pytest.approx(1)
    assert spearman([1, 2, 3], [3, 1, 2]) == pytest.approx(1 - 6 * (4 + 1 + 1) / (3 * 8))
    assert spearman([1, 2], [5, 4]) == pytest.approx(-1)
    assert math.isnan(spearman([1, 1, 1], [1, 2, 3]))
    assert math.isnan(spearman([1, 2, 3], [1, 1, 1]))


@pytest.mark.parametrize(("scores", "labels"), [([1], [1]), ([1, 2, 3], [1, 2]), ([], [])])
def test_spearman_refusals(scores: list[float], labels: list[float]) -> None:
    with pytest.raises(InputError, match=f"{len(scores)} scores for {len(labels)} labels"):
        spearman(scores, labels)


def test_bootstrap_interval_of_a_known_distribution() -> None:
    values = np.arange(400) % 2  # mean 0.5, standard error 0.025
    low, high = bootstrap_interval(values, seed=3, samples=4000)
    assert low == pytest.approx(0.5 - 1.96 * 0.025, abs=0.006)
    assert high == pytest.approx(0.5 + 1.96 * 0.025, abs=0.006)


def test_where_nothing_was_found_the_reciprocal_rank_is_zero() -> None:
    assert reciprocal_rank(np.zeros((2, 0), bool)).tolist() == [0.0, 0.0]
    assert reciprocal_rank(np.array([[False, False], [False, True]])).tolist() == [0.0, 0.5]


def test_bootstrap_is_seeded_and_holds_at_the_edges() -> None:
    values = np.random.default_rng(0).random(50)
    assert bootstrap_interval(values, seed=1) == bootstrap_interval(values, seed=1, samples=1000, level=0.95)
    assert bootstrap_interval(values, seed=1) != bootstrap_interval(values, seed=2)
    assert bootstrap_interval([0.25]) == (0.25, 0.25)
    narrow, wide = bootstrap_interval(values, level=0.5), bootstrap_interval(values, level=0.99)
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_bootstrap_in_blocks_covers_every_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).random(64)
    whole = bootstrap_interval(values, samples=200)
    monkeypatch.setattr("raytower.metrics._BOOTSTRAP_BLOCK", 64 * 7)
    assert bootstrap_interval(values, samples=200) == pytest.approx(whole, abs=0.02)
    constant = bootstrap_interval(np.full(64, 0.75), samples=200)
    assert constant == (0.75, 0.75)


@pytest.mark.parametrize(
    ("values", "settings", "message"),
    [
        ([], {}, "at least one, all finite"),
        ([0.1, float("nan")], {}, "at least one, all finite"),
        ([0.1], {"samples": 0}, "samples 0 and level 0.95"),
        ([0.1], {"level": 0.0}, "level 0.0"),
        ([0.1], {"level": 1.0}, "level 1.0"),
    ],
)
def test_bootstrap_refusals(values: list[float], settings: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        bootstrap_interval(values, **settings)
    assert bootstrap_interval([0.1], samples=1) == (0.1, 0.1)


@pytest.mark.parametrize(("right", "trials"), [(3, 3), (0, 3), (1, 1), (7, 20), (580, 1000), (50, 100)])
def test_intervals_of_proportions_are_wilsons(right: int, trials: int) -> None:
    expected = scipy.stats.binomtest(right, trials).proportion_ci(0.95, method="wilson")
    assert wilson_interval(right, trials) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_three_of_three_right_is_no_certainty() -> None:
    low, high = mean_interval([1, 1, 1])
    assert (round(low, 2), high) == (0.44, 1)
    assert mean_interval([True, False]) == wilson_interval(1, 2)
    values = [0.0, 0.5, 1.0]
    assert mean_interval(values, seed=4) == bootstrap_interval(values, seed=4)
    with pytest.raises(InputError, match="at least one, all finite"):
        mean_interval([])


@pytest.mark.parametrize(("right", "trials"), [(1, 0), (2, 1), (-1, 3)])
def test_wilson_refusals(right: int, trials: int) -> None:
    with pytest.raises(InputError, match=f"{right} right of {trials} trials"):
        wilson_interval(right, trials)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 1)), min_size=2, max_size=40))
def test_scores_agree_with_scikit_learn_and_scipy(rows: list[tuple[int, int]]) -> None:
    scores, labels = (np.array(column) for column in zip(*rows, strict=True))
    if len(set(labels.tolist())) == 2:
        assert auc(scores, labels) == pytest.approx(sklearn.metrics.roc_auc_score(labels, scores), abs=1e-9)
        if len(set(scores.tolist())) > 1:
            assert spearman(scores, labels) == pytest.approx(
                scipy.stats.spearmanr(scores, labels).statistic, abs=1e-9
            )
    accuracy_at, f1 = accuracy_f1(scores, labels, 3)
    assert accuracy_at == pytest.approx(sklearn.metrics.accuracy_score(labels, scores >= 3), abs=1e-9)
    assert f1 == pytest.approx(sklearn.metrics.f1_score(labels, scores >= 3, zero_division=0), abs=1e-9)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from("abcde")), min_size=1, max_size=40))
def test_classes_agree_with_scikit_learn(rows: list[tuple[str, str]]) -> None:
    predicted, expected = (list(column) for column in zip(*rows, strict=True))
    assert accuracy(predicted, expected) == pytest.approx(
        sklearn.metrics.accuracy_score(expected, predicted), abs=1e-9
    )
    scores = ClassScores()
    for label, right in rows:
        scores.add(label, right)
    theirs = sklearn.metrics.precision_recall_fscore_support(
        expected, predicted, average="macro", zero_division=0
    )
    macro = scores.macro()
    assert [macro["precision_macro"], macro["recall_macro"], macro["f1_macro"]] == pytest.approx(
        list(theirs[:3]), abs=1e-9
    )
    means = scores.means()
    assert means["f1_micro"] == pytest.approx(
        sklearn.metrics.f1_score(expected, predicted, average="micro"), abs=1e-9
    )
    theirs = sklearn.metrics.precision_recall_fscore_support(
        expected, predicted, average="weighted", zero_division=0
    )
    assert [means[f"{name}_weighted"] for name in ("precision", "recall", "f1")] == pytest.approx(
        list(theirs[:3]), abs=1e-9
    )
    theirs = sklearn.metrics.precision_recall_fscore_support(expected, predicted, zero_division=0)
    assert list(scores.per_class()) == sorted({*expected, *predicted})
    assert [list(one.values()) for one in scores.per_class().values()] == [
        pytest.approx(list(column), abs=1e-9) for column in zip(*theirs, strict=True)
    ]
