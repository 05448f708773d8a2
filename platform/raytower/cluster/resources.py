"""What a job asks Ray for, and whether the cluster has it, or can bring it. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

_DRIVER_CPUS = 8
# The driver, a worker, and a CPU for the tasks that feed it.
_ROOM_FOR_BOTH = 3
_PART_OF_CPU = 0.1
DriverWork = Literal["none", "beside workers", "alone"]
"""What a job's own process computes: nothing, something besides its workers, or all of the job."""


@dataclass(frozen=True, kw_only=True)
class NodeType:
    """A kind of machine that the autoscaler may start, `most` of it at once."""

    name: str
    resources: Mapping[str, float]
    most: int


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What one process of a job holds, and how many of them must find room at the same time."""

    key: str
    """The config key that asks for it."""
    bundle: Mapping[str, float]
    """Ray's resources (CPU, GPU, memory in bytes) to amounts."""
    together: int = 1


def driver_cpus(asked: float | None, work: DriverWork, nodes: Sequence[Mapping[str, float]]) -> float:
    """CPUs for a job's own process: those that were asked for, else what its work needs of a node.

    One that computes alone has 8 where a node has more; of a largest node with 4 CPUs 3; of one with 1 that; 8 where
    nodes come with demand and none is there yet. One whose workers wait for room beside it leaves that to them: it has
    1, and a tenth of a node with 1 or 2 CPUs, which keeps it off a head without any.
    """
    if asked is not None:
        return asked
    if work == "none":
        return 0
    largest = max((node.get("CPU", 0) for node in nodes), default=0)
    if work == "beside workers":
        return 1 if largest == 0 or largest >= _ROOM_FOR_BOTH else _PART_OF_CPU
    return _DRIVER_CPUS if largest == 0 else max(min(_DRIVER_CPUS, math.floor(largest) - 1), min(largest, 1))


def demands(values: Mapping[str, Any], any_node: bool, trains: bool) -> list[Demand]:
    """What the `workers` of a config ask for, and the replicas of a server. Null is as the machines have it.

    Labels are not among it: the job itself looks for them before its work (`runtime.check_room`).

    Args:
        values: a config as plain values.
        any_node: whether there is a node with CPUs now: null fits itself to it. Where none is, null is 1 CPU.
        trains: whether workers begin together, as those of a training do.
    """
    found = list(_workers(values, "", any_node, trains))
    for prefix, num in (("", "replicas"), ("rerank_", "rerank_replicas"), ("shard_", "shard_replicas")):
        own = values.get("layout") == {"rerank_": "split", "shard_": "sharded"}.get(
            prefix, values.get("layout")
        )
        if "replicas" in values and own:
            bundle = _bundle(values, values.get(f"{prefix}num_cpus"), values.get(f"{prefix}num_gpus"))
            together = 1 if prefix == "" and values.get("autoscaling") else values[num]
            found.append(Demand(key=num, bundle=bundle, together=together))
    return [demand for demand in found if demand.bundle]


def _workers(values: Any, key: str, any_node: bool, trains: bool) -> Iterator[Demand]:
    if isinstance(values, Mapping):
        for name, value in values.items():
            path = f"{key}.{name}" if key else str(name)
            if name == "workers" and isinstance(value, Mapping):
                cpus = value.get("num_cpus") or (None if any_node else 1)
                num = (value.get("min") or value.get("num") or 1) if trains else 1
                yield Demand(key=path, bundle=_bundle(value, cpus, value.get("num_gpus")), together=num)
            else:
                yield from _workers(value, path, any_node, trains)
    elif isinstance(values, (list, tuple)):
        for number, value in enumerate(values):
            yield from _workers(value, f"{key}.{number}", any_node, trains)


def _bundle(values: Mapping[str, Any], cpus: float | None, gpus: float | None) -> dict[str, float]:
    asked = {"CPU": cpus, "GPU": gpus, **(values.get("resources") or {})}
    return {name: amount for name, amount in asked.items() if amount}


def undecided(values: Mapping[str, Any]) -> bool:
    """Whether the machines that are there are to decide how many workers there are."""
    workers = values.get("workers")
    return isinstance(workers, Mapping) and "num" in workers and workers["num"] is None


def unmet(
    asked: Sequence[Demand], nodes: Sequence[Mapping[str, float]], types: Sequence[NodeType]
) -> list[str]:
    """What neither the nodes that are there nor those that may come have room for, a message each.

    Room is reckoned as if nothing else ran: what others hold now becomes free.
    """
    problems = []
    for demand in asked:
        wanted = " and ".join(f"{_shown(name, amount)}" for name, amount in demand.bundle.items())
        places = sum(_room(demand.bundle, node) for node in nodes)
        # A node that is there may be one of a type that may come: counted twice, it makes no job be refused.
        places += sum(kind.most * _room(demand.bundle, kind.resources) for kind in types)
        if places >= demand.together:
            continue
        what = f"{demand.key} asks for {wanted} in one process"
        if places or demand.together > 1:
            what = f"{demand.key} asks for {demand.together} processes at once, each with {wanted}, and there is room "
            what += f"for {places}"
        problems.append(
            f"{what}; the cluster has {_described(nodes)}, and {_come(types)}: ask for less, or start nodes "
            "that have it"
        )
    return problems


def _room(bundle: Mapping[str, float], resources: Mapping[str, float]) -> int:
    return min(math.floor(resources.get(name, 0) / amount + 1e-9) for name, amount in bundle.items())


def _described(nodes: Sequence[Mapping[str, float]]) -> str:
    counts: dict[str, int] = {}
    for node in nodes:
        shown = ", ".join(_shown(name, node[name]) for name in ("CPU", "GPU", "memory") if node.get(name))
        counts[shown or "nothing for workers"] = counts.get(shown or "nothing for workers", 0) + 1
    if not counts:
        return "no node"
    return "; ".join(
        f"{number} node{'' if number == 1 else 's'} with {shown}" for shown, number in counts.items()
    )


def _come(types: Sequence[NodeType]) -> str:
    if not types:
        return "none comes with demand"
    kinds = "; ".join(
        f"{kind.name} ({', '.join(_shown(name, amount) for name, amount in kind.resources.items()) or 'nothing'})"
        for kind in types
    )
    return f"with demand may come {kinds}"


def _shown(name: str, amount: float) -> str:
    if name == "memory":
        return f"{amount / 2**30:.3g} GiB of memory"
    return f"{amount:g} {name}{'s' if name in ('CPU', 'GPU') and amount != 1 else ''}"
