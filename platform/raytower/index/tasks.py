"""Running the steps of an index job: as Ray tasks, or one after the other in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from raytower.errors import RaytowerError, find_cause
from raytower.index.config import IndexWorkersConfig
from raytower.runtime import log

ResultT = TypeVar("ResultT")


class Run(Protocol):
    """How the steps of a job run."""

    @property
    def threads(self) -> int:
        """Threads for a step that runs beside others."""

    @property
    def threads_alone(self) -> int:
        """Threads for a step that runs while no other does."""

    @property
    def at_once(self) -> int:
        """Steps that run at the same time."""

    @property
    def num_gpus(self) -> float:
        """GPUs for a step that can use them."""

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
            RaytowerError: the first failure, as it was raised where that was meant for the user.
        """


@dataclass(frozen=True)
class InProcess:
    """In this process, one after the other: for work that takes less time than starting Ray."""

    threads: int = 1
    at_once: int = 1
    num_gpus: float = 0

    @property
    def threads_alone(self) -> int:
        return self.threads

    def __call__(
        self,
        function: Callable[..., ResultT],
        calls: Sequence[tuple[Any, ...]],
        *,
        at_once: int | None = None,
        num_gpus: float = 0,
        progress: str | None = None,
    ) -> list[ResultT]:
        return [function(*arguments) for arguments in calls]


@dataclass(frozen=True)
class OnRay:
    """As Ray tasks, each holding `workers.num_cpus`, at most `workers.max` at once. Ray starts with the first."""

    workers: IndexWorkersConfig

    @property
    def threads(self) -> int:
        return self.workers.num_threads

    @property
    def at_once(self) -> int:
        return self.workers.max

    @property
    def num_gpus(self) -> float:
        return self.workers.num_gpus

    @property
    def threads_alone(self) -> int:
        """Those of all workers, as far as one node has cores.

        The task holds the CPUs of one worker all the same: one that asks for a whole node would wait for whatever else
        lives there.
        """
        import ray

        _start(self.workers)
        cores = [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]
        workers = self.workers
        return max(min(int(workers.max * workers.num_cpus), int(max(cores, default=0))), workers.num_threads)

    def __call__(
        self,
        function: Callable[..., ResultT],
        calls: Sequence[tuple[Any, ...]],
        *,
        at_once: int | None = None,
        num_gpus: float = 0,
        progress: str | None = None,
    ) -> list[ResultT]:
        import ray

        _start(self.workers)
        task = ray.remote(num_cpus=self.workers.num_cpus, num_gpus=num_gpus)(function)
        # What all calls share travels once, not once a call.
        shared = {
            id(value): ray.put(value) for value in (calls[0] if len(calls) > 1 else ()) if _is_large(value)
        }
        waiting = list(enumerate(calls))
        running: dict[Any, int] = {}
        results: dict[int, ResultT] = {}
        try:
            while waiting or running:
                while waiting and len(running) < (at_once or self.at_once):
                    number, arguments = waiting.pop(0)
                    running[task.remote(*(shared.get(id(value), value) for value in arguments))] = number
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


def _start(workers: IndexWorkersConfig) -> None:
    from raytower.runtime import ensure_ray

    ensure_ray(workers.num_cpus)


def _is_large(value: Any) -> bool:
    return getattr(value, "nbytes", 0) > 2**16
