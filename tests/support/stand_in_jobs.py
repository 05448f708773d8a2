"""Jobs of a pipeline in this process: as they are where they need no Ray, and else what a test puts in their place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from raytower.commands import COMMANDS, find_reference
from raytower.index.build import build_index
from tests.support.encoding_here import encode_here
from tests.support.index_cases import HERE

Job = Callable[[Any], dict[str, Any]]


def stand_in(patch: pytest.MonkeyPatch, jobs: Mapping[str, Job], before: Callable[[str], None]) -> None:
    """Have steps of pipelines run `jobs`, and encode, index and mine without Ray; `before` is told each job's name."""

    def told(job: str, run: Job) -> Job:
        def run_it(config: Any) -> dict[str, Any]:
            before(job)
            return run(config)

        return run_it

    here: dict[str, Job] = {
        "encode": encode_here,
        "index build": lambda config: build_index(config, HERE),
        "mine": find_reference(COMMANDS["mine"].run),
        **jobs,
    }
    instead = {COMMANDS[job].run: told(job, run) for job, run in here.items()}
    patch.setattr(
        "raytower.pipeline.job.find_reference", lambda name: instead.get(name) or find_reference(name)
    )
