"""Workers that come and go while a training runs: how many Ray Train starts, and when it gives them notice.

Ray Train changes the number of workers by ending all of them and starting others from the last checkpoint. Left to
itself it ends them in the midst of their steps, which are then made again. Here they get notice first (see `notice`).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

import ray
from ray.train.v2._internal.execution.callback import WorkerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    NoopDecision,
    ResizeDecision,
    ScalingDecision,
)
from ray.train.v2._internal.execution.worker_group import Worker, WorkerGroupPollStatus, WorkerGroupState
from ray.train.v2.api.config import ScalingConfig
from ray.train.v2.torch.torch_trainer import TorchTrainer

from raytower.progress import log
from raytower.requirements import has_labels
from raytower.training import notice
from raytower.workers import most_of, worker_counts

Resources = dict[str, dict[str, float]]
_ASK_S = 1.0
_TELL_S = 30.0
_ANSWER_S = 5.0


def staying(reserved: Resources, leaving: Iterable[str]) -> Resources:
    """What is reserved on the nodes that stay, by node."""
    gone = set(leaving)
    return {node: resources for node, resources in reserved.items() if node not in gone}


def with_held(free: Resources, holders: Iterable[str], worker: dict[str, float]) -> Resources:
    """What is free by node, and what workers hold: one on each node of `holders`, which names a node for each."""
    room = {node: dict(resources) for node, resources in free.items()}
    for node in holders:
        if node in room:
            for name, amount in worker.items():
                room[node][name] = room[node].get(name, 0.0) + amount
    return room


class SharesPolicy(ElasticScalingPolicy):
    """Ray Train's elastic policy for workers that take whole shares of a batch, each as many.

    Nodes that are drained have no place for workers, although they are alive. Workers that run are not ended, as by
    Ray Train's policy, but get notice, and end themselves.
    """

    def __init__(self, scaling_config: ScalingConfig) -> None:
        super().__init__(scaling_config)
        self._counts = worker_counts(scaling_config.min_workers, scaling_config.max_workers)
        self._asked_at = float("-inf")
        self._waits_from: float | None = None
        self._holders: list[str] = []

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        self._holders = []
        decision = super().make_decision_for_non_running_worker_group()
        now = time.monotonic()
        if not isinstance(decision, NoopDecision):
            self._waits_from = None
        elif self._waits_from is None:
            self._waits_from = now
        elif now - self._waits_from > _TELL_S:
            self._waits_from = now
            log(f"waiting for room for {self._counts[0]} workers (workers.min); there is less now")
        return decision

    def make_decision_for_running_worker_group(
        self, worker_group_state: WorkerGroupState, worker_group_status: WorkerGroupPollStatus
    ) -> ScalingDecision:
        if self.scaling_config.label_selector:
            self._holders = [worker.metadata.node_id for worker in worker_group_state.workers]
        decision = super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)
        if isinstance(decision, ResizeDecision):
            tell(worker_group_state.workers, f"there is room for {decision.num_workers} workers now")
            return NoopDecision()
        return decision

    def _count_possible_workers(self, reserved_resources: Resources) -> int:
        places = super()._count_possible_workers(staying(reserved_resources, _draining_nodes()))
        return most_of(self._counts, places)

    def _get_reserved_resources(self) -> Resources | None:
        if self.scaling_config.label_selector:
            # Ray's coordinator leaves labels to who asks it, and may reserve all on nodes that lack them.
            return self._room_on_labelled_nodes()
        # Ray looks at the cluster anew every 20 s. Meanwhile it would start workers on a node that is lost, and wait
        # a minute for it.
        now = time.monotonic()
        if now - self._asked_at > _ASK_S:
            self._asked_at = now
            request = self._autoscaling_coordinator.get_reserved_resources.remote(
                self._requester_id, recompute=True
            )
            ray.wait([request], timeout=_ANSWER_S)
        reserved: Resources | None = super()._get_reserved_resources()
        return reserved

    def _room_on_labelled_nodes(self) -> Resources:
        """What nodes with the labels have free, and what the workers of this run hold there."""
        selector = self.scaling_config.label_selector
        assert isinstance(selector, dict), "a training asks the same of all workers"
        named = {node["NodeID"] for node in ray.nodes() if has_labels(selector, node.get("Labels") or {})}
        free = ray._private.state.available_resources_per_node()
        worker = self.scaling_config._resources_per_worker_not_none
        return with_held({node: free[node] for node in free.keys() & named}, self._holders, worker)


class ElasticTrainer(TorchTrainer):
    """TorchTrainer with `SharesPolicy`; Ray Train has no setting for it."""

    def _initialize_and_run_controller(self, **settings: Any) -> ray.train.Result:
        assert isinstance(self.scaling_config, ScalingConfig)
        settings["scaling_policy"] = SharesPolicy(self.scaling_config)
        return super()._initialize_and_run_controller(**settings)


class TakeSigterm(WorkerCallback):
    """Makes SIGTERM a notice in each worker's process."""

    def after_init_train_context(self) -> None:
        notice.take_sigterm()


class TellOfDrainedNodes(WorkerGroupCallback):
    """Gives all workers notice once a node of one of them is to go."""

    def __init__(self) -> None:
        self._workers: Sequence[Worker] = ()

    def after_worker_group_start(self, worker_group: Any) -> None:
        self._workers = worker_group.get_workers()

    def after_worker_group_poll_status(self, worker_group_status: WorkerGroupPollStatus) -> None:
        info = worker_group_status.get_preemption_info()
        if info is not None:
            count = len(info.preempted_node_ids)
            tell(self._workers, f"{count} node{'' if count == 1 else 's'} of the workers will go")
            self._workers = ()

    def before_worker_group_shutdown(self, worker_group: Any) -> None:
        self._workers = ()


def tell(workers: Iterable[Worker], reason: str) -> None:
    """Give workers notice."""
    for worker in workers:
        worker.execute_async(notice.give, reason)


def _draining_nodes() -> list[str]:
    # No public function says it: `ray.nodes` counts them among those that are alive.
    return list(ray._private.state.state.get_draining_nodes())
