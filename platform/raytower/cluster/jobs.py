"""The jobs that can be submitted: what the process of each does itself, and what it writes."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from raytower.cluster.resources import DriverWork
from raytower.errors import InputError

# Commands that have a file in jobs/.
JOBS = (
    "adapt",
    "index add",
    "index build",
    "classify",
    "index compact",
    "index delete",
    "demo",
    "encode",
    "evaluate",
    "export",
    "mine",
    "pairs",
    "pipeline",
    "refresh",
    "rerank",
    "search",
    "serve",
    "index set",
    "similarity",
    "index sync",
    "train-classifier",
    "train-reranker",
    "train-retriever",
    "tune-classify",
    "tune-fusion",
)
# Those whose own process runs models over all rows.
_ALONE = {"export", "tune-classify", "tune-fusion"}
# Those whose own process has work besides that of workers, or steps that have.
_BESIDE_WORKERS = {"adapt", "demo", "evaluate", "pipeline", "refresh"}


def check_job(name: str) -> str:
    """`name`, where a job has it. Raises InputError that names the nearest."""
    if name not in JOBS:
        nearest = difflib.get_close_matches(name, JOBS, n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]!r}? There" if nearest else "there"
        raise InputError(f"job is {name!r}, which cannot be submitted; {hint} are {', '.join(JOBS)}")
    return name


def driver_work(name: str) -> DriverWork:
    """What a job's own process computes, which must not run beside the cluster's scheduler where it is something."""
    if name in _ALONE:
        return "alone"
    return "beside workers" if name in _BESIDE_WORKERS else "none"


def written_by(name: str, values: Mapping[str, Any]) -> str | None:
    """What no second job may write at the same time: a job's output, the index that it changes, or its state file."""
    keys = ["output", "state", "work_dir", *(["index"] if name.startswith("index ") else [])]
    return next((str(values[key]) for key in keys if values.get(key) is not None), None)
