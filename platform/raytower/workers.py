"""How many workers a job has, and what each of them holds, where its config leaves that to the machine.

One worker a GPU where there are GPUs: each computes alone, and none lies idle. Without GPUs one worker a machine: its
threads share one copy of the model, which two workers of half the cores would hold twice, and average at each step of a
training. Numbers that a config gives are taken as they are. Pure; `runtime.find_nodes` says what there is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from raytower.config import FittedWorkersConfig, WorkersConfig
from raytower.errors import InputError
from raytower.progress import log


@dataclass(frozen=True, kw_only=True)
class Node:
    """What a machine has for workers."""

    cpus: float
    gpus: float = 0


def fit_workers(
    asked: FittedWorkersConfig,
    find_nodes: Callable[[], Sequence[Node]],
    *,
    per_cpu_node: int = 1,
    share: int | None = None,
    least: int | None = None,
    use_gpus: bool = True,
) -> WorkersConfig:
    """The workers of a job, with one line of log where the machine decided any of it.

    Args:
        asked: the job's config; null is as the machine has it.
        find_nodes: called where anything is null.
        per_cpu_node: workers of a machine where none computes on a GPU.
        share: what workers share evenly, such as the rows of a batch; as many workers as divide it. None: nothing.
        least: how many the job begins and goes on with where there is no room for all; None is all.
        use_gpus: whether the job can compute on GPUs.

    Raises:
        InputError: there is no machine now that could decide how many, or it decides for fewer than `least`.
    """
    if asked.num is not None and asked.num_cpus is not None and asked.num_gpus is not None:
        return WorkersConfig(num=asked.num, num_cpus=asked.num_cpus, num_gpus=asked.num_gpus)
    nodes = find_nodes()
    fitted = plan_workers(
        asked, nodes, per_cpu_node=per_cpu_node, share=share, least=least, use_gpus=use_gpus
    )
    there = f"{sum(node.cpus for node in nodes):g} CPUs and {sum(node.gpus for node in nodes):g} GPUs"
    num = f"{fitted.num}" if least is None else f"{least} to {fitted.num}"
    log(
        f"workers: {num}, each with {fitted.num_cpus:g} CPUs and {fitted.num_gpus:g} GPUs, of {there} on "
        f"{len(nodes)} machine{'' if len(nodes) == 1 else 's'} (workers.num, num_cpus and num_gpus say otherwise)"
    )
    return fitted


def plan_workers(
    asked: FittedWorkersConfig,
    nodes: Sequence[Node],
    *,
    per_cpu_node: int = 1,
    share: int | None = None,
    least: int | None = None,
    use_gpus: bool = True,
) -> WorkersConfig:
    """As `fit_workers`, of what the machines have.

    Eight GPUs and 96 CPUs on one node: eight workers of one GPU and 12 CPUs. Three nodes of 16 CPUs, and one of 1:
    three of 16.

    Of a cluster whose nodes come with demand there may be none now: then num must be given, and null is 1 CPU
    and no GPU.

    Raises:
        InputError: num is null, and no node has CPUs, or all have room for fewer than `least`.
    """
    nodes = [node for node in nodes if node.cpus > 0]
    if not nodes and asked.num is None:
        raise InputError(
            "workers.num is null, and the cluster has no node with CPUs now that could decide; where nodes come with "
            "demand say what to ask for, such as --workers.num 4 --workers.num_cpus 8 --workers.num_gpus 1"
        )
    if not nodes:
        return WorkersConfig(num=asked.num or 1, num_cpus=asked.num_cpus or 1, num_gpus=asked.num_gpus or 0)
    num_gpus = asked.num_gpus
    if num_gpus is None:
        all_gpus = sum(int(node.gpus) for node in nodes)
        begin = 1 if asked.num is None else least or asked.num
        num_gpus = 1.0 if use_gpus and all_gpus >= begin else 0.0
    usable = [node for node in nodes if num_gpus and node.gpus >= num_gpus] or nodes

    def places(node: Node) -> int:
        """Workers that one node takes."""
        if num_gpus and node.gpus >= num_gpus:
            return int(node.gpus / num_gpus)
        return max(min(per_cpu_node, int(node.cpus)), 1)

    usable = _chosen_nodes(usable, places, asked.num, by_gpus=bool(num_gpus))
    most = sum(map(places, usable))
    num = asked.num or (most if share is None else _largest_divisor(share, most))
    if least is not None and num < least:
        raise InputError(
            f"workers.min is {least}, and the machines that are there have room for {num} workers that share a batch "
            "evenly; lower it, or say by workers.num how many to wait for"
        )
    now = num if least is None else max(most_of(worker_counts(least, num), most), least)
    cpus = _cpus_of_each(usable, places, now)
    # Threads are whole; of more workers than CPUs each holds a part of one.
    num_cpus = float(int(cpus)) if cpus >= 1 else int(cpus * 100) / 100
    return WorkersConfig(num=num, num_cpus=asked.num_cpus or max(num_cpus, 0.01), num_gpus=num_gpus)


def _chosen_nodes(
    usable: list[Node], places: Callable[[Node], int], wanted: int | None, *, by_gpus: bool
) -> list[Node]:
    """The nodes whose workers, who are all alike, have most CPUs together; all, where GPUs say how many there are.

    Of 15, 15 and 1 CPUs two workers of 15, not three of 1.
    """
    by_size = sorted(usable, key=lambda node: node.cpus / places(node), reverse=True)
    parts = [by_size[: number + 1] for number in range(len(by_size))]
    if wanted is not None:
        enough = [part for part in parts if not by_gpus or sum(map(places, part)) >= wanted]
        return max(enough or [by_size], key=lambda part: _cpus_of_each(part, places, wanted))
    if by_gpus:
        return usable
    return max(parts, key=lambda part: (most := sum(map(places, part))) * _cpus_of_each(part, places, most))


def _cpus_of_each(taken: Sequence[Node], places: Callable[[Node], int], num: int) -> float:
    """CPUs of a worker where `num` are put on these nodes."""
    # Of more workers than there are places a node takes its part.
    crowd = -(-num // len(taken)) if num > sum(map(places, taken)) else 1
    return min(node.cpus / min(max(places(node), crowd), num) for node in taken)


def _largest_divisor(number: int, most: int) -> int:
    return next(divisor for divisor in range(min(most, number), 0, -1) if number % divisor == 0)


def worker_counts(least: int, most: int) -> list[int]:
    """The numbers of workers from `least` to `most` among which `most` equal shares can be given out whole.

    Of 4 shares 1, 2 or 4 workers take equally many; from 2 on these are 2 and 4.
    """
    return [count for count in range(least, most + 1) if most % count == 0]


def most_of(counts: Sequence[int], places: int) -> int:
    """The largest of `counts` that there are places for, 0 where there are too few for any."""
    return max((count for count in counts if count <= places), default=0)


def gpu_share(num_processes: int, gpus: int) -> float:
    """GPUs of each of several processes that serve models: one, or a part where there are fewer than processes."""
    # Rounded down, so that all find room.
    return 1.0 if gpus >= num_processes else gpus * 100 // num_processes / 100
