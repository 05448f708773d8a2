"""The config of `raytower pipeline`."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from raytower.config import Config


class StepConfig(Config):
    """One step: the job's name as on the command line, and its config."""

    job: str
    config: dict[str, Any]


class PipelineConfig(Config):
    """`state` is the file that remembers finished steps, and which outputs the pipeline has written."""

    steps: list[StepConfig] = Field(min_length=1)
    """Jobs in their order, each `{job: NAME, config: {…}}`."""
    state: str
    """File that remembers finished steps, and of what each output was made."""
    parallel: int = Field(default=1, ge=1)
    """Most steps at once, each in a process of its own; a step waits for those that write what it reads. 1 runs them
    one after the other in this process."""
    status: bool = False
    """Run nothing, and show of each step whether it is finished, changed, missing or running, and why it would run."""
