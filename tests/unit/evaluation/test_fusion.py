"""The fusion of recall and rerank scores: what is stored, and how the weight is tuned."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raytower.errors import FormatError, InputError
from raytower.models.fusion import Fusion
from raytower.retrieval.load import fusion_of
from raytower.retrieval.retriever import Retriever
from raytower.retrieval.tune_fusion import WEIGHTS, fused_mrr, store_fusion, tune_fusion, tune_on_queries
from tests.support.evaluation_fakes import ListIndex, TableScorer, WordEncoder


def test_round_trip_and_weight_ends() -> None:
    fusion = Fusion(weight=0.35, recall_mean=0.5, recall_std=0.1, rerank_mean=-2.0, rerank_std=3.0)
    assert Fusion.from_dict(json.loads(json.dumps(fusion.to_dict()))) == fusion
    scores, logits = np.array([0.6, 0.4]), np.array([1.0, 4.0])
    only_recall = Fusion(weight=0, recall_mean=0.5, recall_std=0.1).fuse(scores, logits)
    assert only_recall == pytest.approx([1.0, -1.0])
    only_rerank = Fusion(weight=1, rerank_mean=-2, rerank_std=3).fuse(scores, logits)
    assert only_rerank == pytest.approx([1.0, 2.0])


@pytest.mark.parametrize(
    "values",
    [
        {"weight": 1.2},
        {"weight": float("nan")},
        {"weight": 0.5, "recall_std": 0.0},
        {"weight": 0.5, "rerank_std": -1.0},
        {"weight": 0.5, "rerank_mean": float("inf")},
    ],
)
def test_impossible_fusions_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(InputError, match="fusion"):
        Fusion(**values)


@pytest.mark.parametrize("change", [{"weight": "0.5"}, {"extra": 1.0}, {"weight": None}, {"recall_std": 0.0}])
def test_stored_fusions_are_checked(change: dict) -> None:
    with pytest.raises(FormatError, match="stored fusion"):
        Fusion.from_dict({**Fusion(weight=0.5).to_dict(), **change})
    with pytest.raises(FormatError, match="exactly"):
        Fusion.from_dict({"weight": 0.5})


def test_a_useless_reranker_gets_no_weight() -> None:
    # Recall has the answer first; the reranker puts it last.
    fusion = tune_fusion([[0.9, 0.5, 0.1]] * 3, [[-5.0, 1.0, 2.0]] * 3, [[1, 0, 0]] * 3)
    assert fusion.weight == 0
    assert (fusion.recall_mean, fusion.rerank_mean) == (pytest.approx(0.5), pytest.approx(-2 / 3))
    assert fusion.recall_std == pytest.approx(np.std([0.9, 0.5, 0.1]))


def test_a_good_reranker_gets_the_smallest_weight_that_does_it() -> None:
    scores, logits, relevance = [[0.9, 0.5, 0.1]], [[0.0, 0.0, 6.0]], [[0, 0, 1]]
    fusion = tune_fusion(scores, logits, relevance)
    assert fused_mrr(fusion, scores, logits, relevance) == 1
    below = Fusion(**{**fusion.to_dict(), "weight": fusion.weight - 0.05})
    assert fused_mrr(below, scores, logits, relevance) < 1
    assert 0 < fusion.weight < 1


def test_both_together_beat_either() -> None:
    # Query 1: recall right, reranker nearly; query 2: the other way round. Unfused, one of them is lost.
    scores, logits = [[0.9, 0.2], [0.52, 0.5]], [[0.0, 0.1], [-3.0, 3.0]]
    relevance = [[1, 0], [0, 1]]
    fusion = tune_fusion(scores, logits, relevance)
    assert fused_mrr(fusion, scores, logits, relevance) == 1
    for weight in (0.0, 1.0):
        alone = Fusion(**{**fusion.to_dict(), "weight": weight})
        assert fused_mrr(alone, scores, logits, relevance) == 0.75


def test_ragged_queries_constant_scores_and_no_relevant_candidate() -> None:
    fusion = tune_fusion([[0.1, 0.1, 0.1], [0.1], []], [[1.0, 3.0, 2.0], [7.0], []], [[0, 1, 0], [0], []])
    assert fusion.recall_std == 1  # equal scores: any scale will do
    assert fused_mrr(fusion, [[0.1, 0.1, 0.1]], [[1.0, 3.0, 2.0]], [[0, 1, 0]]) == 1


def test_mrr_looks_at_ten_places_only() -> None:
    scores = [list(np.linspace(1, 0, 11))]
    relevance = [[0] * 10 + [1]]
    assert fused_mrr(Fusion(weight=0), scores, [[0.0] * 11], relevance) == 0


_QUERY = st.lists(
    st.tuples(st.integers(-8, 8), st.integers(-8, 8), st.booleans()), min_size=1, max_size=15
).map(lambda rows: sorted(rows, key=lambda row: -row[0]))


@settings(max_examples=60, deadline=None)
@given(st.lists(_QUERY, min_size=1, max_size=6))
def test_the_tuned_weight_is_the_first_best_of_the_grid(queries: list) -> None:
    scores = [[row[0] / 8 for row in rows] for rows in queries]
    logits = [[float(row[1]) for row in rows] for rows in queries]
    relevance = [[int(row[2]) for row in rows] for rows in queries]
    tuned = tune_fusion(scores, logits, relevance)

    def plain_mrr(weight: float) -> float:
        fusion = Fusion(**{**tuned.to_dict(), "weight": weight})
        total = 0.0
        for query_scores, query_logits, judged in zip(scores, logits, relevance, strict=True):
            fused = fusion.fuse(query_scores, query_logits)
            order = sorted(range(len(fused)), key=lambda place: -fused[place])[:10]
            total += next((1 / rank for rank, place in enumerate(order, 1) if judged[place]), 0.0)
        return total / len(scores)

    values = [plain_mrr(weight) for weight in WEIGHTS]
    first_best = next(w for w, v in zip(WEIGHTS, values, strict=True) if v >= max(values) - 1e-12)
    assert tuned.weight == first_best


def test_the_grid_is_twentieths() -> None:
    assert tuple(float(f"{step * 0.05:.2f}") for step in range(21)) == WEIGHTS


def test_refusals() -> None:
    with pytest.raises(InputError, match="no query has a candidate"):
        tune_fusion([[]], [[]], [[]])
    with pytest.raises(InputError, match="1 queries have recall scores, 2 logits"):
        tune_fusion([[0.1]], [[0.1], [0.1]], [[1]])
    with pytest.raises(InputError, match="query number 0 has 1 recall scores, 2 logits"):
        tune_fusion([[0.1]], [[0.1, 0.2]], [[1]])


def test_tuning_on_queries_and_storing(tmp_path: Path) -> None:
    encoder = WordEncoder(["red", "blue", "green"])
    index = ListIndex(encoder, {"1": "red", "2": "red red blue", "3": "blue"})
    # The answer to "red" is document 2, which recall puts second and the reranker first.
    retriever = Retriever(encoder, index, TableScorer({"red": -4.0, "red red blue": 4.0, "blue": -4.0}))
    tuned = tune_on_queries(retriever, ["red", "blue"], [{"2": 1.0}, {"3": 1.0}], recall_k=3)
    assert (tuned.recall_mrr, tuned.rerank_mrr, tuned.fused_mrr) == (0.75, 0.75, 1.0)
    assert 0 < tuned.fusion.weight < 1

    (tmp_path / "config.json").touch()
    (tmp_path / "raytower.json").write_text(json.dumps({"fingerprint": "f", "max_length": 64}))
    store_fusion(str(tmp_path), tuned)
    info = json.loads((tmp_path / "raytower.json").read_text())
    assert Fusion.from_dict(info["fusion"]) == tuned.fusion
    figures = {"recall_mrr": 0.75, "rerank_mrr": 0.75, "fused_mrr": 1.0, "curve": list(tuned.curve)}
    assert info["fusion_tuning"] == figures
    assert len(tuned.curve) == len(WEIGHTS)
    assert (tuned.curve[0], tuned.curve[-1], max(tuned.curve)) == (0.75, 0.75, 1.0)
    assert (info["fingerprint"], info["max_length"]) == ("f", 64)
    (tmp_path / "raytower.json").unlink()  # as a directory from elsewhere
    store_fusion(str(tmp_path), tuned.fusion)
    assert json.loads((tmp_path / "raytower.json").read_text()) == {"fusion": tuned.fusion.to_dict()}
    with pytest.raises(InputError, match="copy a hub model into a directory first"):
        store_fusion(str(tmp_path / "nowhere"), tuned)


def test_one_rule_decides_the_fusion() -> None:
    stored = Fusion(weight=0.3, recall_mean=0.5, rerank_std=2.0)
    assert fusion_of("r", stored, None) is stored
    assert fusion_of("r", stored, 0.7) == Fusion(weight=0.7, recall_mean=0.5, rerank_std=2.0)
    assert fusion_of("r", None, None) is None
    assert fusion_of("r", None, 1) is None
    assert fusion_of(None, None, None) is None
    with pytest.raises(InputError, match=r"reranker 'r' stores no fusion.*`raytower tune-fusion`"):
        fusion_of("r", None, 0.5)
    with pytest.raises(InputError, match="there is no reranker"):
        fusion_of(None, None, 1)


def test_tuning_does_not_follow_the_fusion_already_there() -> None:
    encoder = WordEncoder(["red", "blue"])
    index = ListIndex(encoder, {"1": "red", "2": "red red blue", "3": "blue"})
    scorer = TableScorer({"red": -4.0, "red red blue": 4.0, "blue": -4.0})
    without = tune_on_queries(Retriever(encoder, index, scorer), ["red"], [{"2": 1.0}], recall_k=3)
    stale = Retriever(encoder, index, scorer, Fusion(weight=0.0))
    assert tune_on_queries(stale, ["red"], [{"2": 1.0}], recall_k=3) == without
