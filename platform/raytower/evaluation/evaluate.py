"""`raytower evaluate`: metrics of an index on judged queries, or of a run file, or how evaluations differ."""

from __future__ import annotations

from typing import Any

from raytower.evaluation.compare import compare, plan_compare
from raytower.evaluation.config import EvaluateConfig
from raytower.evaluation.of_run import evaluate_run, plan_run


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Measure an index (`evaluate_index`), a run file (`evaluate_run`), or differences (`compare`).

    Raises:
        InputError: bad queries, or what cannot be measured.
        MissingExtraError: a metric of ir-measures, or a comparison, without the extra that brings what counts it.
    """
    if config.compare is not None:
        return compare(config)
    if config.run is not None:
        return evaluate_run(config)
    from raytower.evaluation.of_index import evaluate_index  # torch, which the other two do without

    return evaluate_index(config)


def plan_evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """What would be measured; see `plan_index`, `plan_run` and `plan_compare`."""
    if config.compare is not None:
        return plan_compare(config)
    if config.run is not None:
        return plan_run(config)
    from raytower.evaluation.of_index import plan_index

    return plan_index(config)
