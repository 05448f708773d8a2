"""`raytower pipeline`: jobs one after the other from one file. A finished step is skipped, a killed one continues.

Each step's key hashes its job, its config and the key of the step before. So a change of one step runs that step and
all later ones again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from raytower.commands import COMMANDS, Command, find_reference
from raytower.config import Config, former_keys, make_config
from raytower.errors import InputError
from raytower.index.config import IndexBuildConfig
from raytower.pipeline.config import PipelineConfig
from raytower.progress import log
from raytower.storage import Location

STEP_JOBS = (
    "train-retriever",
    "train-reranker",
    "train-classifier",
    "encode",
    "index build",
    "mine",
    "evaluate",
    "classify",
    "similarity",
)

_GAINED_AN_ENGINE = ("mine", "evaluate", "classify", "similarity")


@dataclass(frozen=True)
class _Prepared:
    """A checked step, and the key by which the state file remembers it."""

    job: str
    command: Command
    config: Config
    key: str
    former_key: str
    """Its key in state files from before the config keys were renamed."""

    def figures_in(self, finished: Mapping[str, Any]) -> dict[str, Any] | None:
        """The figures of this step if it is finished and its output still exists, else None."""
        output = getattr(self.config, "output", None)
        if isinstance(output, str) and not Location.of(output).exists():
            return None
        found: dict[str, Any] | None = finished.get(self.key, finished.get(self.former_key))
        return found


def run_pipeline(config: PipelineConfig) -> dict[str, Any]:
    """Run the steps that are not finished; returns the figures of every step.

    Raises:
        InputError: an unknown job, or a config that its job refuses. All steps are checked before the first one runs.
    """
    prepared = _prepare(config)
    place = Location.of(config.state)
    finished: dict[str, Any] = place.read_json() if place.exists() else {}
    results = []
    for number, step in enumerate(prepared, start=1):
        name = f"step {number}/{len(prepared)} {step.job}"
        before = step.figures_in(finished)
        if before is not None:
            log(f"{name}: finished before, skipped")
            results.append({"job": step.job, "skipped": True, **before})
            continue
        log(f"{name}: running")
        figures = find_reference(step.command.run)(step.config)
        finished[step.key] = json.loads(json.dumps(figures, default=str))
        place.write_json(finished)
        results.append({"job": step.job, "skipped": False, **figures})
    return {"steps": results}


def plan_pipeline(config: PipelineConfig) -> dict[str, Any]:
    """Which steps would run. Later steps read what earlier ones write, so only the order can be planned."""
    place = Location.of(config.state)
    finished = place.read_json() if place.exists() else {}
    return {
        "steps": [
            {"job": step.job, "skipped": step.figures_in(finished) is not None} for step in _prepare(config)
        ]
    }


def _prepare(config: PipelineConfig) -> list[_Prepared]:
    prepared = []
    key = former_key = ""
    for number, step in enumerate(config.steps, start=1):
        if step.job not in STEP_JOBS:
            raise InputError(f"steps.{number}.job is {step.job!r}; it must be one of {', '.join(STEP_JOBS)}")
        command = COMMANDS[step.job]
        job_config = make_config(
            find_reference(command.config), step.config, source=f"step {number} ({step.job})"
        )
        key = _key_after(key, step.job, _without_newer(step.job, job_config.model_dump(mode="json")))
        former_key = _key_after(former_key, step.job, _former_values(step.job, job_config))
        prepared.append(_Prepared(step.job, command, job_config, key, former_key))
    return prepared


def _key_after(key: str, job: str, values: Mapping[str, Any]) -> str:
    content = json.dumps([key, job, values], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _without_newer(job: str, values: dict[str, Any]) -> dict[str, Any]:
    """Without keys that came later, where they say what was done before them: a finished step stays finished."""
    if job in _GAINED_AN_ENGINE and values["engine"] == "torch":
        return {name: value for name, value in values.items() if name != "engine"}
    return values


def _former_values(job: str, config: Config) -> dict[str, Any]:
    """The config of a step as it was dumped before keys were renamed."""
    if job.startswith("train-"):  # none of their keys was renamed
        return config.model_dump(mode="json")
    values = _without_newer(job, _under_former_keys(config))
    if isinstance(config, IndexBuildConfig) and config.target.queries is not None:
        values["target"]["queries"] = config.target.queries.path_alone
    if job == "mine":  # its `format` was what `file_type` is now
        values["format"] = values.pop("file_type")
    if job in ("classify", "similarity"):  # they had this key and never read it
        values["compute"]["rerank_max_length"] = None
    return values


def _under_former_keys(config: Config) -> dict[str, Any]:
    names = {new: old for old, new in former_keys(type(config)).items()}
    dumped = config.model_dump(mode="json")
    values: dict[str, Any] = {}
    for name, value in config:
        *section, last = names.get(name, name).split(".")
        part = values.setdefault(section[0], {}) if section else values
        part[last] = _under_former_keys(value) if isinstance(value, Config) else dumped[name]
    return values
