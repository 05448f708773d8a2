"""What only a process on the cluster's head can tell: which variables are set there, which machines may come.

A job of no resources that prints one line. Asked only where the answer decides.
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raytower.cluster.resources import NodeType
from raytower.errors import RaytowerError

_MARK = "raytower-answer "
_LIMIT_S = 90.0
_POLL_S = 0.3
# The autoscaler's config is in no API of Ray: the process that goes by it names the file. On Kubernetes that process
# lies in a container of its own, and what it may start cannot be known here.
_SCRIPT = f"""
import glob, json, os, sys
import yaml
types, found = [], False
for path in glob.glob("/proc/[0-9]*/cmdline"):
    try:
        words = open(path, "rb").read().decode(errors="replace").split("\\0")
    except OSError:
        continue
    options = dict(word.partition("=")[::2] for word in words)
    file = options.get("--autoscaling-config")
    if not file or options.get("--gcs-address", "") != os.environ.get("RAY_ADDRESS"):
        continue
    config = yaml.safe_load(open(os.path.expanduser(file)))
    for name, kind in (config.get("available_node_types") or {{}}).items():
        most = kind.get("max_workers", config.get("max_workers", 0))
        types.append([name, kind.get("resources") or {{}}, most])
    found = True
known = found or "KUBERNETES_SERVICE_HOST" not in os.environ
unset = [name for name in json.loads(sys.argv[1]) if not os.environ.get(name)]
print({_MARK!r} + json.dumps({{"unset": unset, "types": types if known else None}}))
"""


@dataclass(frozen=True, kw_only=True)
class There:
    """What the head says."""

    unset: tuple[str, ...]
    """Of the variables that were asked for, those that are not set for a job there."""
    types: tuple[NodeType, ...] | None
    """Machines that the autoscaler may start, none without one; None where that cannot be known."""


def ask_head(client: Any, variables: Sequence[str]) -> There:
    """Run the job and read its line.

    Args:
        client: Ray's client of the cluster's jobs.
        variables: names of environment variables.

    Raises:
        RaytowerError: the job did not end in its time, or failed.
    """
    command = shlex.join(["python", "-c", _SCRIPT, json.dumps(list(variables))])
    job = client.submit_job(entrypoint=command, metadata={"raytower_probe": "1"})
    deadline = time.monotonic() + _LIMIT_S
    while not (status := client.get_job_status(job)).is_terminal():
        if time.monotonic() > deadline:
            client.stop_job(job)
            raise RaytowerError(
                f"the cluster's head did not run a job that needs no resources within {_LIMIT_S:g} s (it is {status}); "
                "look at it by `ray job list` and `ray status`"
            )
        time.sleep(_POLL_S)
    said = str(client.get_job_logs(job))
    answers = [line.removeprefix(_MARK) for line in said.splitlines() if line.startswith(_MARK)]
    if not answers:
        end = " ".join(said.split())[-500:] or client.get_job_info(job).message
        raise RaytowerError(
            f"the cluster's head could not be asked what it has, the job {job} is {status}: {end}; its `python` must "
            "be that of the environment in which Ray was started"
        )
    return read_answer(json.loads(answers[-1]))


def read_answer(answer: Mapping[str, Any]) -> There:
    """The head's line as what it means."""
    types = answer["types"]
    return There(
        unset=tuple(answer["unset"]),
        types=None
        if types is None
        else tuple(NodeType(name=name, resources=resources, most=most) for name, resources, most in types),
    )
