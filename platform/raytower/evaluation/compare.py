"""`raytower evaluate --compare A B …`: whether retrievals differ by more than chance, query by query.

Each is compared with the first on the queries that both have. For each metric:

- the mean difference with its 95 % interval, by a bootstrap over queries;
- p, by a randomisation test of the paired differences, two-sided: how often a difference
  as large comes about where chance says of each query which of the two has which value. Up to 13 queries that differ,
  all their 2ⁿ signs are tried (by scipy.stats.permutation_test); else 9,999 drawn ones;
- `p_holm`, p corrected for as many comparisons as are made with one metric (Holm 1979, Scand. J. Statist. 6:65): below
  0.05 on every line that one believes, the chance of any wrong belief among them is below 5 %.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from raytower.errors import FormatError, InputError, import_extra
from raytower.evaluation.config import EvaluateConfig, RunFileConfig
from raytower.evaluation.of_run import measure_run, read_judged_run
from raytower.evaluation.page import comparison_plots, render_comparison_page
from raytower.evaluation.reports import (
    COMPARISON_NAME,
    COMPARISON_PAGE_NAME,
    PER_QUERY_NAME,
    REPORT_NAME,
    RUN_NAME,
    check_outputs,
    write_drawings,
)
from raytower.metrics import Floats, bootstrap_interval
from raytower.storage import Location

RESAMPLES = 9_999
_MOST_FOR_ALL_SIGNS = 13  # 2¹³ signs are fewer than RESAMPLES
_BATCH_VALUES = 1 << 21  # signs drawn at once
_MOVED_QUERIES = 10
# By which metric queries are said to have moved, the first that there is.
_MOVED_BY = ("ndcg@10", "nDCG@10", "mrr@10", "MRR@10", "RR@10")


@dataclass(frozen=True)
class Evaluated:
    """Per-query values of one retrieval."""

    name: str
    texts: dict[str, str]
    """Texts of the queries by id, in order."""
    values: dict[str, Floats]
    """By metric one value per query, [Q]."""
    milliseconds: float | None = None
    """Of encoding, recall and reranking, a query, where an evaluation of an index has kept it."""


def compare(config: EvaluateConfig) -> dict[str, Any]:
    """Test each retrieval against the first.

    Returns:
        `baseline` (its name), `queries` (that all have), `queries_left_out` (that some lack), `comparisons` (a record a
        metric and retrieval: `metric`, `system`, `value`, `baseline_value`, `difference`, `low`, `high`, `p`, `p_holm`,
        and how many queries are `better`, `worse` and `equal`), `moved_by` (a metric) and `moved` (the queries whose
        value differs most: `system`, `query_id`, `query`, `baseline_value`, `value`, `difference`), `milliseconds` (by
        system, a query; null where nobody has kept it), `seconds`, `output`.

    Raises:
        InputError: an evaluation that kept no values of its queries, no metric or no query that all have.
        MissingExtraError: SciPy is not installed.
    """
    start = time.perf_counter()
    check_outputs(config)
    import_extra("scipy.stats")  # found missing before any work
    all_of_them = _load_all(config)
    result = {
        **compare_values(all_of_them, config.metrics, config.seed),
        "seconds": round(time.perf_counter() - start, 3),
        "output": config.output,
    }
    write_drawings(config, comparison_plots(result))
    if config.output is not None:
        folder = Location.of(config.output)
        (folder / COMPARISON_PAGE_NAME).write_bytes(render_comparison_page(result).encode())
        (folder / COMPARISON_NAME).write_json(result)
    return result


def plan_compare(config: EvaluateConfig) -> dict[str, Any]:
    """Queries and metrics that all have; reads the evaluations."""
    check_outputs(config)
    all_of_them = _load_all(config)
    return {
        "queries": len(_shared_queries(all_of_them)),
        "metrics": _shared_metrics(all_of_them, config.metrics),
        "tests": (len(all_of_them) - 1) * len(_shared_metrics(all_of_them, config.metrics)),
    }


def compare_values(
    evaluated: Sequence[Evaluated], metrics: Sequence[str] | None = None, seed: int = 0
) -> dict[str, Any]:
    """The comparison of two or more retrievals with the first; see `compare` for what comes back."""
    baseline, *others = evaluated
    names = _shared_metrics(evaluated, metrics)
    queries = _shared_queries(evaluated)
    every = {query for each in evaluated for query in each.texts}
    values = [_in_order(each, queries, names) for each in evaluated]
    rows = []
    for name in names:
        tested = [
            _test(values[0][name], theirs[name], seed) | {"metric": name, "system": other.name}
            for other, theirs in zip(others, values[1:], strict=True)
        ]
        corrected = holm([row["p"] for row in tested])
        rows += [{**row, "p_holm": p} for row, p in zip(tested, corrected, strict=True)]
    order = ("metric", "system", "baseline_value", "value", "difference", "low", "high", "p", "p_holm")
    moved_by = next((name for name in _MOVED_BY if name in names), names[0])
    return {
        "baseline": baseline.name,
        "queries": len(queries),
        "queries_left_out": len(every) - len(queries),
        "comparisons": [{key: row[key] for key in (*order, "better", "worse", "equal")} for row in rows],
        "moved_by": moved_by,
        "moved": [
            moved
            for other, theirs in zip(others, values[1:], strict=True)
            for moved in _moved(other.name, queries, baseline, values[0][moved_by], theirs[moved_by])
        ],
        "milliseconds": {each.name: each.milliseconds for each in evaluated},
    }


def permutation_p(differences: ArrayLike, seed: int = 0) -> float:
    """Two-sided p of paired differences [Q] by randomised signs; 1 where none differs from 0."""
    array = np.asarray(differences, dtype=np.float64)
    # Zeros keep their sum under any sign, so that the test over the others is the test over all.
    array = array[array != 0]
    if len(array) < 2:
        return 1.0  # of one, either sign is as likely and as large
    if len(array) <= _MOST_FOR_ALL_SIGNS:
        stats = import_extra("scipy.stats")
        found = stats.permutation_test(
            (array,),
            lambda sample, axis: sample.sum(axis=axis),
            permutation_type="samples",
            vectorized=True,
            n_resamples=RESAMPLES,
            alternative="two-sided",
        )
        return float(found.pvalue)
    # SciPy's test sorts random numbers for each sample, which takes minutes for thousands of queries; signs need none.
    generator = np.random.default_rng(seed)
    observed = abs(float(array.sum())) * (
        1 - 1e-12
    )  # a sum of the same numbers in another order counts as equal
    as_large, block = 0, max(1, _BATCH_VALUES // len(array))
    for start in range(0, RESAMPLES, block):
        is_kept = generator.integers(2, size=(min(block, RESAMPLES - start), len(array)), dtype=np.int8)
        sums = 2.0 * (is_kept.astype(np.float64) @ array) - array.sum()
        as_large += int(np.count_nonzero(np.abs(sums) >= observed))
    return (as_large + 1) / (RESAMPLES + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """p values corrected for their number by Holm's step-down rule, in the order given; none is above 1.

    The smallest of m is multiplied by m, the next by m - 1, and so on; none becomes smaller than the one before.
    """
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for step, place in enumerate(sorted(range(len(p_values)), key=lambda place: p_values[place])):
        largest = max(largest, min(1.0, (len(p_values) - step) * p_values[place]))
        corrected[place] = largest
    return corrected


def _test(baseline: Floats, other: Floats, seed: int) -> dict[str, Any]:
    differences = other - baseline
    low, high = bootstrap_interval(differences, seed=seed)
    return {
        "baseline_value": float(baseline.mean()),
        "value": float(other.mean()),
        "difference": float(differences.mean()),
        "low": low,
        "high": high,
        "p": permutation_p(differences, seed),
        "better": int(np.count_nonzero(differences > 0)),
        "worse": int(np.count_nonzero(differences < 0)),
        "equal": int(np.count_nonzero(differences == 0)),
    }


def _moved(
    name: str, queries: Sequence[str], baseline: Evaluated, before: Floats, after: Floats
) -> list[dict[str, Any]]:
    """The queries that moved most, up or down; of equals those that come first."""
    differences = after - before
    order = np.argsort(-np.abs(differences), kind="stable")[:_MOVED_QUERIES]
    return [
        {
            "system": name,
            "query_id": queries[place],
            "query": baseline.texts[queries[place]],
            "baseline_value": float(before[place]),
            "value": float(after[place]),
            "difference": float(differences[place]),
        }
        for place in order.tolist()
        if differences[place]
    ]


# --- what is compared ----------------------------------------------------------------------------------------------


def _load_all(config: EvaluateConfig) -> list[Evaluated]:
    assert config.compare is not None  # the config refused it otherwise
    if config.queries is not None:
        return [_measure_run(name, config) for name in config.compare]
    return [_read_kept(name) for name in config.compare]


def _measure_run(name: str, config: EvaluateConfig) -> Evaluated:
    """Per-query values of a run file, or of the one in an evaluation's folder, by the queries that are given."""
    assert config.queries is not None
    place = Location.of(name)
    path = str(place / RUN_NAME) if place.is_dir() else name
    judged = read_judged_run(config.queries, RunFileConfig(path=path))
    measured = measure_run(judged, config)
    texts = dict(zip(judged.queries.ids, judged.queries.texts, strict=True))
    return Evaluated(name, texts, measured.values)


def _read_kept(name: str) -> Evaluated:
    """Per-query values that an evaluation has left in its folder."""
    place = Location.of(name) / PER_QUERY_NAME
    if not place.is_file():
        raise InputError(
            f"compare has {name!r}, which is no output of `raytower evaluate` with a {PER_QUERY_NAME}; give such a "
            "folder, evaluate anew if it was made by an older version, or give queries, by which run files are measured"
        )
    texts: dict[str, str] = {}
    values: dict[str, list[float]] = {}
    for number, line in enumerate(place.read_bytes().decode().removesuffix("\n").split("\n"), start=1):
        try:
            row = json.loads(line)
            texts[row["query_id"]] = row["query"]
            for metric, value in row["metrics"].items():
                values.setdefault(metric, []).append(float(value))
        except (ValueError, KeyError, TypeError) as error:
            raise FormatError(
                f"{place}:{number}: no line of an evaluation ({error}); evaluate anew"
            ) from error
    if not texts or any(len(each) != len(texts) for each in values.values()):
        raise FormatError(f"{place}: its lines have not all the same metrics, or are none; evaluate anew")
    kept = {metric: np.array(each) for metric, each in values.items()}
    return Evaluated(name, texts, kept, _milliseconds(Location.of(name), len(texts)))


def _milliseconds(folder: Location, num_queries: int) -> float | None:
    """What a query of a kept evaluation took; None of a run file, which nobody has timed."""
    report = (folder / REPORT_NAME).read_json() if (folder / REPORT_NAME).is_file() else {}
    spent = report.get("milliseconds") if isinstance(report, dict) else None
    total = sum(spent.values()) if isinstance(spent, dict) else 0.0
    return total / num_queries if total else None


def _shared_metrics(evaluated: Sequence[Evaluated], wanted: Sequence[str] | None) -> list[str]:
    """The metrics that all have, or those of them that are wanted, which must all be there."""
    shared = [name for name in evaluated[0].values if all(name in each.values for each in evaluated)]
    if wanted is not None:
        missing = [name for name in wanted if name not in shared]
        if missing:
            raise InputError(
                f"metrics has {missing[0]!r}, which not all that are compared have kept; they share "
                f"{', '.join(shared) or 'none'}; evaluate anew with it, or give queries, by which run files are "
                "measured"
            )
        return list(wanted)
    if not shared:
        kept = "; ".join(f"{each.name}: {', '.join(each.values)}" for each in evaluated)
        raise InputError(
            f"no metric is in all that are compared ({kept}); evaluate anew with the same metrics"
        )
    return shared


def _shared_queries(evaluated: Sequence[Evaluated]) -> list[str]:
    """Ids of the queries that all have, in the order of the first. One id must mean one text."""
    first = evaluated[0].texts
    queries = [query for query in first if all(query in each.texts for each in evaluated)]
    for each in evaluated[1:]:
        for query in queries:
            if each.texts[query] != first[query]:
                raise InputError(
                    f"query {query!r} is {first[query][:80]!r} in {evaluated[0].name} and {each.texts[query][:80]!r} "
                    f"in {each.name}; compare evaluations of the same queries"
                )
    if not queries:
        raise InputError(
            f"{evaluated[0].name} and {', '.join(each.name for each in evaluated[1:])} have no query in common; "
            "compare evaluations of the same queries"
        )
    return queries


def _in_order(evaluated: Evaluated, queries: Sequence[str], metrics: Sequence[str]) -> Mapping[str, Floats]:
    """The values of some metrics for some queries, in their order."""
    place_of = {query: place for place, query in enumerate(evaluated.texts)}
    places = np.array([place_of[query] for query in queries])
    return {name: evaluated.values[name][places] for name in metrics}
