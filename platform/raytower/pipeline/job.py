"""`raytower pipeline`: jobs one after the other from one file. A finished step is skipped, a killed one goes on.

Each step's key hashes its job, its config and the key of the step before, so that a change early in the file runs
again everything behind it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from raytower.commands import COMMANDS, Command, find_reference
from raytower.config import Config, make_config
from raytower.errors import InputError
from raytower.pipeline.config import PipelineConfig, StepConfig
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


def run_pipeline(config: PipelineConfig) -> dict[str, Any]:
    """Run what is not finished; returns the figures of every step.

    Raises:
        InputError: an unknown job, or a step's config that its job refuses; checked for all steps before the first.
    """
    prepared = _prepare(config)
    place = Location.of(config.state)
    finished: dict[str, Any] = place.read_json() if place.exists() else {}
    results = []
    for number, (step, command, job_config, key) in enumerate(prepared, start=1):
        name = f"step {number}/{len(prepared)} {step.job}"
        if key in finished and _still_there(step.config):
            log(f"{name}: finished before, skipped")
            results.append({"job": step.job, "skipped": True, **finished[key]})
            continue
        log(f"{name}: running")
        figures = find_reference(command.run)(job_config)
        finished[key] = json.loads(json.dumps(figures, default=str))
        place.write_json(finished)
        results.append({"job": step.job, "skipped": False, **figures})
    return {"steps": results}


def plan_pipeline(config: PipelineConfig) -> dict[str, Any]:
    """Which steps would run. Later steps read what earlier ones write, so only the order can be planned."""
    place = Location.of(config.state)
    finished = place.read_json() if place.exists() else {}
    return {
        "steps": [
            {"job": step.job, "skipped": key in finished and _still_there(step.config)}
            for step, _, _, key in _prepare(config)
        ]
    }


def _prepare(config: PipelineConfig) -> list[tuple[StepConfig, Command, Config, str]]:
    prepared = []
    key = ""
    for number, step in enumerate(config.steps, start=1):
        if step.job not in STEP_JOBS:
            raise InputError(f"steps.{number}.job is {step.job!r}; it must be one of {', '.join(STEP_JOBS)}")
        command = COMMANDS[step.job]
        job_config = make_config(
            find_reference(command.config), step.config, source=f"step {number} ({step.job})"
        )
        content = json.dumps([key, step.job, job_config.model_dump(mode="json")], sort_keys=True)
        key = hashlib.sha256(content.encode()).hexdigest()[:16]
        prepared.append((step, command, job_config, key))
    return prepared


def _still_there(values: Mapping[str, Any]) -> bool:
    output = values.get("output")
    return not isinstance(output, str) or Location.of(output).exists()
