"""Exactness of the optimizer step with the retriever's task, without Ray.

Two data-parallel processes make the steps of one, a continued run makes those of an undisturbed one, and what is no
number never reaches the weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import RoFormerConfig, RoFormerModel

from raytower.config import make_config
from raytower.training.batches import Rows
from raytower.training.checkpoint import MODEL_DIR, load_state, load_trainable, save_state, save_trainable
from raytower.training.config import TrainRetrieverConfig
from raytower.training.optimizer import make_optimizer, make_schedule
from raytower.training.retriever import RetrieverTask
from raytower.training.step import NotANumberError, TrainingStep, data_parallel
from raytower.training.word_gradients import WordGradients
from tests.support.tiny_models import tiny_tokenizer
from tests.support.tiny_training import batches_of, training_values, worker_slice, write_pairs
from tests.support.warm import in_processes, in_two_processes
from tests.support.worker_group import end_worker, join_group

Backward = Callable[[TrainingStep, Rows], Tensor]
Weights = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run's config, task and rows: everything but the model."""

    config: TrainRetrieverConfig
    task: RetrieverTask
    steps: list[list[Rows]]
    """The global batches of each optimizer step."""

    def build(self, start_from: Path | None = None) -> nn.Module:
        return self.task.build(start_from).train()

    def make_step(self, model: nn.Module, is_parallel: bool = False) -> TrainingStep:
        """As raytower.training.loop makes it; that module needs Ray."""
        words = WordGradients.of(model)
        settings = self.config.optimizer
        optimizer = make_optimizer(model, settings)
        return TrainingStep(
            model,
            optimizer,
            make_schedule(optimizer, len(self.steps), settings.warmup_ratio),
            dtype=getattr(torch, self.config.dtype),
            max_grad_norm=settings.max_grad_norm,
            seed=self.config.seed,
            parallel=data_parallel(model, words) if is_parallel else None,
            words=words,
        )

    def run(self, step: TrainingStep, first: int, end: int) -> list[float]:
        """The losses of the steps from `first` to before `end`, made in this process alone."""
        return [step.run(number, self.steps[number], self.task.backward) for number in range(first, end)]


def make_job(model: Path, folder: Path, num_steps: int, changes: dict[str, Any]) -> Job:
    # Limits no gradient: Adam hides a wrong scale of the gradients from the weights, a clipped norm from the rest.
    values = {"workers": {"num": 2}, "optimizer": {"lr": 1e-3, "max_grad_norm": 1e9}, **changes}
    train = write_pairs(folder / "train.tsv", 128)
    config = make_config(TrainRetrieverConfig, training_values(model, train, folder, **values))
    surveyed = RetrieverTask.survey(config)
    batches = batches_of(surveyed, config)
    return Job(
        config=config,
        task=RetrieverTask.prepare(config, surveyed),
        steps=[list(islice(batches, config.accumulate_batches)) for _ in range(num_steps)],
    )


def weights_of(model: nn.Module) -> Weights:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def gradients_of(model: nn.Module) -> Weights:
    """Not those of the keys' biases: attention ignores a shift of all keys, so theirs are rounding noise."""
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {name: gradient for name, gradient in gradients.items() if not name.endswith("key.bias")}


def largest_difference(left: Weights, right: Weights) -> float:
    """Over all elements, the biases of attention keys aside, whose rounding noise Adam scales up."""
    assert left.keys() == right.keys()
    return max(float((left[k] - right[k]).abs().max()) for k in left if not k.endswith("key.bias"))


def norm_of(gradients: Weights) -> float:
    return math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients.values()))


def cosine(left: Weights, right: Weights) -> float:
    flat = [torch.cat([weights[name].flatten() for name in left]) for weights in (left, right)]
    return float(nn.functional.cosine_similarity(flat[0], flat[1], dim=0))


ACCUMULATED: dict[str, Any] = {"accumulate_batches": 2}
PARALLEL_JOBS: dict[str, dict[str, Any]] = {
    "plain": ACCUMULATED,
    "cached": {**ACCUMULATED, "gradient_cache": 4},
    "one batch": {},
    "clipped": {**ACCUMULATED, "optimizer": {"lr": 1e-3, "max_grad_norm": 0.05}},
    "bfloat16": {**ACCUMULATED, "dtype": "bfloat16"},
    "bfloat16 cached": {**ACCUMULATED, "dtype": "bfloat16", "gradient_cache": 4},
}


def _worker(rank: int, jobs: dict[str, Job], folder: Path) -> None:
    join_group(folder, rank)
    results = {name: _run_share(job, rank) for name, job in jobs.items()}
    results["a loss of one worker"] = _run_into_nan(jobs["plain"], rank, _loss_becomes_nan)
    results["a gradient of one worker"] = _run_into_nan(jobs["plain"], rank, _gradient_becomes_nan)
    torch.save(results, folder / f"results{rank}.pt")
    end_worker()


def _shares(batches: list[Rows], rank: int) -> list[Rows]:
    return [worker_slice(rows, rank, 2) for rows in batches]


def _run_share(job: Job, rank: int) -> dict[str, Any]:
    step = job.make_step(job.build(), is_parallel=True)
    losses = [
        step.run(number, _shares(batches, rank), job.task.backward)
        for number, batches in enumerate(job.steps)
    ]
    return {"losses": losses, "weights": weights_of(step.model), "gradients": gradients_of(step.model)}


def _run_into_nan(
    job: Job, rank: int, spoil: Callable[[Job, TrainingStep, list[Rows]], Backward]
) -> dict[str, Any]:
    """What each worker sees where something of the last worker alone is no number."""
    step, batches = job.make_step(job.build(), is_parallel=True), _shares(job.steps[0], rank)
    before = weights_of(step.model)
    backward = spoil(job, step, batches) if rank == 1 else job.task.backward
    try:
        step.run(0, batches, backward)
    except NotANumberError as error:
        moved = largest_difference(before, weights_of(step.model))
        return {"error": str(error), "batch": error.batch, "moved": moved}
    return {"error": None}


def _loss_becomes_nan(job: Job, step: TrainingStep, batches: list[Rows]) -> Backward:
    return spoil_loss(job.task.backward, batches[0], math.nan)


def _gradient_becomes_nan(job: Job, step: TrainingStep, batches: list[Rows]) -> Backward:
    spoil_gradient(step.model, math.nan)
    return job.task.backward


def spoil_loss(backward: Backward, at: Rows, value: float) -> Backward:
    """`backward`, with the loss of the rows `at` replaced."""

    def spoiled(step: TrainingStep, rows: Rows) -> Tensor:
        loss = backward(step, rows)
        return torch.full_like(loss, value) if rows is at else loss

    return spoiled


def spoil_gradient(model: nn.Module, value: float) -> torch.utils.hooks.RemovableHandle:
    """Put `value` into one element of one gradient of every backward pass; losses stay what they are."""

    def spoil(gradient: Tensor) -> Tensor:
        spoiled = gradient.clone()
        spoiled.view(-1)[0] = value
        return spoiled

    weight = next(p for name, p in model.named_parameters() if name.endswith("layer.1.output.dense.weight"))
    return weight.register_hook(spoil)


def _still_roformer(folder: Path) -> Path:
    torch.manual_seed(0)
    config = RoFormerConfig(
        vocab_size=len(tiny_tokenizer()),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.2,
    )
    RoFormerModel(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.processes
class TestTwoWorkers:
    """Each with its half of every batch, without dropout, against one process with all of it."""

    @pytest.fixture(scope="class")
    def jobs(self, still_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
        folder = tmp_path_factory.mktemp("parallel")
        jobs = {name: make_job(still_encoder, folder, 2, changes) for name, changes in PARALLEL_JOBS.items()}
        # Its table of positions gets no gradient. The second step failed: "Expected to have finished reduction".
        return {**jobs, "weights out of use": make_job(_still_roformer(folder / "roformer"), folder, 2, {})}

    @pytest.fixture(scope="class")
    def results(
        self, jobs: dict[str, Job], tmp_path_factory: pytest.TempPathFactory
    ) -> list[dict[str, dict[str, Any]]]:
        """One for each worker."""
        folder = tmp_path_factory.mktemp("results")
        in_two_processes(_worker, jobs, folder)
        return [torch.load(folder / f"results{rank}.pt", weights_only=True) for rank in range(2)]

    @pytest.mark.parametrize("name", ["plain", "cached", "one batch", "clipped", "weights out of use"])
    def test_they_make_the_steps_of_one_process(
        self, jobs: dict[str, Job], results: list[dict[str, dict[str, Any]]], name: str
    ) -> None:
        alone = self.step_alone(jobs, name)
        losses = jobs[name].run(alone, 0, 2)
        gradients = gradients_of(alone.model)
        assert norm_of(gradients) == pytest.approx(0.05) if name == "clipped" else norm_of(gradients) > 0.1
        for worker in results:
            assert worker[name]["losses"] == pytest.approx(losses, abs=1e-5)
            assert largest_difference(worker[name]["gradients"], gradients) < 1e-5
            assert largest_difference(worker[name]["weights"], weights_of(alone.model)) < 1e-4
        assert largest_difference(weights_of(alone.model), weights_of(jobs[name].build())) > 1e-3
        assert abs(losses[0] - losses[1]) > 1e-2

    @pytest.mark.parametrize("name", ["bfloat16", "bfloat16 cached"])
    def test_bfloat16_agrees_within_its_precision(
        self, jobs: dict[str, Job], results: list[dict[str, dict[str, Any]]], name: str
    ) -> None:
        """Which texts share a padded chunk decides the rounding, and Adam makes a whole step of a rounded-off sign."""
        alone = self.step_alone(jobs, name)
        losses = jobs[name].run(alone, 0, 2)
        gradients = gradients_of(alone.model)
        for worker in results:
            assert worker[name]["losses"] == pytest.approx(losses, abs=0.02)
            assert worker[name]["losses"] != pytest.approx(results[0]["plain"]["losses"], abs=1e-6)
            assert norm_of(worker[name]["gradients"]) == pytest.approx(norm_of(gradients), rel=0.05)
            assert cosine(worker[name]["gradients"], gradients) > 0.999
        assert results[0][name]["losses"] == results[1][name]["losses"]
        assert largest_difference(results[0][name]["weights"], results[1][name]["weights"]) == 0

    @staticmethod
    def step_alone(jobs: dict[str, Job], name: str) -> TrainingStep:
        """Always without gradient caching, so that its exactness shows as well."""
        uncached = jobs[name.removesuffix(" cached") if name != "cached" else "plain"]
        return uncached.make_step(uncached.build())

    @pytest.mark.parametrize(
        ("name", "message", "batch"),
        [
            ("a loss of one worker", "the loss is nan", 0),
            ("a gradient of one worker", "the gradient's norm is nan", 1),
        ],
    )
    def test_what_is_no_number_on_one_worker_stops_both(
        self, results: list[dict[str, dict[str, Any]]], name: str, message: str, batch: int
    ) -> None:
        """Else the one that goes on would wait for the other for ever."""
        for worker in results:
            assert worker[name]["error"] is not None
            assert message in worker[name]["error"]
            assert worker[name]["batch"] == batch
            assert worker[name]["moved"] == 0
        assert results[0][name] == results[1][name]


SHARED_JOBS: dict[str, dict[str, Any]] = {
    "plain": ACCUMULATED,
    "cached": {**ACCUMULATED, "gradient_cache": 4},
    "lora": {"lora": {"rank": 4, "dropout": 0.1}},
}


def _worker_of_some(rank: int, workers: int, jobs: dict[str, Job], folder: Path) -> None:
    """Four workers make six steps, with a checkpoint after two; two workers make the next two from there."""
    join_group(folder, rank, workers)
    losses = {}
    for name, job in jobs.items():
        parts = [[worker_slice(rows, rank, workers) for rows in batches] for batches in job.steps]
        own = replace(job, steps=parts)
        if workers == 4:
            step = with_shares(own.make_step(own.build()), is_parallel=True)
            losses[name] = own.run(step, 0, 2)
            if rank == 0:
                TestContinuedRuns.save(job, step, 2, folder / name)
            losses[name] += own.run(step, 2, 6)
        else:
            step = with_shares(TestContinuedRuns.restore(own, folder / name)[0], is_parallel=True)
            losses[name] = own.run(step, 2, 4)
            if rank == 0:
                TestContinuedRuns.save(job, step, 4, folder / f"{name}, two")
    if rank == 0:
        torch.save(losses, folder / f"losses{workers}.pt")
    end_worker()


def with_shares(step: TrainingStep, is_parallel: bool = False) -> TrainingStep:
    """`step` as the loop makes it where there are four workers at most."""
    step.num_shares = 4
    if is_parallel:
        step.parallel = data_parallel(step.model, step.words)
    return step


@pytest.mark.processes
class TestFewerWorkers:
    """With dropout: four processes; two, from a checkpoint of theirs; this one alone, from a checkpoint of the two."""

    @pytest.fixture(scope="class")
    def jobs(self, dummy_encoder_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
        folder = tmp_path_factory.mktemp("shared")
        return {
            name: make_job(dummy_encoder_dir, folder, 6, changes) for name, changes in SHARED_JOBS.items()
        }

    @pytest.fixture(scope="class")
    def folder(self, jobs: dict[str, Job], tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("losses")
        for workers in (4, 2):
            in_processes(workers, _worker_of_some, workers, jobs, folder)
        return folder

    @pytest.mark.parametrize("name", list(SHARED_JOBS))
    def test_they_have_the_losses_of_all(self, jobs: dict[str, Job], folder: Path, name: str) -> None:
        """Each worker drew masks for all its rows at once, so that two drew others than four."""
        job = jobs[name]
        four, two = (torch.load(folder / f"losses{n}.pt", weights_only=True)[name] for n in (4, 2))
        assert two == pytest.approx(four[2:4], abs=1e-5)
        alone = with_shares(TestContinuedRuns.restore(job, folder / f"{name}, two")[0])
        assert job.run(alone, 4, 6) == pytest.approx(four[4:], abs=1e-5)
        by_worker = TestContinuedRuns.restore(job, folder / f"{name}, two")[0]
        assert job.run(by_worker, 4, 6)[0] != pytest.approx(four[4], abs=1e-3)


RESUMED_JOBS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": ACCUMULATED,
    "float16": {"dtype": "float16"},
    "lora": {"lora": {"rank": 4, "dropout": 0.1}},
    "cached": {"gradient_cache": 4},
}


class TestContinuedRuns:
    """Four steps with dropout, against two, a checkpoint, and two more of a fresh process."""

    def job(self, model: Path, folder: Path, changes: dict[str, Any]) -> Job:
        # Warm-up lasts three steps, so that the learning rate differs on both sides of the checkpoint.
        optimizer = {"lr": 1e-2, "warmup_ratio": 0.75}
        return make_job(model, folder, 4, {"optimizer": optimizer, **changes})

    @staticmethod
    def start(job: Job) -> TrainingStep:
        step = job.make_step(job.build())
        if step.scaler.is_enabled():
            # Three steps without an overflow double it: the third is the first after the checkpoint.
            state = {**step.scaler.state_dict(), "scale": 512.0, "growth_interval": 3}
            step.scaler.load_state_dict(state)
        return step

    @staticmethod
    def save(job: Job, step: TrainingStep, num_steps: int, folder: Path) -> None:
        """What the loop puts into a checkpoint, in its order."""
        job.task.save(step.model, folder / MODEL_DIR, {})
        if job.config.lora is not None:
            save_trainable(step.model, folder)
        save_state(step, {"step": num_steps, "best": 0.5}, folder)

    @staticmethod
    def restore(job: Job, folder: Path) -> tuple[TrainingStep, dict[str, Any]]:
        torch.manual_seed(999)  # a new process stands elsewhere in its random numbers
        lora = job.config.lora is not None
        model = job.build(None if lora else folder / MODEL_DIR)
        if lora:
            load_trainable(model, folder)
        step = job.make_step(model)
        return step, load_state(step, folder)

    @pytest.mark.parametrize("name", list(RESUMED_JOBS))
    def test_they_make_the_steps_of_an_undisturbed_one(
        self, dummy_encoder_dir: Path, tmp_path: Path, name: str
    ) -> None:
        job = self.job(dummy_encoder_dir, tmp_path, RESUMED_JOBS[name])
        undisturbed = self.start(job)
        losses = job.run(undisturbed, 0, 4)
        interrupted = self.start(job)
        assert job.run(interrupted, 0, 2) == pytest.approx(losses[:2], abs=1e-6)
        self.save(job, interrupted, 2, tmp_path)

        restored, progress = self.restore(job, tmp_path)
        assert progress == {"step": 2, "best": 0.5}
        assert restored.schedule.get_last_lr() == interrupted.schedule.get_last_lr()
        assert weights_of(restored.model).keys() == weights_of(undisturbed.model).keys()
        assert job.run(restored, 2, 4) == pytest.approx(losses[2:], abs=1e-6)
        assert largest_difference(weights_of(restored.model), weights_of(undisturbed.model)) < 1e-6
        # Nor does saving disturb the run that goes on.
        assert job.run(interrupted, 2, 4) == pytest.approx(losses[2:], abs=1e-6)

    def test_the_loss_scale_continues(self, dummy_encoder_dir: Path, tmp_path: Path) -> None:
        job = self.job(dummy_encoder_dir, tmp_path, RESUMED_JOBS["float16"])
        interrupted = self.start(job)
        job.run(interrupted, 0, 2)
        self.save(job, interrupted, 2, tmp_path)
        restored, _ = self.restore(job, tmp_path)
        state = restored.scaler.state_dict()
        assert (state["scale"], state["growth_interval"], state["_growth_tracker"]) == (512.0, 3, 2)
        job.run(restored, 2, 4)
        state = restored.scaler.state_dict()
        assert (state["scale"], state["_growth_tracker"]) == (1024.0, 1)

    def test_every_part_of_a_checkpoint_counts(self, dummy_encoder_dir: Path, tmp_path: Path) -> None:
        """Without the moments, the place in the schedule or the weights a run goes elsewhere: the proof can fail."""
        job = self.job(dummy_encoder_dir, tmp_path, {})
        interrupted = self.start(job)
        job.run(interrupted, 0, 2)
        self.save(job, interrupted, 2, tmp_path)
        expected = job.run(interrupted, 2, 4)

        no_moments, _ = self.restore(job, tmp_path)
        no_moments.optimizer.state.clear()
        assert job.run(no_moments, 2, 4)[1] != pytest.approx(expected[1], abs=1e-3)
        no_schedule, _ = self.restore(job, tmp_path)
        for group in no_schedule.optimizer.param_groups:
            group["lr"] = job.config.optimizer.lr / 3  # the first step's
        assert job.run(no_schedule, 2, 4)[1] != pytest.approx(expected[1], abs=1e-3)
        no_weights = job.make_step(job.build())
        load_state(no_weights, tmp_path)
        assert job.run(no_weights, 2, 4)[0] != pytest.approx(expected[0], abs=1e-3)
        other_dropout, _ = self.restore(job, tmp_path)
        other_dropout.seed += 1
        assert job.run(other_dropout, 2, 4)[0] != pytest.approx(expected[0], abs=1e-3)

    def test_adapters_are_saved_apart_from_the_directory_that_holds_them_merged(
        self, dummy_encoder_dir: Path, tmp_path: Path
    ) -> None:
        job = self.job(dummy_encoder_dir, tmp_path, RESUMED_JOBS["lora"])
        step = self.start(job)
        job.run(step, 0, 2)
        self.save(job, step, 2, tmp_path)
        trained = {name for name, p in step.model.named_parameters() if p.requires_grad}
        assert set(load_file(tmp_path / "trainable.safetensors")) == trained
        assert all("lora_" in name for name in trained)
        merged, start = (
            load_file(folder / "model.safetensors") for folder in (tmp_path / MODEL_DIR, dummy_encoder_dir)
        )
        assert merged.keys() == start.keys()
        assert largest_difference(merged, start) > 1e-3


@dataclass(frozen=True)
class Snapshot:
    """All that a step which is not made must leave alone."""

    weights: Weights
    moments: Weights
    steps_counted: float

    @classmethod
    def of(cls, step: TrainingStep) -> Snapshot:
        states = list(enumerate(step.optimizer.state.values()))
        moments = {f"{n}.{k}": s[k].clone() for n, s in states for k in ("exp_avg", "exp_avg_sq")}
        return cls(weights_of(step.model), moments, float(states[0][1]["step"]))

    def assert_same(self, other: Snapshot) -> None:
        assert self.steps_counted == other.steps_counted
        for left, right in ((self.weights, other.weights), (self.moments, other.moments)):
            assert left.keys() == right.keys()
            assert all(torch.equal(left[name], right[name]) for name in left)


class TestWhatIsNoNumber:
    """Met at the second step, when moments exist already; one step of two batches."""

    def begun(self, model: Path, folder: Path, **changes: Any) -> tuple[Job, TrainingStep]:
        changes = {**ACCUMULATED, "optimizer": {"lr": 1e-3}, **changes}
        job = make_job(model, folder, 3, changes)
        step = job.make_step(job.build())
        job.run(step, 0, 1)
        return job, step

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    @pytest.mark.parametrize("batch", [0, 1])
    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_a_loss_stops_before_the_weights_move_and_tells_its_batch(
        self, still_encoder: Path, tmp_path: Path, dtype: str, batch: int, value: float
    ) -> None:
        job, step = self.begun(still_encoder, tmp_path, dtype=dtype)
        before, lr = Snapshot.of(step), step.schedule.get_last_lr()
        backward = spoil_loss(job.task.backward, job.steps[1][batch], value)
        with pytest.raises(NotANumberError, match=f"^the loss is {value}") as caught:
            step.run(1, job.steps[1], backward)
        assert caught.value.batch == batch
        before.assert_same(Snapshot.of(step))
        assert step.schedule.get_last_lr() == lr
        assert all(p.grad is None for p in step.model.parameters())

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize("gradient_cache", [None, 4])
    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_a_gradient_of_a_finite_loss_stops_before_the_weights_move(
        self, still_encoder: Path, tmp_path: Path, dtype: str, gradient_cache: int | None, value: float
    ) -> None:
        job, step = self.begun(still_encoder, tmp_path, dtype=dtype, gradient_cache=gradient_cache)
        before, lr = Snapshot.of(step), step.schedule.get_last_lr()
        hook = spoil_gradient(step.model, value)
        with pytest.raises(NotANumberError, match=r"^the gradient's norm is (nan|inf) at a loss of [0-9]"):
            job.run(step, 1, 2)
        before.assert_same(Snapshot.of(step))
        assert step.schedule.get_last_lr() == lr
        assert all(p.grad is None for p in step.model.parameters())
        hook.remove()
        assert math.isfinite(job.run(step, 1, 2)[0])
        assert largest_difference(before.weights, weights_of(step.model)) > 1e-4

    @pytest.mark.parametrize("gradient_cache", [None, 4])
    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_a_gradient_that_overflows_in_float16_skips_the_step_and_lowers_the_scale(
        self, still_encoder: Path, tmp_path: Path, gradient_cache: int | None, value: float
    ) -> None:
        job, step = self.begun(still_encoder, tmp_path, dtype="float16", gradient_cache=gradient_cache)
        before, scale = Snapshot.of(step), step.scaler.get_scale()
        hook = spoil_gradient(step.model, value)
        assert math.isfinite(job.run(step, 1, 2)[0])
        before.assert_same(Snapshot.of(step))
        assert step.scaler.get_scale() == scale / 2
        # A checkpoint restores the schedule by the number of steps, so a skipped one must count there.
        assert step.schedule.last_epoch == 2
        hook.remove()
        job.run(step, 2, 3)
        assert largest_difference(before.weights, weights_of(step.model)) > 1e-4
        assert Snapshot.of(step).steps_counted == before.steps_counted + 1

    def test_a_gradient_that_no_loss_scale_helps_is_refused(
        self, still_encoder: Path, tmp_path: Path
    ) -> None:
        """Halved without end, the scale would reach 0, and the weights would become NaN without a word."""
        job, step = self.begun(still_encoder, tmp_path, dtype="float16")
        step.scaler.update(0.5)
        before = Snapshot.of(step)
        spoil_gradient(step.model, math.inf)
        with pytest.raises(NotANumberError, match="the gradient's norm is"):
            job.run(step, 1, 2)
        before.assert_same(Snapshot.of(step))


class TestPrecisionAndClipping:
    """What stands in the gradients after a step, which is what the optimizer saw."""

    def gradients(self, model: Path, folder: Path, **changes: Any) -> Weights:
        job = make_job(model, folder, 1, {**ACCUMULATED, **changes})
        step = job.make_step(job.build())
        job.run(step, 0, 1)
        return gradients_of(step.model)

    @pytest.mark.parametrize("gradient_cache", [None, 4])
    def test_accumulated_gradients_are_the_mean_of_the_batches_own(
        self, still_encoder: Path, tmp_path: Path, gradient_cache: int | None
    ) -> None:
        job = make_job(still_encoder, tmp_path, 1, ACCUMULATED)
        own = []
        for rows in job.steps[0]:
            step = job.make_step(job.build())
            step.run(0, [rows], job.task.backward)
            own.append(gradients_of(step.model))
        mean = {name: (own[0][name] + own[1][name]) / 2 for name in own[0]}
        both = self.gradients(still_encoder, tmp_path, gradient_cache=gradient_cache)
        assert largest_difference(both, mean) < 1e-5
        assert largest_difference(own[0], own[1]) > 1e-2

    def test_gradient_caching_keeps_the_masks_of_dropout(
        self, dummy_encoder_dir: Path, tmp_path: Path
    ) -> None:
        """A chunk that holds all texts draws what no caching at all draws."""
        cached = self.gradients(dummy_encoder_dir, tmp_path, gradient_cache=64)
        assert largest_difference(cached, self.gradients(dummy_encoder_dir, tmp_path)) < 1e-5
        other_masks = self.gradients(dummy_encoder_dir, tmp_path, gradient_cache=4)
        assert largest_difference(cached, other_masks) > 1e-2

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    @pytest.mark.parametrize("gradient_cache", [None, 4])
    def test_gradients_are_those_of_float32_without_the_loss_scale(
        self, still_encoder: Path, tmp_path: Path, dtype: str, gradient_cache: int | None
    ) -> None:
        exact = self.gradients(still_encoder, tmp_path)
        mixed = self.gradients(still_encoder, tmp_path, dtype=dtype, gradient_cache=gradient_cache)
        assert cosine(mixed, exact) > 0.999
        assert norm_of(mixed) == pytest.approx(norm_of(exact), rel=0.03)
        assert norm_of(mixed) != pytest.approx(norm_of(exact), rel=1e-6)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    def test_the_norm_of_all_gradients_is_limited(
        self, still_encoder: Path, tmp_path: Path, dtype: str
    ) -> None:
        """Of the gradients themselves: float16's loss scale is taken out before."""
        whole = self.gradients(still_encoder, tmp_path, dtype=dtype)
        limit = 0.5 * norm_of(whole)
        limited = self.gradients(
            still_encoder, tmp_path, dtype=dtype, optimizer={"lr": 1e-3, "max_grad_norm": limit}
        )
        assert norm_of(limited) == pytest.approx(limit, rel=1e-4)
        assert cosine(limited, whole) == pytest.approx(1, abs=1e-4)
