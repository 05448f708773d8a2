"""An encoder trained in rounds: mine negatives with the one that is there, train, encode, index, measure, and again.

A round's negatives are those that its encoder still takes for answers (ANCE, Xiong et al. 2021, between rounds rather
than between steps). All steps are a pipeline's, so a job that was killed goes on where it was, and another call with
other settings makes anew what they concern.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

from raytower.config import make_config
from raytower.data.config import InputConfig
from raytower.evaluation.compare import compare
from raytower.evaluation.config import EvaluateConfig
from raytower.pipeline.config import PipelineConfig
from raytower.pipeline.job import plan_pipeline, run_pipeline
from raytower.progress import log
from raytower.refresh.config import RefreshConfig
from raytower.storage import Location, output_folder

STATE_NAME = "pipeline.json"
SUMMARY_NAME = "refresh.json"


@dataclass(frozen=True)
class Round:
    """How a round did on the dev queries, beside the best before it: a paired difference with its 95 % interval."""

    round: int
    value: float
    best_before: int | None
    difference: float | None
    low: float | None
    high: float | None
    is_better: bool
    """Whether it is better than the best before it by more than chance: the whole interval lies above 0."""
    encoder: str


def refresh(config: RefreshConfig) -> dict[str, Any]:
    """Train in rounds until one is no better than the best by more than chance, or there were as many as asked for.

    Returns:
        `rounds` (a record each: `round`, the metric's `value`, `best_before`, `difference`, `low`, `high`, `is_better`,
        `encoder`), `metric`, `best` (number of the best round; 0 is the encoder that was given, which no training has
        bettered), `encoder` and `index` of the best round, `stopped` (why), `seconds`, `output`.

    Raises:
        InputError: as the jobs of a round; all their configs are checked before the first one runs.
    """
    start = time.perf_counter()
    output_folder(config.output, STATE_NAME)
    plan_pipeline(make_config(PipelineConfig, _pipeline(config, config.rounds)))
    rounds: list[Round] = []
    best, worse, stopped = 0, 0, f"all {config.rounds} rounds ran"
    for number in range(config.rounds + 1):
        log(f"— round {number} of {config.rounds}" + (", the encoder as it is" if number == 0 else ""))
        figures = run_pipeline(make_config(PipelineConfig, _pipeline(config, number)))["steps"][-1]
        rounds.append(_judge(config, number, float(figures[config.metric]), best if number else None))
        log(_in_words(config, rounds[-1]))
        if rounds[-1].is_better:
            best, worse = number, 0
        elif number:
            worse += 1
        if worse == config.patience and number < config.rounds:
            count = "1 round" if worse == 1 else f"{worse} rounds"
            stopped = f"{count} in a row no better than round {best} by more than chance"
            break
    summary = {
        "rounds": [asdict(each) for each in rounds],
        "metric": config.metric,
        "best": best,
        "encoder": _encoder(config, best),
        "index": str(_folder(config, best) / "index"),
        "stopped": stopped,
        "seconds": round(time.perf_counter() - start, 3),
        "output": config.output,
    }
    (Location.of(config.output) / SUMMARY_NAME).write_json(summary)
    return summary


def plan_refresh(config: RefreshConfig) -> dict[str, Any]:
    """The steps of all rounds, which of them would run now, and why."""
    output_folder(config.output, STATE_NAME)
    (pipeline,) = pipelines_of(config)
    return plan_pipeline(pipeline)


def pipelines_of(config: RefreshConfig) -> list[PipelineConfig]:
    """The pipelines that the job runs, of which each begins with the steps of the one before: the last says it all."""
    return [make_config(PipelineConfig, _pipeline(config, config.rounds))]


def round_steps(config: RefreshConfig, number: int) -> list[dict[str, Any]]:
    """The steps of one round, `{job, config}` each. Pure.

    Round 0: encode, index build, evaluate. Those after it: mine with the round before, train-retriever on what it has
    mined, and the same three. So nothing is mined for a round that does not come.
    """
    own = _folder(config, number)
    steps = []
    if number:
        former, negatives = _folder(config, number - 1), str(own / "negatives.jsonl")
        steps.append(
            _step(
                "mine",
                config.mining,
                encoder=_encoder(config, number - 1),
                index=str(former / "index"),
                input=_as_given(config.train),
                output=negatives,
                format="candidates",
                file_type="jsonl",
            )
        )
        begins = {"init_from": _encoder(config, number - 1)} if config.continued and number > 1 else {}
        steps.append(
            _step(
                "train-retriever",
                config.training,
                **(begins or {"model": config.model}),
                train={"path": negatives, "format": "candidates"},
                output=_encoder(config, number),
            )
        )
    encoder = _encoder(config, number)
    steps += [
        _step(
            "encode",
            config.encoding,
            encoder=encoder,
            input=_as_given(config.corpus),
            output=str(own / "embeddings"),
        ),
        _step(
            "index build",
            config.indexing,
            embeddings=str(own / "embeddings"),
            output=str(own / "index"),
        ),
        _step(
            "evaluate",
            {},
            encoder=encoder,
            index=str(own / "index"),
            queries=config.queries.model_dump(mode="json"),
            metrics=[config.metric],
            output=str(own / "report"),
        ),
    ]
    return steps


def _pipeline(config: RefreshConfig, last: int) -> dict[str, Any]:
    """The pipeline of the rounds up to `last`."""
    steps = [step for number in range(last + 1) for step in round_steps(config, number)]
    return {"state": str(Location.of(config.output) / STATE_NAME), "steps": steps}


def _step(job: str, others: dict[str, Any], **own: Any) -> dict[str, Any]:
    return {"job": job, "config": {**others, **own}}


def _as_given(rows: InputConfig) -> dict[str, Any]:
    return rows.model_dump(mode="json", exclude_defaults=True)


def _folder(config: RefreshConfig, number: int) -> Location:
    return Location.of(config.output) / f"round-{number}"


def _encoder(config: RefreshConfig, number: int) -> str:
    return str(_folder(config, number) / "encoder") if number else config.model


def _judge(config: RefreshConfig, number: int, value: float, best: int | None) -> Round:
    """A round beside the best before it, which round 0 has none of."""
    encoder = _encoder(config, number)
    if best is None:
        return Round(number, value, None, None, None, None, False, encoder)
    reports = [str(_folder(config, each) / "report") for each in (best, number)]
    tested = compare(EvaluateConfig(compare=reports, metrics=[config.metric]))["comparisons"][0]
    return Round(
        number,
        value,
        best,
        tested["difference"],
        tested["low"],
        tested["high"],
        tested["low"] > 0,
        encoder,
    )


def _in_words(config: RefreshConfig, each: Round) -> str:
    if each.difference is None:
        return f"round {each.round}: {config.metric} {each.value:.4f}"
    verdict = "better" if each.is_better else "no better by more than chance"
    return (
        f"round {each.round}: {config.metric} {each.value:.4f}, {each.difference:+.4f} "
        f"[{each.low:+.4f}, {each.high:+.4f}] beside round {each.best_before}: {verdict}"
    )
