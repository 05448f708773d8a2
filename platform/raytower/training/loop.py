"""The loop that every Ray Train worker runs: steps, evaluation, checkpoints, early stopping."""

from __future__ import annotations

import itertools
import math
import os
import socket
import time
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import ray.train
import ray.train.torch
import ray.util
import torch

from raytower.collectives import gather_constants
from raytower.config import WorkersConfig
from raytower.errors import InputError, RaytowerError, find_cause
from raytower.models.ahead import Ahead
from raytower.models.device import is_out_of_memory, multiply_fast
from raytower.models.directory import set_num_threads
from raytower.progress import log
from raytower.storage import Location
from raytower.storage.errors import StorageError, StorageRefusedError, one_line
from raytower.training import notice
from raytower.training.backbone import narrow_base
from raytower.training.batches import Rows
from raytower.training.checkpoint import (
    MODEL_DIR,
    load_state,
    load_trainable,
    save_parts,
    save_state,
    save_trainable,
)
from raytower.training.config import TrainJobConfig
from raytower.training.exchange import Alone, GroupExchange
from raytower.training.optimizer import make_optimizer, make_schedule
from raytower.training.row_stream import StreamPlan, stream_batches
from raytower.training.run_log import RunLog
from raytower.training.sharding import Sharding
from raytower.training.step import NotANumberError, TrainingStep, data_parallel
from raytower.training.task import Task
from raytower.training.trackers import TrackedRun
from raytower.training.uploads import Uploads
from raytower.training.word_gradients import WordGradients


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """Everything a worker needs; made on the driver."""

    config: TrainJobConfig
    task: Task[Any]
    stream: StreamPlan
    num_steps: int
    workers: WorkersConfig
    """What each of them holds, and how many there are at most."""
    storage: Location
    """Where checkpoints and the output go; every worker must be able to write there."""
    log_dir: Location
    failure_file: Location
    """Where a worker leaves the failure that ends the run for all of them."""
    tracked: TrackedRun | None = None
    """What trackers are told of the run; None without trackers."""


@dataclass
class Progress:
    """How far a run has come; part of every checkpoint."""

    step: int = 0
    best: float | None = None
    best_step: int = 0
    stale_evaluations: int = 0
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)
    """Dev metrics of each evaluation."""
    curve: list[dict[str, float]] = field(default_factory=list)
    """Loss, what the task observes beside it (a classifier's accuracy) and learning rate of each logged step."""
    observed: dict[str, list[float]] = field(default_factory=dict)
    """What the task has observed since the last logged step, by name."""


def train_worker(loop_config: dict[str, Any]) -> dict[str, Any]:
    """The function that Ray Train runs on each worker; returns the run's figures, or a failure that ends the run.

    Ray Train would take an exception for a lost worker, start all of them again and meet the same failure. One that
    no new start can mend is returned instead: `failure`, its message, and `is_input`, whether the input is to blame.
    """
    plan: TrainingPlan = loop_config["plan"]
    context = ray.train.get_context()
    set_num_threads(plan.workers.num_threads)
    # The tokenizer's threads are counted once, when it first runs, and would else be all of the node's cores.
    os.environ["RAYON_NUM_THREADS"] = str(plan.workers.num_threads)
    try:
        if plan.failure_file.is_file():
            return dict(plan.failure_file.read_json())
        probe_storage(plan.storage, context.get_world_rank())
        # However the run ends, the last checkpoint on its way arrives.
        with Uploads() as uploads:
            return _Worker(plan, uploads).run()
    except Exception as error:
        failure = lasting_failure(error, plan.config.batch_size // context.get_world_size())
        if failure is None:
            raise
        # All workers see the same mean loss and stop together. Any other failure may be one worker's, for which the
        # others would wait: Ray Train ends them, and when it starts them again all find the failure here.
        if context.get_world_size() > 1 and not isinstance(error, NotANumberError):
            plan.failure_file.parent.make_dir()
            plan.failure_file.write_json(failure)
            raise
        return failure


def lasting_failure(error: Exception, num_rows: int) -> dict[str, Any] | None:
    """What `train_worker` returns for an error that the same start would meet again, or None for any other.

    Lasting are the errors of raytower, but for storage that could not be reached, and memory that ran out.

    Args:
        error: what a worker met.
        num_rows: of a batch, those of one worker.
    """
    cause = find_cause(error)
    if isinstance(cause, StorageError) and not isinstance(cause, StorageRefusedError):
        return None
    if isinstance(cause, RaytowerError):
        return {"failure": str(cause), "is_input": isinstance(cause, InputError)}
    if is_out_of_memory(cause):
        return {
            "failure": f"a worker's share of a batch, {num_rows} rows, does not fit into its memory "
            f"({one_line(error)}); lower batch_size (accumulate_batches makes up for it) or max_length, or set "
            "recompute to true",
            "is_input": False,
        }
    return None


@dataclass(frozen=True)
class _LoadedStep:
    """This worker's rows of the batches of one optimizer step, and what the task made of them."""

    rows: list[Rows]
    batches: list[Any]


class _Worker:
    def __init__(self, plan: TrainingPlan, uploads: Uploads) -> None:
        self.plan = plan
        self.uploads = uploads
        self.config = config = plan.config
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.progress = Progress()
        self._saved_step = 0
        with _checkpoint_folder() as folder:
            # A checkpoint's model directory has its adapters merged, and lacks what is not published. A run with such
            # weights builds the model that it began with and then loads them.
            start_from = folder / MODEL_DIR if folder and not plan.task.keeps_weights_apart else None
            device = ray.train.torch.get_device()
            multiply_fast(getattr(torch, config.dtype), device)
            self.model = plan.task.build(start_from, device)
            narrow_base(self.model, config)
            if folder and plan.task.keeps_weights_apart:
                load_trainable(self.model, folder)
            self.model.train()
            self.sharding: Sharding | None = None
            if config.workers.sharding == "full" and self.world_size > 1:
                # No device holds all of the model at any time.
                self.sharding = Sharding(self.model, dtype=getattr(torch, config.dtype), device=device)
            else:
                self.model = self.model.to(device)
            optimizer = make_optimizer(self.model, config.optimizer)
            schedule = make_schedule(
                optimizer, plan.num_steps, config.optimizer.warmup_ratio, config.optimizer.schedule
            )
            words = WordGradients.of(self.model) if self.sharding is None else None
            is_replicated = self.world_size > 1 and self.sharding is None
            self.step = TrainingStep(
                self.model,
                optimizer,
                schedule,
                dtype=getattr(torch, config.dtype),
                max_grad_norm=config.optimizer.max_grad_norm,
                seed=config.seed,
                num_shares=plan.workers.num,
                parallel=data_parallel(self.model, words) if is_replicated else None,
                words=words,
                sharding=self.sharding,
            )
            if folder:
                self.progress = Progress(**load_state(self.step, folder))
                self._saved_step = self.progress.step
                self._say(f"continuing from step {self.progress.step} of {plan.num_steps}")
            if self.world_size < plan.workers.num:
                self._say(f"{self.world_size} of {plan.workers.num} workers are there, and begin")
            if config.workers.sharding == "full" and self.sharding is None:
                self._say("workers.sharding is full, and one worker alone holds the whole model")
            if device.type == "cpu" and torch.cuda.is_available():
                self._say("a GPU is there and not used: set workers.num_gpus to 1")
        self.events = None
        if self.rank == 0:
            self.events = RunLog(plan.log_dir, self.progress.step + 1, plan.tracked)

    def run(self) -> dict[str, Any]:
        try:
            figures = self._train()
        except notice.EndedForNow:
            raise
        except Exception:
            if self.events is not None:
                self.events.fail()
            raise
        if self.events is not None:
            self.events.close()
        return figures

    def _train(self) -> dict[str, Any]:
        skipped = self.progress.step * self.config.accumulate_batches
        exchange = Alone() if self.world_size == 1 else _join_exchange()
        stream = stream_batches(self.plan.stream, skipped, self._say, exchange)
        num_left = 0 if self._is_over() else self.plan.num_steps - self.progress.step
        # The next step's batches are read, tokenised and sent to the device while this step is computed.
        with closing(stream), Ahead(self._load_step, itertools.repeat(stream, num_left)) as ahead:
            return self._make_steps(ahead)

    def _make_steps(self, ahead: Ahead[Generator[Rows, None, None], _LoadedStep]) -> dict[str, Any]:
        plan, progress, dev = self.plan, self.progress, self.plan.task.dev
        rows_per_step = self.config.batch_size * self.config.accumulate_batches
        num_rows = sum(piece.num_rows for piece in plan.stream.pieces)
        steps = iter(ahead)
        started, first_step, before = time.perf_counter(), progress.step, progress.seconds
        while not self._is_over():
            loss = self._make_step(next(steps))
            for name, value in self.step.observed.items():
                progress.observed.setdefault(name, []).append(value)
            progress.step += 1
            progress.seconds = before + time.perf_counter() - started
            last = progress.step == plan.num_steps
            if last or progress.step % self.config.log_every_steps == 0:
                self._log(loss, (progress.step - first_step) / (time.perf_counter() - started))
            if dev is not None and (last or dev.is_due(progress.step, rows_per_step, num_rows)):
                ahead.rest()  # the tokenizer of the next batch serves the dev rows, too
                self._evaluate()
            elif last or progress.step % self.config.checkpoint_every_steps == 0:
                ahead.rest()  # it is saved with the model
                self._report_to_continue()
            self._end_on_notice(ahead)
        return {
            "steps": progress.step,
            "seconds": round(progress.seconds, 3),
            "best": progress.best,
            "best_step": progress.best_step,
            "history": progress.history,
            "curve": progress.curve,
        }

    def _load_step(self, batches: Iterator[Rows]) -> _LoadedStep:
        """Read this worker's rows of the next step and load them; in the thread that works ahead."""
        if self.step.device.type == "cuda":
            torch.cuda.set_device(self.step.device)  # a thread begins at the machine's first one
        rows = [next(batches) for _ in range(self.config.accumulate_batches)]
        return _LoadedStep(rows, [self.plan.task.load_batch(self.step, each) for each in rows])

    def _make_step(self, loaded: _LoadedStep) -> float:
        """One step on this worker's rows of the batches."""
        try:
            return self.step.run(self.progress.step, loaded.batches, self.plan.task.propagate)
        except NotANumberError as error:
            columns = loaded.rows[error.batch].values()
            text = next(values[0] for values in columns if isinstance(values[0], str))
            raise NotANumberError(
                f"{error} at step {self.progress.step + 1}, whose batch begins with {text[:80]!r}; training has "
                "stopped. Lower optimizer.lr, use dtype float32, or look at these rows",
                error.batch,
            ) from error

    def _is_over(self) -> bool:
        """All steps are made, or patience has run out. True at once if a run was killed after its last step."""
        dev = self.plan.task.dev
        impatient = dev is not None and dev.is_over(self.progress.stale_evaluations)
        return impatient or self.progress.step >= self.plan.num_steps

    def _end_on_notice(self, ahead: Ahead[Generator[Rows, None, None], _LoadedStep]) -> None:
        """End all workers once a checkpoint of this step is stored, where one has been told that it will be ended.

        A measurement that is due in this step comes before: the run would go on behind it.

        Raises:
            EndedForNow: on every worker.
        """
        reason = notice.given()
        told = gather_constants(torch.tensor([[float(reason is not None)]]))
        if self._is_over() or not told.any():
            return
        if self._saved_step < self.progress.step:
            ahead.rest()  # its tokenizer is saved with the model
            self._report_to_continue()
        self.uploads.wait()
        # The first worker that ends has Ray Train end all: none does before the checkpoint counts.
        gather_constants(told)
        why = reason or "another worker will be ended"
        message = f"{why}: all workers start anew from the checkpoint of step {self.progress.step}"
        self._say(message)
        raise notice.EndedForNow(message)

    def _report_to_continue(self) -> None:
        """Report a checkpoint that is only there to continue from: it counts as the worst by the metric."""
        dev = self.plan.task.dev
        self._report({} if dev is None else {dev.metric: float("-inf")})

    def _evaluate(self) -> None:
        """Measure on dev and report a checkpoint."""
        progress, dev = self.progress, self.plan.task.dev
        assert dev is not None
        self.model.eval()
        with nullcontext() if self.sharding is None else self.sharding.whole_on_each():
            metrics = self.plan.task.evaluate(self.model)
        self.model.train()
        value = metrics[dev.metric]
        # NaN (Spearman of scores that are all equal) is worse than any number, and no first one to beat.
        if math.isfinite(value) and (progress.best is None or value > progress.best):
            progress.best, progress.best_step, progress.stale_evaluations = value, progress.step, 0
        else:
            progress.stale_evaluations += 1
        progress.history.append({"step": progress.step, **metrics})
        best = "none" if progress.best is None else f"{progress.best:.4f}"
        told = "  ".join(f"{name} {metrics[name]:.4f}" for name in self.plan.task.told_metrics)
        self._say(f"step {progress.step}: dev {told} (best {best})")
        if self.events is not None:
            self.events.write(progress.step, {f"dev/{name}": metric for name, metric in metrics.items()})
        self._report({**metrics, dev.metric: self._rank_of(value)})

    def _rank_of(self, value: float) -> float:
        """What a checkpoint is kept by: of equal values the first is the best, however many are kept."""
        if not math.isfinite(value):
            return float("-inf")
        is_tie = value == self.progress.best and self.progress.step != self.progress.best_step
        return math.nextafter(value, float("-inf")) if is_tie else value

    def _report(self, metrics: dict[str, float]) -> None:
        """Hand a checkpoint to Ray Train, which counts it once all of it is stored."""
        values = {**metrics, "step": self.progress.step}
        self._saved_step = self.progress.step
        if self.rank and self.sharding is None:
            ray.train.report(values)
            return
        self.uploads.begin(values, self._save)
        if self.events is not None:
            self.events.flush()

    def _save(self, folder: Path) -> None:
        """What this worker adds to a checkpoint: the first one all, or all but the parts that the others hold."""
        task, model = self.plan.task, self.model
        if self.sharding is not None:
            save_parts(self.step, folder, with_weights=task.keeps_weights_apart)
            whole = self.sharding.gather()
            if whole is None:
                return
            model = whole
        info = {"history": self.progress.history, "curve": self.progress.curve}
        task.save(model, folder / MODEL_DIR, info)
        if task.keeps_weights_apart and self.sharding is None:
            save_trainable(model, folder)
        save_state(self.step, asdict(self.progress), folder)

    def _log(self, loss: float, steps_per_second: float) -> None:
        progress = self.progress
        lr = float(self.step.schedule.get_last_lr()[0])
        # A step is of one set where there are several, so what was observed is averaged over the steps between.
        means = {name: math.fsum(values) / len(values) for name, values in progress.observed.items()}
        progress.observed = {}
        seen = {"loss": loss, **means}
        progress.curve.append({"step": progress.step, **seen, "lr": lr})
        rows_per_second = steps_per_second * self.config.batch_size * self.config.accumulate_batches
        seconds_left = (self.plan.num_steps - progress.step) / max(steps_per_second, 1e-9)
        self._say(
            f"step {progress.step}/{self.plan.num_steps}  "
            + "".join(f"{name} {value:.4f}  " for name, value in seen.items())
            + f"lr {lr:.2e}  "
            f"{rows_per_second:.1f} rows/s  {seconds_left:.0f} s left"
        )
        if self.events is not None:
            values = {**seen, "lr": lr, "rows_per_second": rows_per_second}
            self.events.write(progress.step, {f"train/{name}": value for name, value in values.items()})

    def _say(self, message: str) -> None:
        if self.rank == 0:
            log(message)


def _join_exchange() -> GroupExchange:
    """This worker's end of the exchange of rows, reached at the address by which Ray knows this node.

    Left alone gloo listens where the name of the machine leads, which on many clusters is the machine itself.
    """
    address = ray.util.get_node_ip_address()
    for name, known in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in known):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    return GroupExchange()


def probe_storage(storage: Location, rank: int | None = None) -> None:
    """Write and remove a file, so that a location that this process cannot write is found before training.

    Args:
        storage: the folder that the output and the checkpoints go to.
        rank: of the worker that this process is; None for the driver.

    Raises:
        InputError: naming the process and its machine.
    """
    writer = "driver" if rank is None else "worker"
    probe = storage / f".probe-{writer if rank is None else rank}"
    try:
        storage.make_dir()
        probe.write_bytes(b"probe")
        probe.delete()
    except OSError as error:
        raise InputError(
            f"the folder of output, {storage}, cannot be written by the {writer} on {socket.gethostname()}: {error}; "
            "choose a place that every worker can write, such as a shared file system or s3://"
        ) from error


@contextmanager
def _checkpoint_folder() -> Iterator[Path | None]:
    """The last whole checkpoint as a local folder, or None on a fresh start."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        yield None
        return
    with checkpoint.as_directory() as folder:
        yield Path(folder)
