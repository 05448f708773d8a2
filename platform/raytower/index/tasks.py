"""Running the steps of an index job as Ray tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import ray

from raytower.errors import RaytowerError, find_cause
from raytower.index.config import IndexWorkersConfig
from raytower.runtime import log

ResultT = TypeVar("ResultT")


def threads_of_lone_task(workers: IndexWorkersConfig) -> int:
    """Threads for a task that runs while the others wait: those of all workers, as far as one node has cores.

    It holds the CPUs of one worker all the same: a task that asks for a whole node would wait for whatever else lives
    there.
    """
    cores = [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]
    return max(min(int(workers.max * workers.num_cpus), int(max(cores, default=0))), workers.num_threads)


def run_tasks(
    function: Callable[..., ResultT],
    calls: Sequence[tuple[Any, ...]],
    workers: IndexWorkersConfig,
    *,
    at_once: int | None = None,
    num_gpus: float = 0,
    progress: str | None = None,
) -> list[ResultT]:
    """Results of `function` over `calls`, in order, with at most `at_once` (default: workers.max) running.

    Each call holds `workers.num_cpus` and `num_gpus`.

    `progress` is logged with the numbers of finished and of all calls.

    Raises:
        RaytowerError: the first failure, as the task raised it where that was meant for the user.
    """
    task = ray.remote(num_cpus=workers.num_cpus, num_gpus=num_gpus)(function)
    waiting = list(enumerate(calls))
    running: dict[ray.ObjectRef[Any], int] = {}
    results: dict[int, ResultT] = {}
    try:
        while waiting or running:
            while waiting and len(running) < (at_once or workers.max):
                number, arguments = waiting.pop(0)
                running[task.remote(*arguments)] = number
            finished, _ = ray.wait(list(running), num_returns=1)
            number = running.pop(finished[0])
            results[number] = ray.get(finished[0])
            if progress:
                log(progress.format(len(results), len(calls)))
    except Exception as error:
        for reference in running:
            ray.cancel(reference, force=True)
        cause = find_cause(error)
        if isinstance(cause, RaytowerError):
            raise cause from None
        raise RaytowerError(f"a task of the index job failed: {cause}") from error
    return [results[number] for number in range(len(calls))]
