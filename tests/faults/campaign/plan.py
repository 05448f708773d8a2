"""Which fault meets which job, and when: drawn by a seed, from the pairs that make sense."""

from __future__ import annotations

import os
import random
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

# In the environment of every process of a campaign: which campaign it belongs to.
MARK = "RAYTOWER_CAMPAIGN"

KINDS = {
    "worker": "a worker process gets SIGKILL",
    "actor": "an actor is killed through the cluster's own control",
    "node": "a node is lost, with all its processes",
    "blocks": "a node is lost that holds blocks of the object store",
    "driver": "the driver gets SIGKILL, and the job is run again",
    "head": "the head is lost; the cluster is started anew, and the job is submitted again",
    "stall": "a raylet or a worker, or the driver of a job that has none, gets SIGSTOP, and SIGCONT seconds later",
    "disk": "the disk of the output is full, until there is room again",
    "s3": "the object store answers 500 or 503, cuts answers off, drops connections, is slow or is away for a while",
    "clock": "the driver's clock is set by an hour, and a second job with another clock comes to its output",
    "replica": "a replica is killed under load",
}
# `blocks` of a job whose tasks leave some on other nodes than the head. Mining and evaluating are one process each.
SENSIBLE = {
    "training": ("worker", "actor", "node", "blocks", "driver", "head", "stall", "disk", "s3", "clock"),
    "encoding": ("worker", "actor", "node", "blocks", "driver", "head", "stall", "disk", "s3", "clock"),
    "building": ("worker", "node", "blocks", "driver", "head", "stall", "disk", "s3", "clock"),
    "compacting": ("worker", "node", "blocks", "driver", "head", "stall", "disk", "s3", "clock"),
    "mining": ("driver", "stall", "disk", "s3"),
    "evaluating": ("driver", "stall", "disk", "s3"),
    "serving": ("replica", "worker", "actor", "node", "stall", "driver", "disk", "head"),
}
# A kind whose outcome depends on how it is done is done in so many ways.
WAYS = {"s3": 2, "clock": 2, "stall": 2, "replica": 3}


@dataclass(frozen=True, order=True)
class Injection:
    """One fault in one run of a job."""

    job: str
    kind: str
    moment: float
    """The share of the job that is done when the fault comes."""
    way: int
    """Which of the ways of its kind, from 0."""

    @property
    def name(self) -> str:
        return f"{self.kind}/{self.job}"


def pairs(only: Sequence[str] = ()) -> list[tuple[str, str]]:
    """(job, kind) of all that make sense, or of those that `only` names, as KIND/JOB, KIND or JOB.

    Raises:
        ValueError: a name is none of these.
    """
    known = [(job, kind) for job, kinds in SENSIBLE.items() for kind in kinds]
    if not only:
        return known
    names = {(job, kind): {f"{kind}/{job}", kind, job} for job, kind in known}
    unknown = set(only) - {name for three in names.values() for name in three}
    if unknown:
        raise ValueError(
            f"{', '.join(sorted(unknown))}: neither KIND/JOB nor KIND nor JOB; the kinds: {', '.join(KINDS)}"
        )
    return [pair for pair in known if names[pair] & set(only)]


def draw(seed: int, number: int, only: Sequence[str] = ()) -> list[Injection]:
    """`number` injections, in the order in which they are made: the jobs one after the other, the head's loss last.

    Every pair comes once before any comes twice, and every kind before any pair is left out, as far as `number` goes.
    """
    generator = random.Random(seed)
    left: list[tuple[str, str]] = []
    drawn: list[tuple[str, str]] = []
    while len(drawn) < number:
        if not left:
            left = pairs(only)
            generator.shuffle(left)
            # One of each kind first.
            seen: set[str] = set()
            first = [pair for pair in left if not (pair[1] in seen or seen.add(pair[1]))]  # type: ignore[func-returns-value]
            left = [*first, *(pair for pair in left if pair not in first)]
        drawn.append(left.pop(0))
    times: dict[tuple[str, str], int] = {}
    injections = []
    for job, kind in drawn:
        way = times.setdefault((job, kind), generator.randrange(WAYS.get(kind, 1)))
        times[job, kind] += 1
        moment = round(generator.uniform(0.1, 0.6), 2)
        injections.append(Injection(job, kind, moment, way % WAYS.get(kind, 1)))
    jobs, kinds = list(SENSIBLE), list(KINDS)
    return sorted(
        injections,
        key=lambda item: (jobs.index(item.job), item.kind == "head", kinds.index(item.kind), item.way),
    )


def prepare_environment() -> None:
    """Set what libraries read when they are imported, as tests/conftest.py does, and the mark of this campaign."""
    os.environ[MARK] = uuid.uuid4().hex
    os.environ |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    os.environ |= {"HF_HUB_DISABLE_TELEMETRY": "1", "RAY_USAGE_STATS_ENABLED": "0"}
