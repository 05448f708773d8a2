"""Metrics by name against the library and trec_eval called directly, and against values worked out by hand."""

from __future__ import annotations

import sys

import ir_measures
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raytower.config import make_config
from raytower.errors import InputError, MissingExtraError
from raytower.evaluation.config import EvaluateConfig
from raytower.evaluation.measures import Measures, count_unjudged

NAMES = [
    "nDCG@10",
    "MRR@10",
    "R@100",
    "AP",
    "Judged@10",
    "P@5",
    "Success@1",
    "AP(rel=2)@20",
    "Rprec",
    "Bpref",
]
OWN = {"recall@3": "R@3", "hit@3": "Success@3", "mrr@5": "RR@5", "ndcg@7": "nDCG@7"}
_DOCUMENTS = [f"d{number}" for number in range(30)]


@st.composite
def _judged_runs(
    draw: st.DrawFn,
) -> tuple[list[list[str]], list[dict[str, float]], list[dict[str, float]]]:
    num_queries = draw(st.integers(1, 4))
    ranked = [draw(st.permutations(_DOCUMENTS))[: draw(st.integers(0, 30))] for _ in range(num_queries)]
    gains = st.dictionaries(st.sampled_from(_DOCUMENTS), st.integers(-1, 3), min_size=1)
    judged = [draw(gains.filter(lambda values: max(values.values()) > 0)) for _ in range(num_queries)]
    relevant = [{doc: float(gain) for doc, gain in one.items() if gain > 0} for one in judged]
    unwanted = [{doc: float(gain) for doc, gain in one.items() if gain <= 0} for one in judged]
    return ranked, relevant, unwanted


@settings(max_examples=60, deadline=None)
@given(_judged_runs())
def test_every_metric_equals_the_library_called_directly(
    judged_runs: tuple[list[list[str]], list[dict[str, float]], list[dict[str, float]]],
) -> None:
    ranked, relevant, unwanted = judged_runs
    got = Measures([*NAMES, *OWN], [1]).values(ranked, relevant, unwanted)
    qrels, run = [], []
    for row, ids in enumerate(ranked):
        judged = {**dict.fromkeys(unwanted[row], 0), **relevant[row]}
        qrels += [ir_measures.Qrel(f"q{row}", doc, int(gain)) for doc, gain in judged.items()]
        run += [ir_measures.ScoredDoc(f"q{row}", doc, -float(place)) for place, doc in enumerate(ids)]
    for name in got:
        measure = ir_measures.parse_measure(OWN.get(name, name))
        expected = {each.query_id: each.value for each in ir_measures.iter_calc([measure], qrels, run)}
        assert got[name].tolist() == pytest.approx(
            [expected[f"q{row}"] for row in range(len(ranked))], abs=1e-9
        ), name


def test_judged_documents_and_those_that_nobody_judged_by_hand() -> None:
    ranked = [["a", "b", "c", "d"], ["x"]]
    relevant, unwanted = [{"b": 1.0}, {"y": 1.0}], [{"d": 0.0}, {"x": -1.0}]
    values = Measures(["Judged@2", "Judged@4", "P@2"], [1]).values(ranked, relevant, unwanted)
    assert values["Judged@2"].tolist() == [0.5, 1]
    assert values["Judged@4"].tolist() == [0.5, 1]
    assert values["P@2"].tolist() == [0.5, 0]
    judged = [{**one, **other}.__contains__ for one, other in zip(relevant, unwanted, strict=True)]
    assert count_unjudged(ranked, judged, [1, 2, 4]) == {1: 1, 2: 1, 4: 2}


def test_a_repeated_id_counts_once_and_keeps_its_place() -> None:
    values = Measures(["nDCG@10", "ndcg@10", "MRR@10", "R@3"], [1]).values(
        [["a", "a", "b"]], [{"a": 1.0, "b": 1.0}]
    )
    assert values["nDCG@10"][0] == pytest.approx((1 + 0.5) / (1 + 1 / np.log2(3)))
    assert values["nDCG@10"][0] == pytest.approx(values["ndcg@10"][0], abs=1e-12)
    assert (values["MRR@10"][0], values["R@3"][0]) == (1, 1)


def test_two_names_of_one_metric_are_two_columns() -> None:
    values = Measures(["MRR@10", "RR@10"], [1]).values([["x", "a"]], [{"a": 1.0}])
    assert {name: each.tolist() for name, each in values.items()} == {"MRR@10": [0.5], "RR@10": [0.5]}


def test_no_names_are_the_names_of_before() -> None:
    measures = Measures(None, [1, 5])
    assert measures.names == ("recall@1", "hit@1", "recall@5", "hit@5", "mrr@10", "ndcg@10")
    assert (measures.depth, Measures(["AP", "R@100"], [1]).depth, Measures(["AP"], [5]).depth) == (10, 100, 1)
    # Fractions of judgements too, which the library does not take.
    assert measures.values([["a"]], [{"a": 0.5}])["ndcg@10"].tolist() == [1]
    with pytest.raises(InputError, match=r"'a' is judged 0\.5, .* needs whole numbers; round"):
        Measures(["nDCG@10"], [1]).values([["a"]], [{"a": 0.5}])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nope@3", "'nope@3', which is no metric .*not found: nope.*such as nDCG@10"),
        ("nDCG@-1", "'nDCG@-1', which is no metric"),
        ("nDCG@0", "'nDCG@0', whose cut-off is 0"),
        ("recall@0", "'recall@0', which is no metric"),
        ("P", "'P', which cannot be counted: invalid param cutoff"),
        ("alpha_nDCG@10", "'alpha_nDCG@10', for which the library ir-measures has no program here"),
        ("__import__('os')", "which is no metric"),
        ("", "which is no metric"),
    ],
)
def test_names_that_are_no_metrics(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Measures([name], [1])


def test_without_the_library_the_default_metrics_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ir_measures", None)
    assert Measures(None, [1]).values([["a"]], [{"a": 1.0}])["recall@1"].tolist() == [1]
    with pytest.raises(MissingExtraError, match=r"pip install 'raytower\[measures\]'"):
        Measures(["AP"], [1])


def _config(**values: object) -> EvaluateConfig:
    return make_config(EvaluateConfig, {"index": "i", "queries": "q", **values})


def test_metrics_by_commas() -> None:
    assert _config(metrics="nDCG@10,MRR@10, AP").metrics == ["nDCG@10", "MRR@10", "AP"]
    assert _config(metrics=["nDCG(dcg='log2',gains={1:2,2:3})@10,AP"]).metrics == [
        "nDCG(dcg='log2',gains={1:2,2:3})@10",
        "AP",
    ]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"metrics": ["AP", "AP"]}, "each once"),
        ({"metrics": []}, "name at least one"),
        ({"index": None}, "nothing is given to measure; give one of index, run and compare"),
        ({"run": "r"}, "index and run are given; give one of"),
        ({"queries": None}, "index needs queries"),
        ({"index": None, "compare": ["a"]}, "two or more evaluations"),
        ({"index": None, "compare": ["a", "a"]}, "two or more evaluations, each once"),
        ({"index": None, "run": "r", "encoder": "e"}, "encoder is 'e', which only an index needs"),
    ],
)
def test_configs_that_say_too_much_or_too_little(values: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        _config(**values)


def test_ids_that_are_made_here_are_told_apart_by_the_library() -> None:
    """Their NUL ended them all in trec_eval's C code: R@10 of the first was 2, of the second 1."""
    measures = Measures(["R@10"], [1])
    assert measures.values([["a", "a", "a", "b"]], [{"b": 1, "c": 1}])["R@10"].tolist() == [0.5]
    absent = {"\0t1": 1, "\0t2": 1, "a": 1}
    assert measures.values([["a", "b"]], [absent])["R@10"].tolist() == [pytest.approx(1 / 3)]
    assert measures.values([["x", "x"]], [{"\0t1": 1}])["R@10"].tolist() == [0.0]
