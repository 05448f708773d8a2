"""Comparisons of evaluations: tests and corrections against SciPy and hand calculation, and the queries that moved."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats

from raytower.cli.tables import render_evaluation
from raytower.config import make_config
from raytower.errors import FormatError, InputError
from raytower.evaluation.compare import Evaluated, compare_values, holm, permutation_p
from raytower.evaluation.config import EvaluateConfig
from raytower.evaluation.evaluate import evaluate, plan_evaluate


def _evaluated(name: str, values: list[float], metric: str = "ndcg@10") -> Evaluated:
    return Evaluated(
        name, {f"q{row}": f"text {row}" for row in range(len(values))}, {metric: np.array(values)}
    )


def test_p_of_few_queries_is_the_share_of_all_signs() -> None:
    differences = np.array([0.5, 0.25, -0.125, 1.0])
    sums = [
        sum(s * d for s, d in zip(signs, differences, strict=True))
        for signs in itertools.product([1, -1], repeat=4)
    ]
    observed = differences.sum()
    assert permutation_p(differences) == pytest.approx(np.mean(np.abs(sums) >= abs(observed) - 1e-12))
    # Queries that do not differ change nothing.
    assert permutation_p([*differences, 0, 0, 0]) == permutation_p(differences)
    assert permutation_p(-differences) == permutation_p(differences)
    assert (permutation_p([0, 0]), permutation_p([]), permutation_p([0.5])) == (1, 1, 1)


def test_p_of_many_queries_is_that_of_the_sign_test_where_all_differ_alike() -> None:
    # 70 up and 45 down by 1 each: the sum of random signs is binomial.
    differences = np.repeat([1.0, -1.0], [70, 45])
    expected = scipy.stats.binomtest(70, 115).pvalue
    assert permutation_p(differences, seed=1) == pytest.approx(expected, abs=0.006)
    assert permutation_p(differences, seed=1) == permutation_p(differences, seed=1)
    assert permutation_p(np.ones(500)) == pytest.approx(1 / 10_000)


def test_holm_by_hand() -> None:
    # In order .01 · 3, .03 · 2, .04 · 1, and none below the one before.
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.5, 0.6]) == [1, 1]
    assert holm([0.2]) == [0.2]
    assert holm([]) == []


def test_each_is_compared_with_the_first() -> None:
    base = _evaluated("a", [0, 0.5, 0.5, 1, 0.25, 0])
    better = _evaluated("b", [1, 1, 0.5, 1, 0.5, 0.5])
    worse = _evaluated("c", [0, 0.5, 0.5, 0.5, 0.25, 0])
    result = compare_values([base, better, worse])
    first, second = result["comparisons"]
    assert (first["system"], first["better"], first["worse"], first["equal"]) == ("b", 4, 0, 2)
    assert first["difference"] == pytest.approx((1 + 0.5 + 0.25 + 0.5) / 6)
    assert first["p"] == pytest.approx(2 / 16)
    assert first["p_holm"] == pytest.approx(4 / 16)
    assert first["low"] <= first["difference"] <= first["high"]
    assert (second["difference"], second["p"], second["p_holm"]) == (pytest.approx(-0.5 / 6), 1, 1)
    assert result["moved_by"] == "ndcg@10"
    moved = [(row["system"], row["query"], row["difference"]) for row in result["moved"]]
    assert moved == [
        ("b", "text 0", 1),
        ("b", "text 1", 0.5),
        ("b", "text 5", 0.5),
        ("b", "text 4", 0.25),
        ("c", "text 3", -0.5),
    ]


def test_queries_and_metrics_that_not_all_have_are_left_out_and_counted() -> None:
    base, other = _evaluated("a", [0, 1, 1]), _evaluated("b", [1, 1])
    result = compare_values([base, other])
    assert (result["queries"], result["queries_left_out"]) == (2, 1)
    with pytest.raises(InputError, match=r"no metric is in all that are compared \(a: ndcg@10; b: AP\)"):
        compare_values([base, _evaluated("b", [1, 1], "AP")])
    with pytest.raises(
        InputError, match="metrics has 'AP', which not all that are compared have kept; they share"
    ):
        compare_values([base, other], ["AP"])
    with pytest.raises(InputError, match="a and b have no query in common"):
        compare_values([base, Evaluated("b", {"x": "text"}, {"ndcg@10": np.array([1.0])})])
    with pytest.raises(InputError, match=r"query 'q0' is 'text 0' in a and 'text' in b"):
        compare_values([base, Evaluated("b", {"q0": "text"}, {"ndcg@10": np.array([1.0])})])


def _write(path: Path, *lines: str) -> str:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return str(path)


@pytest.fixture
def runs(tmp_path: Path) -> dict[str, str]:
    return {
        "queries": _write(tmp_path / "qrels", *(f"q{n} 0 d{n} 1" for n in range(8))),
        "first": _write(tmp_path / "first", *(f"q{n} Q0 d{n % 2} 1 1 x" for n in range(8))),
        "second": _write(tmp_path / "second", *(f"q{n} Q0 d{n} 1 1 x" for n in range(8))),
    }


def _config(**values: Any) -> EvaluateConfig:
    return make_config(EvaluateConfig, values)


def test_run_files_and_folders_give_one_comparison(runs: dict[str, str], tmp_path: Path) -> None:
    folders = []
    for name in ("first", "second"):
        folders.append(str(tmp_path / f"{name} out"))
        evaluate(
            _config(run=runs[name], queries=runs["queries"], metrics=["nDCG@10", "AP"], output=folders[-1])
        )
    output = tmp_path / "compared"
    kept = evaluate(_config(compare=folders, output=str(output)))
    by_files = evaluate(
        _config(compare=[runs["first"], runs["second"]], queries=runs["queries"], metrics=["nDCG@10", "AP"])
    )
    by_folders = evaluate(_config(compare=folders, queries=runs["queries"], metrics=["nDCG@10", "AP"]))
    for other in (by_files, by_folders):
        for mine, theirs in zip(kept["comparisons"], other["comparisons"], strict=True):
            assert {**mine, "system": ""} == {**theirs, "system": ""}
    # Six of eight queries become right.
    assert kept["comparisons"][0]["p"] == pytest.approx(2 / 64)
    assert kept["comparisons"][0]["difference"] == 0.75
    assert len(kept["moved"]) == 6
    assert json.loads((output / "comparison.json").read_text()) == kept
    assert evaluate(_config(compare=folders, output=str(output)))["queries"] == 8  # over the one of before
    plan = plan_evaluate(_config(compare=folders))
    assert plan == {"queries": 8, "metrics": ["nDCG@10", "AP"], "tests": 2}
    table = render_evaluation(kept)
    for expected in ("+0.7500", "p (Holm)", "queries that moved most, by nDCG@10", "0.0312"):
        assert expected in table


def test_what_cannot_be_compared(runs: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"first', which is no output of `raytower evaluate` .*or give queries"
    ):
        evaluate(_config(compare=[runs["first"], runs["second"]]))
    (tmp_path / "odd").mkdir()
    _write(tmp_path / "odd" / "per_query.jsonl", '{"query_id": "q1"}')
    with pytest.raises(FormatError, match=r"per_query.jsonl:1: no line of an evaluation"):
        evaluate(_config(compare=[str(tmp_path / "odd"), runs["first"]]))
