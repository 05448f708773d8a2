"""Running the steps of an index job: as Ray tasks, or one after the other in this process.

Ray is imported by the first step that runs on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from raytower.config import WorkersConfig
from raytower.errors import import_extra
from raytower.progress import log
from raytower.requirements import has_labels
from raytower.storage import Location

ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class Run:
    """How the steps of a job run: on `threads` each, those that can use one on `num_gpus`, `at_once` at a time.

    As Ray tasks, each holding `workers.num_cpus`, where there are `workers`: Ray starts with the first. Else in this
    process, one after the other: for work that takes less time than starting Ray.
    """

    threads: int = 1
    at_once: int = 1
    num_gpus: float = 0
    workers: WorkersConfig | None = None
    output: Location | None = None
    """What the tasks write into, which every node must see; None where that is not asked."""

    @property
    def threads_alone(self) -> int:
        """Threads for a step that runs while no other does: those of all workers, as far as one node has cores.

        The task holds the CPUs of one worker all the same: one that asks for a whole node would wait for whatever else
        lives there.
        """
        if self.workers is None:
            return self.threads
        ray = _started_ray(self.workers, self.output)
        cores = [
            node["Resources"].get("CPU", 0.0)
            for node in ray.nodes()
            if node["Alive"] and has_labels(self.workers.label_selector, node.get("Labels") or {})
        ]
        wanted = int(self.workers.num * self.workers.num_cpus)
        return max(min(wanted, int(max(cores, default=0))), self.threads)

    def __call__(
        self,
        function: Callable[..., ResultT],
        calls: Sequence[tuple[Any, ...]],
        *,
        at_once: int | None = None,
        num_gpus: float = 0,
        progress: str | None = None,
    ) -> list[ResultT]:
        """Results of `function` over `calls`, in order; `progress` is logged with numbers of finished and of all calls.

        Raises:
            InputError: no node has room for such a task.
            RaytowerError: the first failure, as it was raised where that was meant for the user.
        """
        if self.workers is None:
            return [function(*arguments) for arguments in calls]
        ray = _started_ray(self.workers, self.output)
        from raytower.runtime import check_room, run_tasks

        check_room(self.workers.model_copy(update={"num_gpus": num_gpus}))
        task = ray.remote(num_cpus=self.workers.num_cpus, num_gpus=num_gpus, **self.workers.ray_options)(
            function
        )
        # What all calls share travels once, not once a call.
        common = calls[0] if len(calls) > 1 else ()
        shared = {id(value): ray.put(value) for value in common if getattr(value, "nbytes", 0) > 2**16}

        def start(number: int) -> Any:
            return task.remote(*(shared.get(id(value), value) for value in calls[number]))

        results: dict[int, ResultT] = {}
        for number, result in run_tasks(start, range(len(calls)), at_once or self.at_once, "the index job"):
            results[number] = result
            if progress:
                log(progress.format(len(results), len(calls)))
        return [results[number] for number in range(len(calls))]


def on_ray(workers: WorkersConfig, output: Location | None = None) -> Run:
    return Run(workers.num_threads, workers.num, workers.num_gpus, workers, output)


def _started_ray(workers: WorkersConfig, output: Location | None) -> Any:
    """The module, once Ray runs.

    Raises:
        MissingExtraError: Ray is not installed; with the install line.
        InputError: not every node sees `output`.
    """
    ray = import_extra("ray")
    from raytower.runtime import ensure_ray

    ensure_ray(workers.num_cpus)
    if output is not None:
        from raytower.shared_storage import check_shared

        check_shared(output)
    return ray
