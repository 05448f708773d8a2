"""Whether every node of a cluster sees what a job writes: asked before work, by a file that each node reads.

On a folder of one machine each node would write its part into a folder of its own, and the job would fail at its end,
or leave an output with holes. Costs nothing where there is one node.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raytower.errors import InputError, RaytowerError
from raytower.storage import Location

_PREFIX = ".raytower-seen-"
# A node that is lost ends its task; one that only begins a process may be slow, on a machine that is busy.
_LIMIT_S = 300.0
# Nodes to what each said; None where it did not answer in time. One that was lost meanwhile is not among them.
Answers = Mapping[str, str | None]
Ask = Callable[[Sequence[str], Location, str], Answers]

_asked: dict[str, set[str]] = {}
"""Outputs to the nodes that were found to see them: the steps of a job ask, and those of a pipeline."""


def check_shared(output: Location) -> None:
    """Refuse an output that not every node which may do work sees. Ray runs already.

    Raises:
        InputError: a node does not find what this one wrote there, or cannot write there itself; the message names the
            first such node and the path.
        RaytowerError: a node does not answer.
    """
    seen = _asked.setdefault(str(output), set())
    found = nodes_to_ask(ray.nodes(), ray.get_runtime_context().get_node_id())
    nodes = {node: address for node, address in found.items() if node not in seen}
    if nodes:
        probe(output, nodes, _ask_by_tasks)
        seen |= nodes.keys()


def nodes_to_ask(nodes: Sequence[Mapping[str, Any]], own: str) -> dict[str, str]:
    """Ids of the nodes that are asked to their addresses: those with CPUs or GPUs that live, but for the own one.

    Args:
        nodes: as `ray.nodes()` has them.
        own: id of the node that this process is on, which writes the file.
    """
    return {
        node["NodeID"]: node["NodeManagerAddress"]
        for node in nodes
        if node["Alive"]
        and node["NodeID"] != own
        and any(node["Resources"].get(name, 0) > 0 for name in ("CPU", "GPU"))
    }


def probe(output: Location, nodes: Mapping[str, str], ask: Ask) -> None:
    """Write a file into `output`, have `ask` ask all nodes for it, and look for what they wrote. Nothing of it stays.

    Args:
        output: a folder, which is made where there is none, or a file's folder.
        nodes: ids of nodes to their addresses.
        ask: gives what each node says, by its id: "" where it saw and wrote, else what went wrong.

    Raises:
        InputError, RaytowerError: as `check_shared`.
    """
    folder = output.parent if output.is_file() else output
    folder.make_dir()
    mark = f"{_PREFIX}{secrets.token_hex(8)}"
    try:
        (folder / mark).write_bytes(mark.encode())
        answers = ask(list(nodes), folder, mark)
        # Read after all have answered: a folder that a node made for itself has its file and not this one's.
        found = {node: (folder / f"{mark}-{node}").exists() for node in nodes}
        refuse_unshared(folder, nodes, answers, found)
    finally:
        for node in nodes:
            with suppress(RaytowerError):
                (folder / f"{mark}-{node}").delete()
        with suppress(RaytowerError):
            (folder / mark).delete()


def refuse_unshared(
    folder: Location, nodes: Mapping[str, str], answers: Answers, found: Mapping[str, bool]
) -> None:
    """Raise the error for the first node that does not share `folder`, of what all said and left."""
    for node, address in nodes.items():
        if node not in answers:
            continue  # the job does without it, as it does where one is lost later
        answer = answers[node]
        if answer is None:
            raise RaytowerError(
                f"node {address} did not answer within {_LIMIT_S:g} s whether it sees {folder}; look at it by `ray "
                "status`, or run the command again without it"
            )
        if answer or not found[node]:
            what = answer or "what it writes there does not arrive here"
            raise InputError(
                f"output {str(folder)!r} is not shared: node {address} {what}, and {len(nodes) + 1} nodes would write "
                "there; name a URI that every node sees (s3://…, gs://…), or a folder that is mounted at the same path "
                "on all"
            )


def _ask_by_tasks(nodes: Sequence[str], folder: Location, mark: str) -> Answers:
    """A task on each node, which holds no CPU, so that it waits for nobody."""
    task = ray.remote(num_cpus=0, max_retries=0)(_see_and_write)
    asked = {
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(
            str(folder), mark, node
        ): node
        for node in nodes
    }
    answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=_LIMIT_S)
    answers: dict[str, str | None] = dict.fromkeys(nodes)
    for reference in answered:
        try:
            answers[asked[reference]] = ray.get(reference)
        except ray.exceptions.RayError as error:
            answers[asked[reference]] = f"cannot be asked ({str(error).splitlines()[0]})"
    failed = {node for node, answer in answers.items() if answer != ""}
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]} if failed else set()
    return {node: answer for node, answer in answers.items() if node not in failed - alive}


def _see_and_write(folder: str, mark: str, node: str) -> str:
    """On a node: "" where the file is there and another could be written beside it, else what is wrong."""
    place = Location.of(folder)
    try:
        if not (place / mark).exists() or (place / mark).read_bytes() != mark.encode():
            return "does not find there what this one wrote"
        (place / f"{mark}-{node}").write_bytes(mark.encode())
    except (RaytowerError, OSError) as error:
        return f"cannot use it ({error})"
    return ""
