"""The jobs that can be submitted: which file of jobs/ runs a command, what its process does itself, what it writes."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from raytower.errors import InputError

# Commands, and the names of their files in jobs/.
JOBS: dict[str, str] = {
    "adapt": "adapt",
    "index add": "add_to_index",
    "index build": "build_index",
    "classify": "classify",
    "index compact": "compact_index",
    "index delete": "delete_from_index",
    "demo": "demo",
    "encode": "encode_corpus",
    "evaluate": "evaluate",
    "export": "export",
    "mine": "mine_negatives",
    "pairs": "pairs",
    "pipeline": "pipeline",
    "refresh": "refresh",
    "rerank": "rerank",
    "search": "search",
    "serve": "serve",
    "index set": "set_in_index",
    "similarity": "similarity",
    "index sync": "sync_index",
    "train-classifier": "train_classifier",
    "train-reranker": "train_reranker",
    "train-retriever": "train_retriever",
    "tune-classify": "tune_classify",
    "tune-fusion": "tune_fusion",
}
# Those whose own process runs models over all rows, or has steps that do.
_COMPUTING = {
    *("adapt", "classify", "demo", "evaluate", "export", "mine", "pipeline", "refresh", "tune-classify"),
    "tune-fusion",
}


def check_job(name: str) -> str:
    """`name`, where a job has it. Raises InputError that names the nearest."""
    if name not in JOBS:
        nearest = difflib.get_close_matches(name, JOBS, n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]!r}? There" if nearest else "there"
        raise InputError(f"job is {name!r}, which cannot be submitted; {hint} are {', '.join(JOBS)}")
    return name


def computes_itself(name: str) -> bool:
    """Whether the job's own process needs CPUs, and must not run beside the cluster's scheduler."""
    return name in _COMPUTING


def written_by(name: str, values: Mapping[str, Any]) -> str | None:
    """What no second job may write at the same time: a job's output, the index that it changes, or its state file."""
    keys = ["output", "state", "work_dir", *(["index"] if name.startswith("index ") else [])]
    return next((str(values[key]) for key in keys if values.get(key) is not None), None)
