"""Workers that come and go, without Ray's processes: how many there may be, notice, and what they leave behind."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray.train
import torch
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, NoopDecision, ResizeDecision
from ray.train.v2._internal.execution.worker_group import WorkerGroupPollStatus, WorkerStatus

from raytower.config import WorkersConfig, make_config
from raytower.errors import InputError
from raytower.storage import Location
from raytower.training import loop, notice
from raytower.training.classifier import ClassifierTask
from raytower.training.config import TrainClassifierConfig, TrainRerankerConfig, TrainRetrieverConfig
from raytower.training.elastic import ElasticTrainer, SharesPolicy, TellOfDrainedNodes
from raytower.training.loop import train_worker
from raytower.training.optimizer import make_optimizer, make_schedule
from raytower.training.reranker import RerankerTask
from raytower.training.retriever import RetrieverTask
from raytower.training.runner import _make_plan
from raytower.training.step import TrainingStep
from raytower.training.uploads import Uploads
from tests.support.tiny_training import (
    batches_of,
    retriever_config,
    write_candidates,
    write_labelled,
    write_pairs,
)


@pytest.fixture
def no_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notice, "_reasons", [])


@pytest.mark.parametrize(
    ("workers", "message"),
    [
        ({"min": 5, "max": 4}, r"workers\.min is 5, more than workers\.num 4; lower min or raise num"),
        ({"min": 3, "num": 4}, r"workers\.min is 3 and workers\.num 4;.* lower min to 2, or leave it out"),
        ({"min": 2, "num": 5}, r"there are 5 or, as the next fewer, 1; lower min to 1"),
        ({"min": 2, "max": 3}, r"there are 3 or, as the next fewer, 1; lower min to 1"),
    ],
)
def test_workers_that_cannot_share_are_refused(workers: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        retriever_config(Path("m"), Path("t"), Path("o"), workers=workers)


def test_max_is_another_word_for_num() -> None:
    config = retriever_config(Path("m"), Path("t"), Path("o"), workers={"min": 2, "max": 4})
    assert (config.workers.min, config.workers.num) == (2, 4)


def elastic_policy(least: int, most: int) -> SharesPolicy:
    return SharesPolicy(ray.train.ScalingConfig(num_workers=(least, most), resources_per_worker={"CPU": 2}))


class TestPolicy:
    @pytest.mark.parametrize(
        ("cpus", "draining", "expected"),
        [
            ({"a": 4, "b": 4}, [], 4),
            ({"a": 4, "b": 3}, [], 2),  # three have room, and no batch is shared out to three
            ({"a": 4, "b": 4}, ["b"], 2),
            ({"a": 2, "b": 4}, ["b"], 0),
            ({"a": 40}, [], 4),
        ],
    )
    def test_nodes_that_are_drained_have_no_room(
        self, monkeypatch: pytest.MonkeyPatch, cpus: dict[str, int], draining: list[str], expected: int
    ) -> None:
        monkeypatch.setattr("raytower.training.elastic._draining_nodes", lambda: draining)
        reserved = {node: {"CPU": float(count)} for node, count in cpus.items()}
        assert elastic_policy(2, 4)._count_possible_workers(reserved) == expected

    def test_only_nodes_with_the_labels_have_room(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What Ray's coordinator reserves may lie on any node."""
        nodes = [{"NodeID": "a", "Labels": {"market": "spot"}}, {"NodeID": "b", "Labels": {}}]
        free = {"a": {"CPU": 2.0}, "b": {"CPU": 40.0}}
        monkeypatch.setattr(ray, "nodes", lambda: nodes)
        monkeypatch.setattr(ray._private.state.state, "available_resources_per_node", lambda: free)
        monkeypatch.setattr(ray._private.state, "available_resources_per_node", lambda: free)
        config = ray.train.ScalingConfig(
            num_workers=(1, 4), resources_per_worker={"CPU": 2}, label_selector={"market": "spot"}
        )
        policy = SharesPolicy(config)
        assert policy._get_reserved_resources() == {"a": {"CPU": 2.0}}
        policy._holders = ["a", "a", "gone"]  # two of its own workers run there
        assert policy._get_reserved_resources() == {"a": {"CPU": 6.0}}
        assert free == {"a": {"CPU": 2.0}, "b": {"CPU": 40.0}}

    def test_workers_that_run_get_notice_and_are_not_ended(self, monkeypatch: pytest.MonkeyPatch) -> None:
        told: list[tuple[Any, ...]] = []
        worker = SimpleNamespace(execute_async=lambda *call: told.append(call))
        state: Any = SimpleNamespace(workers=[worker, worker])
        decisions = iter([NoopDecision(), ResizeDecision(4, {"CPU": 2})])
        monkeypatch.setattr(
            ElasticScalingPolicy, "make_decision_for_running_worker_group", lambda *_: next(decisions)
        )
        policy, status = elastic_policy(2, 4), WorkerGroupPollStatus({})
        assert isinstance(policy.make_decision_for_running_worker_group(state, status), NoopDecision)
        assert told == []
        assert isinstance(policy.make_decision_for_running_worker_group(state, status), NoopDecision)
        assert told == [(notice.give, "there is room for 4 workers now")] * 2

    def test_ray_train_takes_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """By a method that is no public one."""
        made: dict[str, Any] = {}
        monkeypatch.setattr(
            ray.train.torch.TorchTrainer,
            "_initialize_and_run_controller",
            lambda _, **given: made.update(given),
        )
        trainer = ElasticTrainer(print, scaling_config=ray.train.ScalingConfig(num_workers=(1, 2)))
        trainer._initialize_and_run_controller(scaling_policy=None, other=1)
        assert isinstance(made["scaling_policy"], SharesPolicy)
        assert made["other"] == 1


def test_a_node_that_is_drained_is_told_to_all_once() -> None:
    told: list[str] = []
    worker = SimpleNamespace(execute_async=lambda function, reason: told.append(reason))
    info = ray.train.PreemptionInfo(deadline_ms=None, preempted_node_to_ranks={"a": [0]})
    callback = TellOfDrainedNodes()
    group: Any = SimpleNamespace(get_workers=lambda: [worker, worker])
    callback.after_worker_group_start(group)
    callback.after_worker_group_poll_status(WorkerGroupPollStatus({0: WorkerStatus(running=True)}))
    assert told == []
    for _ in range(2):
        status = WorkerGroupPollStatus({0: WorkerStatus(running=True, preemption_info=info)})
        callback.after_worker_group_poll_status(status)
    assert told == ["1 node of the workers will go"] * 2


def test_workers_that_end_on_notice_count_as_no_failure() -> None:
    """Where max_failures is 0, too; any other error of a worker ends the run."""
    policy = DefaultFailurePolicy(ray.train.FailureConfig(max_failures=0))
    for error, expected in [
        (pickle.loads(pickle.dumps(notice.EndedForNow("SIGTERM has come"))), FailureDecision.RETRY),
        (ValueError("no"), FailureDecision.RAISE),
    ]:
        status = WorkerStatus(running=False, error=UserExceptionWithTraceback(error, "traceback"))
        failed = WorkerGroupPollStatus({0: status}).get_worker_group_error()
        assert policy.make_decision(failed) is expected
    assert "SIGTERM has come" in str(notice.EndedForNow("SIGTERM has come"))


@pytest.mark.usefixtures("no_notice")
def test_the_first_sigterm_is_a_notice_and_the_second_does_what_it_did() -> None:
    ended: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: ended.append(number))
    try:
        notice.take_sigterm()
        assert notice.given() is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert notice.given() == "SIGTERM has come"
        assert ended == []
        os.kill(os.getpid(), signal.SIGTERM)
        assert ended == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.fixture
def reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """What is asked of Ray Train, in order; checkpoints are kept in folders `step<number>`."""
    calls: list[str] = []

    def report(figures: dict[str, Any], checkpoint: Any, checkpoint_upload_mode: Any) -> None:
        assert checkpoint_upload_mode is ray.train.CheckpointUploadMode.ASYNC
        shutil.copytree(checkpoint.path, tmp_path / f"step{figures['step']}")
        shutil.rmtree(checkpoint.path)  # as Ray Train does once it is stored
        calls.append(f"report {figures['step']}")

    def wait(consistency_mode: Any) -> list[Any]:
        assert consistency_mode is ray.train.CheckpointConsistencyMode.COMMITTED
        calls.append("wait")
        return []

    monkeypatch.setattr(ray.train, "report", report)
    monkeypatch.setattr(ray.train, "get_all_reported_checkpoints", wait)
    return calls


def test_one_checkpoint_at_most_is_on_its_way(
    reported: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with Uploads() as uploads:
        for step in (1, 2):
            uploads.begin({"step": step}, lambda folder: (folder / "state.json").write_text("{}"))
    assert reported == ["report 1", "wait", "report 2", "wait"]
    assert (tmp_path / "step2" / "state.json").is_file()
    (folder,) = tmp_path.glob("rtcheckpoint-*")
    assert [path.name for path in folder.iterdir()] == ["owner.json"]


@pytest.mark.usefixtures("no_notice")
def test_a_worker_with_notice_saves_the_step_that_it_is_in_and_ends(
    dummy_encoder_dir: Path, tmp_path: Path, reported: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run that goes on has the losses of one that was left alone; a checkpoint of that step is not repeated."""
    pairs = write_pairs(tmp_path / "pairs.tsv", 64)
    config = retriever_config(
        dummy_encoder_dir, pairs, tmp_path / "out", log_every_steps=1, checkpoint_every_steps=3
    )
    surveyed = RetrieverTask.survey(config)
    context = SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 1)
    monkeypatch.setattr(ray.train, "get_context", lambda: context)
    monkeypatch.setattr("ray.train.torch.get_device", lambda: torch.device("cpu"))
    told_at: list[int] = []

    make_step = loop._Worker._make_step

    def told(worker: loop._Worker, *loaded: Any) -> float:
        if worker.progress.step + 1 in told_at:
            notice.give("the node will go")
        return make_step(worker, *loaded)

    monkeypatch.setattr(loop._Worker, "_make_step", told)

    def train(start: str | None) -> dict[str, Any]:
        checkpoint = None if start is None else ray.train.Checkpoint.from_directory(str(tmp_path / start))
        monkeypatch.setattr(ray.train, "get_checkpoint", lambda: checkpoint)
        task = RetrieverTask.prepare(config, surveyed)
        plan = _make_plan(
            config, surveyed, task, WorkersConfig(num=1), Location.of(tmp_path / "failure.json")
        )
        return train_worker({"plan": plan})

    alone = train(None)["curve"]
    assert len(alone) == 8
    assert reported == ["report 3", "wait", "report 6", "wait", "report 8", "wait"]
    for step in (3, 6, 8):
        shutil.rmtree(tmp_path / f"step{step}")
    reported.clear()
    told_at[:] = [3, 5]
    for start, step in [(None, 3), ("step3", 5)]:
        with pytest.raises(
            notice.EndedForNow, match=f"the node will go: .* from the checkpoint of step {step}"
        ):
            train(start)
        notice._reasons.clear()
    assert reported == ["report 3", "wait", "report 5", "wait"]
    told_at.clear()
    curve = train("step5")["curve"]
    assert [row["step"] for row in curve] == [*range(1, 9)]
    assert [row["loss"] for row in curve] == pytest.approx([row["loss"] for row in alone], abs=1e-6)


KINDS: dict[str, tuple[Any, Any, Callable[[Path, int], Path], str, dict[str, Any]]] = {
    "retriever": (
        RetrieverTask,
        TrainRetrieverConfig,
        write_candidates,
        "rows.jsonl",
        {"objective": "margin_mse"},
    ),
    "reranker": (
        RerankerTask,
        TrainRerankerConfig,
        write_candidates,
        "rows.jsonl",
        {"objective": {"name": "pointwise_regression", "loss": "mse"}},
    ),
    "classifier": (ClassifierTask, TrainClassifierConfig, write_labelled, "rows.tsv", {}),
}


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_share_draws_the_same_masks_on_whatever_worker(
    dummy_encoder_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The loss of 16 rows in two shares is the mean of two losses of 8, each of a worker with one share."""
    task_class, config_class, write, name, changes = KINDS[kind]
    values = {
        "model": str(dummy_encoder_dir),
        "train": str(write(tmp_path / name, 16)),
        "output": str(tmp_path / "out"),
        "batch_size": 16,
        "max_length": 32,
        "dtype": "float32",
        "workers": {"num": 2},
        **changes,
    }
    config = make_config(config_class, values)
    surveyed = task_class.survey(config)
    task = task_class.prepare(config, surveyed)
    rows = next(batches_of(surveyed, config, task.num_documents))

    def loss_of(some: dict[str, list[Any]], num_shares: int | None, rank: int) -> float:
        monkeypatch.setattr("raytower.training.step.rank", lambda: rank)
        model = task.build(None).train()
        optimizer = make_optimizer(model, config.optimizer)
        step = TrainingStep(model, optimizer, make_schedule(optimizer, 2, 0.5), num_shares=num_shares)
        return step.run(3, [some], task.backward)

    halves = [{name: values[8 * half :][:8] for name, values in rows.items()} for half in range(2)]
    mean = np.mean([loss_of(half, None, rank) for rank, half in enumerate(halves)])
    assert loss_of(rows, 2, 0) == pytest.approx(mean, abs=1e-6)
    assert loss_of(rows, None, 0) != pytest.approx(mean, abs=1e-4)
