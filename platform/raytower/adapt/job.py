"""`raytower adapt`: pairs from the structure of a corpus, and rounds of mining and training by them.

Pairs are a pipeline of three steps: the pairs of the documents that are kept for dev, those that train, of which none
holds a text of dev, and the passages to find. What follows is `refresh`: mine candidates by vectors and words, score
them by a teacher where there is one (GPL, Wang et al. 2022, without its generator), train, encode, index, compare.
"""

from __future__ import annotations

import time
from typing import Any

from raytower.adapt.config import AdaptConfig
from raytower.config import make_config
from raytower.pipeline.config import PipelineConfig
from raytower.pipeline.job import plan_pipeline, run_pipeline
from raytower.progress import log
from raytower.refresh.config import RefreshConfig
from raytower.refresh.job import pipelines_of as pipelines_of_rounds
from raytower.refresh.job import plan_refresh, refresh
from raytower.storage import Location, output_folder

STATE_NAME = "pipeline.json"
SUMMARY_NAME = "adapt.json"
# Named in reports, too: whoever reads figures of it sees that nobody has judged them.
DEV_NAME = "pseudo-dev.jsonl"
_MINED = {"num_negatives": 4, "mode": "hybrid"}
_MINED_WITHOUT_TEACHER = {"max_score_ratio": 0.95}
_DISTILLED = {"objective": {"name": "margin_mse"}}


def adapt(config: AdaptConfig) -> dict[str, Any]:
    """Train on pairs of the corpus's structure; name the trained encoder only where it is better by more than chance.

    Returns:
        `adapted`, `encoder` and `index` (of the best round; where `adapted` is false, `encoder` is the one that was
        given), `why`, `judged_by` (what the pseudo-dev set is), `metric`, `rounds` (as refresh), `pairs` and
        `dev_pairs` (figures of both), `passages`, `seconds`, `output`.

    Raises:
        InputError: as the jobs; all their configs are checked before the first one runs.
    """
    start = time.perf_counter()
    output_folder(config.output, STATE_NAME)
    pipeline, rounds = pairs_pipeline(config), rounds_of(config)
    plan_refresh(rounds)
    dev, train, passages = run_pipeline(pipeline)["steps"]
    judged_by = describe_dev(dev)
    log(f"{train['pairs']:,} pairs train; encoders are compared on {judged_by}")
    refreshed = refresh(rounds)
    summary = {
        "adapted": refreshed["best"] > 0,
        "encoder": refreshed["encoder"],
        "index": refreshed["index"],
        "why": _why(refreshed),
        "judged_by": judged_by,
        "metric": f"pseudo-dev {config.metric}",
        "rounds": refreshed["rounds"],
        "pairs": train,
        "dev_pairs": dev,
        "passages": passages["passages"],
        "seconds": round(time.perf_counter() - start, 3),
        "output": config.output,
    }
    (Location.of(config.output) / SUMMARY_NAME).write_json(summary)
    log(summary["why"])
    return summary


def plan_adapt(config: AdaptConfig) -> dict[str, Any]:
    """The steps of pairs and of all rounds, which of them would run now, and why."""
    output_folder(config.output, STATE_NAME)
    pipeline, rounds = pairs_pipeline(config), rounds_of(config)
    return {"steps": plan_pipeline(pipeline)["steps"] + plan_refresh(rounds)["steps"]}


def pipelines_of(config: AdaptConfig) -> list[PipelineConfig]:
    """The pipelines that the job runs, one after the other."""
    return [pairs_pipeline(config), *pipelines_of_rounds(rounds_of(config))]


def pairs_pipeline(config: AdaptConfig) -> PipelineConfig:
    """The steps that make dev pairs, training pairs and passages. Their keys are checked when they are planned."""
    folder = Location.of(config.output)
    shared = {
        **config.pairs,
        "input": config.corpus.model_dump(mode="json", exclude_defaults=True),
        "dev_share": config.dev_share,
        "train_share": config.train_share,
        "file_type": "jsonl",
        "seed": config.seed,
    }
    dev = str(folder / DEV_NAME)
    parts: list[dict[str, Any]] = [
        {"part": "dev", "output": dev},
        {"part": "train", "output": _pairs(config), "apart_from": {"path": dev}},
        # No query is written for passages.
        {"part": "documents", "output": _passages(config), "generate": None},
    ]
    steps = [{"job": "pairs", "config": {**shared, **part}} for part in parts]
    return make_config(PipelineConfig, {"state": str(folder / STATE_NAME), "steps": steps})


def rounds_of(config: AdaptConfig) -> RefreshConfig:
    """The rounds. Keys of their jobs are checked when they are planned."""
    mining: dict[str, Any] = {**_MINED, **config.mining}
    training = config.training
    if config.teacher is not None:
        mining["teacher"] = config.teacher
        training = {**_DISTILLED, **training}
    else:
        mining = {**_MINED_WITHOUT_TEACHER, **mining}
    folder = Location.of(config.output)
    return make_config(
        RefreshConfig,
        {
            "model": config.model,
            "train": {"path": _pairs(config)},
            "corpus": {"path": _passages(config)},
            "queries": {"path": str(folder / DEV_NAME)},
            "output": str(folder / "rounds"),
            "rounds": config.rounds,
            "metric": config.metric,
            "training": training,
            "encoding": config.encoding,
            "indexing": config.indexing,
            "mining": mining,
        },
    )


def describe_dev(dev: dict[str, Any]) -> str:
    """What figures of the pseudo-dev set rest on."""
    rules = ", ".join(f"{count:,} {rule}" for rule, count in dev["by_rule"].items())
    return (
        f"pseudo-dev: {dev['pairs']:,} pairs ({rules}) made of the structure of {dev['documents']:,} documents that do "
        "not train; nobody has judged them"
    )


def _why(refreshed: dict[str, Any]) -> str:
    best = refreshed["rounds"][refreshed["best"]]
    if refreshed["best"]:
        return (
            f"round {best['round']} is better than round {best['best_before']} on the pseudo-dev set by more than "
            f"chance: {best['difference']:+.4f} [{best['low']:+.4f}, {best['high']:+.4f}]; measure it on judged "
            "queries before it serves"
        )
    tried = max(refreshed["rounds"][1:], key=lambda each: each["difference"])
    return (
        f"the encoder that was given stays: the best of {len(refreshed['rounds']) - 1} trained differs from it on the "
        f"pseudo-dev set by {tried['difference']:+.4f} [{tried['low']:+.4f}, {tried['high']:+.4f}], which is no gain "
        "beyond chance"
    )


def _pairs(config: AdaptConfig) -> str:
    return str(Location.of(config.output) / "pairs.jsonl")


def _passages(config: AdaptConfig) -> str:
    return str(Location.of(config.output) / "passages.jsonl")
