"""How many workers a job has, and what each of them holds, where its config leaves that to the machine.

One worker a GPU where there are GPUs: each computes alone, and none lies idle. Without GPUs one worker a machine: its
threads share one copy of the model, which two workers of half the cores would hold twice, and average at each step of a
training. Numbers that a config gives are taken as they are. Pure; `runtime.find_nodes` says what there is.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from raytower.config import FittedWorkersConfig, WorkersConfig
from raytower.errors import InputError
from raytower.progress import log
from raytower.requirements import has_labels

# Ray gives it to nodes of launchers (`ray up`, KubeRay), which may add others; those that `ray start` joins lack it.
_NODE_GROUP = "ray.io/node-group"
_NODE_ID = "ray.io/node-id"
_NODES_SHOWN = 8
# How many CPUs a submitted job's own process holds on the node where it runs; set by `raytower submit`.
DRIVER_CPUS_VARIABLE = "RAYTOWER_DRIVER_CPUS"


@dataclass(frozen=True, kw_only=True)
class Node:
    """What a machine has for workers."""

    cpus: float
    gpus: float = 0
    labels: Mapping[str, str] = field(default_factory=dict, compare=False)
    resources: Mapping[str, float] = field(default_factory=dict, compare=False)
    """All that Ray counts there, by its names; of CPUs also those that are left to other tasks."""

    def suits(self, asked: FittedWorkersConfig) -> bool:
        """Whether it has the labels and, when idle, the resources beside CPUs and GPUs that a worker asks for."""
        return has_labels(asked.label_selector, self.labels) and all(
            self.amount(name) >= amount for name, amount in asked.resources.items()
        )

    def holds(self, worker: WorkersConfig) -> bool:
        """Whether a worker finds room there when it is idle."""
        has_both = self.amount("CPU") >= worker.num_cpus and self.amount("GPU") >= worker.num_gpus
        return has_both and self.suits(worker)

    def amount(self, name: str) -> float:
        """How much it has of one of Ray's resources, when idle."""
        return self.resources.get(name, {"CPU": self.cpus, "GPU": self.gpus}.get(name, 0))


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
        return _with(asked, num=asked.num, num_cpus=asked.num_cpus, num_gpus=asked.num_gpus)
    nodes = find_nodes()
    fitted = plan_workers(
        asked, nodes, per_cpu_node=per_cpu_node, share=share, least=least, use_gpus=use_gpus
    )
    nodes = [node for node in nodes if node.suits(asked)]
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
    there = nodes
    nodes = [node for node in there if node.cpus > 0 and node.suits(asked)]
    if not nodes and asked.num is None:
        raise nobody_decides(_lacking(there, asked))
    if not nodes:
        return _with(asked, num=asked.num or 1, num_cpus=asked.num_cpus or 1, num_gpus=asked.num_gpus or 0)
    num_gpus = asked.num_gpus
    if num_gpus is None:
        all_gpus = sum(int(node.gpus) for node in nodes)
        begin = 1 if asked.num is None else least or asked.num
        num_gpus = 1.0 if use_gpus and all_gpus >= begin else 0.0
    usable = [node for node in nodes if num_gpus and node.gpus >= num_gpus] or nodes

    def places(node: Node) -> int:
        """Workers that one node takes."""
        if num_gpus and node.gpus >= num_gpus:
            most = int(node.gpus / num_gpus)
        else:
            most = max(min(per_cpu_node, int(node.cpus)), 1)
        # 0.3 of 0.9 are 3, which floating point makes a little less.
        return min([most, *(int(node.amount(name) / each + 1e-9) for name, each in asked.resources.items())])

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
    return _with(asked, num=num, num_cpus=asked.num_cpus or max(num_cpus, 0.01), num_gpus=num_gpus)


def _with(asked: FittedWorkersConfig, *, num: int, num_cpus: float, num_gpus: float) -> WorkersConfig:
    """Workers with these numbers, and what else is asked for each."""
    return WorkersConfig(
        num=num,
        num_cpus=num_cpus,
        num_gpus=num_gpus,
        resources=asked.resources,
        label_selector=asked.label_selector,
    )


def nobody_decides(lacking: str = "") -> InputError:
    """The refusal of null as workers.num where no machine is there that could decide.

    Args:
        lacking: what the nodes would have to have besides CPUs, and what they have.
    """
    return InputError(
        f"workers.num is null, and the cluster has no node with CPUs{lacking} now that could decide; where nodes come "
        "with demand say what to ask for, such as --workers.num 4 --workers.num_cpus 8 --workers.num_gpus 1"
    )


def _lacking(nodes: Sequence[Node], asked: FittedWorkersConfig) -> str:
    """` and 1 TPU (they are: …)` of nodes none of which suits, "" where there is none or nothing else is asked for."""
    if not nodes or not asked.ray_options:
        return ""
    wanted = _listed(asked.resources, asked.label_selector)
    return f" and {wanted} (they are: {_what_nodes_have(nodes, asked)})"


def refuse_without_room(worker: WorkersConfig, nodes: Sequence[Node]) -> None:
    """Refuse workers that would wait for ever, without a word: no node has room for one, and none will come.

    Args:
        worker: each of them.
        nodes: all of the cluster, those without CPUs too.

    Raises:
        InputError: as said, with what the nodes have.
    """
    if any(node.holds(worker) for node in nodes):
        return
    asked = {"CPU": worker.num_cpus, "GPU": worker.num_gpus, **worker.resources}
    wanted = _listed({name: amount for name, amount in asked.items() if amount}, worker.label_selector)
    # A cluster without a single CPU can only be one whose nodes come with demand.
    if any(_NODE_GROUP in node.labels for node in nodes) or not any(node.amount("CPU") for node in nodes):
        log(f"no node has room for a process now that asks for {wanted}; the job waits until one comes")
        return
    raise InputError(
        f"a process asks for {wanted}, and no node has that: {_what_nodes_have(nodes, worker)}; ask for less by "
        "num_cpus, num_gpus, resources and label_selector, or start nodes that have it (`ray start --labels, "
        "--resources`)"
    )


def _what_nodes_have(nodes: Sequence[Node], asked: FittedWorkersConfig) -> str:
    """Amounts of what is asked for, and all labels but those that name the node itself; each once, with its number."""
    names = ["CPU", "GPU", *asked.resources]
    found = Counter(
        _listed(
            {name: node.amount(name) for name in names if node.amount(name)},
            {name: value for name, value in sorted(node.labels.items()) if name != _NODE_ID},
        )
        for node in nodes
    )
    shown = [
        f"{count} with {words or 'nothing of it and no labels'}"
        for words, count in found.most_common(_NODES_SHOWN)
    ]
    return "; ".join([*shown, "…"] if len(found) > len(shown) else shown)


def _listed(amounts: Mapping[str, float], labels: Mapping[str, str]) -> str:
    """`4 CPU, 1 GPU, labels {"ray.io/market-type": "spot"}`."""
    words = [f"{amount:g} {name}" for name, amount in amounts.items()]
    return ", ".join([*words, f"labels {json.dumps(dict(labels))}"] if labels else words)


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
