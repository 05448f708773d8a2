"""What jobs ask a cluster for, by their configs."""

from __future__ import annotations

from dataclasses import dataclass

from raytower.commands import COMMANDS, find_reference
from raytower.config import Config, make_config
from raytower.pipeline.config import PipelineConfig
from raytower.serving.config import ServeConfig


@dataclass(frozen=True, kw_only=True)
class Ask:
    """`num` workers of a job, each of which has to fit one node."""

    num: int
    cpus: float
    gpus: float
    feeding_cpus: int = 0
    """CPUs of each node that tasks need which feed the workers."""

    def fits(self, cpus: float, gpus: float) -> bool:
        """Whether a node of these takes a worker."""
        return self.cpus + self.feeding_cpus <= cpus and self.gpus <= gpus

    def places(self, cpus: float, gpus: float) -> int:
        """Workers that a node takes."""
        if not self.fits(cpus, gpus):
            return 0
        by_cpus = int((cpus - self.feeding_cpus) / self.cpus)
        return min(by_cpus, int(gpus / self.gpus)) if self.gpus else by_cpus


def asked(config: Config) -> list[Ask]:
    """What a config asks for. Null is one CPU and no GPU, as where nodes come with demand."""
    if isinstance(config, PipelineConfig):
        steps = [make_config(find_reference(COMMANDS[step.job].config), step.config) for step in config.steps]
        return [ask for step in steps for ask in asked(step)]
    if isinstance(config, ServeConfig):
        replicas = config.autoscaling.max if config.autoscaling else config.replicas
        asks = [Ask(num=replicas, cpus=config.num_cpus, gpus=config.num_gpus or 0)]
        if config.layout == "split":
            gpus = config.rerank_num_gpus or 0
            asks.append(Ask(num=config.rerank_replicas, cpus=config.rerank_num_cpus, gpus=gpus))
        if config.layout == "sharded":
            num = (config.shard_groups or 1) * config.shard_replicas
            asks.append(Ask(num=num, cpus=config.shard_num_cpus, gpus=0))
        return asks
    workers = getattr(config, "workers", None)
    if workers is None:
        return []
    # Of workers that Ray Data or Ray Train feeds.
    fed = 1 if any(hasattr(config, key) for key in ("train", "input")) else 0
    return [
        Ask(num=workers.num or 1, cpus=workers.num_cpus or 1, gpus=workers.num_gpus or 0, feeding_cpus=fed)
    ]
