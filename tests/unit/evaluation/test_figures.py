"""What a report shows beside its metrics: scripts, groups, scores, stages. Expected values by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from raytower.evaluation.figures import ScoreSample, curve_ks, query_groups, recall_by_k, script_of
from raytower.evaluation.page import comparison_plots, evaluation_plots, render_comparison_page, render_page
from raytower.evaluation.stages import loss_by_stage
from tests.support.report_cases import comparison, report


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("汽车保险怎么赔付？", "Han"),
        ("How do I cancel?", "Latin"),
        ("ＡＢＣ", "Latin"),
        ("iPhone 手机壳价格多少", "Han and Latin"),
        ("保险をキャンセルする方法", "Japanese"),
        ("보험을 취소", "Hangul"),
        ("как отменить", "Cyrillic"),
        ("ยกเลิก", "Thai"),
        ("4021 …", "no letters"),
        ("", "no letters"),
        ("a 汽车保险怎么", "Han"),  # six of seven letters
    ],
)
def test_scripts(text: str, script: str) -> None:
    assert script_of(text) == script


def test_groups_of_queries_by_hand() -> None:
    texts = [
        *("ab" for _ in range(5)),
        *("汽车保险" for _ in range(5)),
        *("abcdefgh" for _ in range(4)),
        "как",
    ]
    values = np.array([0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 0.5, 0.5, 0.5, 0.5, 0.25])
    groups = query_groups(texts, values, 0)
    assert [(each["name"], each["queries"]) for each in groups["length"]] == [("2", 5), ("3–4", 6), ("8", 4)]
    assert [each["value"] for each in groups["length"]] == pytest.approx([0.2, 5.25 / 6, 0.5])
    # Fewer than five queries of one script are no group.
    assert [(each["name"], each["queries"]) for each in groups["script"]] == [
        ("Latin", 9),
        ("Han", 5),
        ("others", 1),
    ]
    assert [each["value"] for each in groups["script"]] == pytest.approx([3 / 9, 1, 0.25])
    assert all(each["low"] <= each["value"] <= each["high"] for each in groups["script"])


def test_scores_of_relevant_and_other_documents() -> None:
    sample = ScoreSample(2, 3)
    assert sample.histogram() is None
    sample.add(0, [["a", "b", "c"]], [[0.9, 0.51, 0.1]], [{"b": 1.0, "c": 0.0}])
    sample.add(1, [["a"]], [[0.9]], [{"a": 2.0}])
    shown = sample.histogram()
    assert shown is not None
    assert (sum(shown["relevant"]), sum(shown["others"]), shown["every"]) == (2, 2, 1)
    assert (shown["relevant"][20], shown["relevant"][39], shown["others"][0], shown["others"][39]) == (
        1,
        1,
        1,
        1,
    )
    assert len(shown["edges"]) == 41
    equal = ScoreSample(1, 1)
    equal.add(0, [["a"]], [[0.5]], [{}])
    assert equal.histogram()["edges"][0] == 0  # type: ignore[index]


def test_areas_of_queries_by_hand() -> None:
    sample = ScoreSample(4, 4)
    assert sample.areas(0) is None
    ids = [["a", "b", "c", "d"], ["a", "b"], ["a", "b", "b"], ["a"]]
    # Of the first the pairs (b, a), (b, c), (d, a), (d, c): none is right and one a tie, 0.5 of 4. The second has found
    # nothing relevant, and the fourth nothing else. The third has b twice: 0.5 at its first place is above a.
    scores = [[0.9, 0.5, 0.5, 0.1], [0.9, 0.8], [0.4, 0.5, 0.3], [0.2]]
    relevant = [{"b": 1.0, "d": 2.0, "a": 0.0}, {"x": 1.0}, {"b": 1.0}, {"a": 1.0}]
    sample.add(0, ids[:3], scores[:3], relevant[:3])
    sample.add(3, ids[3:], scores[3:], relevant[3:])
    found = sample.areas(0)
    assert found is not None
    assert (found["by_query"], found["queries"]) == (pytest.approx((0.125 + 1) / 2), 2)
    # Together: b .5, d .1, b .5, a .2 against a .9, c .5, a .9, b .8, a .4.
    assert found["pooled"] == pytest.approx((1.5 + 0 + 1.5 + 0) / 20)
    assert found["low"] <= found["by_query"] <= found["high"]


@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=8), min_size=1, max_size=6
    )
)
def test_areas_are_scikit_learns(queries: list[list[tuple[int, bool]]]) -> None:
    """Each query's by `roc_auc_score`, over those that have both kinds; all scores together likewise."""
    sample = ScoreSample(len(queries), 8)
    for place, query in enumerate(queries):
        ids = [f"d{number}" for number in range(len(query))]
        wanted = {name: 1.0 for name, (_, right) in zip(ids, query, strict=True) if right}
        sample.add(place, [ids], [[score / 5 for score, _ in query]], [wanted])
    both = [query for query in queries if len({right for _, right in query}) == 2]
    found = sample.areas(0)
    if not both:
        assert found is None
        return
    assert found is not None
    theirs = [
        roc_auc_score([right for _, right in query], [score / 5 for score, _ in query]) for query in both
    ]
    assert found["by_query"] == pytest.approx(np.mean(theirs))
    assert found["queries"] == len(both)
    every = [row for query in queries for row in query]
    assert found["pooled"] == pytest.approx(
        roc_auc_score([right for _, right in every], [score / 5 for score, _ in every])
    )


def test_of_many_queries_scores_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raytower.evaluation.figures._MOST_SCORES", 20)
    sample = ScoreSample(12, 5)  # 60 scores: every third query
    for first in range(0, 12, 4):
        sample.add(
            first, [[f"d{first + n}"] for n in range(4)], [[float(first + n)] for n in range(4)], [{}] * 4
        )
    shown = sample.histogram()
    assert shown is not None
    assert (sum(shown["others"]), shown["every"]) == (4, 3)
    # Areas are those of every query, and the one of all scores is of the sample.
    sample.add(1, [["x", "y"]], [[1.0, 0.0]], [{"x": 1.0}])
    found = sample.areas(0)
    assert found is not None
    assert (found["by_query"], found["queries"], found["pooled"]) == (1.0, 1, None)


def test_where_a_loss_comes_from_by_hand() -> None:
    values = {
        "encoder": {"recall@1": [1, 1, 0, 0], "ndcg@10": [1, 1, 0.5, 0]},
        "index": {"recall@1": [1, 0, 0, 0], "ndcg@10": [1, 0, 0.5, 0]},
        "lexical": {"recall@1": [0, 0, 0, 1], "ndcg@10": [0, 0, 0, 1]},
        "fusion": {"recall@1": [1, 0, 0, 1], "ndcg@10": [1, 0, 0.5, 1]},
        "reranker": {"recall@1": [1, 1, 1, 1], "ndcg@10": [1, 1, 1, 1]},
    }
    stages = {
        name: {key: np.array(each, float) for key, each in each.items()} for name, each in values.items()
    }
    rows = loss_by_stage(stages, [1], 0)
    assert [(row["stage"], row["against"]) for row in rows] == [
        ("encoder", None),
        ("index", "encoder"),
        ("lexical", "index"),
        ("fusion", "index"),
        ("reranker", "fusion"),
    ]
    assert [row["metrics"]["recall@1"]["value"] for row in rows] == [0.5, 0.25, 0.25, 0.5, 1.0]
    moves = [row["differences"]["ndcg@10"]["value"] for row in rows[1:]]
    assert moves == pytest.approx([-0.25, -0.125, 0.25, 0.375])
    assert rows[0]["differences"] == {}
    low, high = (rows[1]["differences"]["recall@1"][side] for side in ("low", "high"))
    assert low < -0.25 < high <= 0
    # A run of words alone, reranked.
    alone = loss_by_stage({name: stages[name] for name in ("lexical", "reranker")}, [1], 0)
    assert [(row["stage"], row["against"]) for row in alone] == [("lexical", None), ("reranker", "lexical")]


def test_recall_is_drawn_at_the_cutoffs_asked_for_too() -> None:
    assert curve_ks([1, 4, 400], 50) == [1, 2, 3, 4, 5, 7, 10, 15, 20, 30, 50]
    shown = recall_by_k({"index": {"recall@1": np.array([0.0, 1.0]), "ndcg@10": np.array([0.0, 1.0])}}, 0)
    assert [(point["k"], point["value"]) for point in shown[0]["points"]] == [(1, 0.5)]


def test_pages_show_all_that_there_is() -> None:
    shown = render_page(report())
    for expected in (
        *("Where a loss comes from", "encoder (exact search)", "against index", "+0.0300", "words (BM25)"),
        *(
            "Recall by k",
            "Recall against time",
            "nprobe 16",
            "Scores of what was found",
            "18–31",
            "Han and Latin",
            "each query by itself (1,150)",
            "0.7421",
        ),
    ):
        assert expected in shown, expected
    names = [plot.name for plot in evaluation_plots(report())]
    assert names == ["recall-by-k", "recall-against-time", "scores", "by-length", "by-script"]
    compared = render_comparison_page(comparison())
    for expected in ("Against dense", "runs/hybrid", "+0.0400", "ndcg@10 against time", "4 that some lack"):
        assert expected in compared, expected
    assert [plot.name for plot in comparison_plots(comparison())] == [
        "differences",
        "recall-by-k",
        "recall-against-time",
    ]


def test_without_an_index_at_several_settings_time_is_that_of_the_stages() -> None:
    plain = report()
    plain["figures"]["recall_against_time"] = []
    against = next(plot for plot in evaluation_plots(plain) if plot.name == "recall-against-time")
    # (4100 + 2300) / 1200 and (4100 + 2300 + 61000) / 1200
    assert [row[:2] for row in against.rows] == [("fusion of both", "5.33"), ("reranker", "56.2")]
