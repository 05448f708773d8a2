"""The loop that every Ray Train worker runs: steps, evaluation, checkpoints, early stopping."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
from torch import nn

from raytower.data.pieces import Piece
from raytower.errors import RaytowerError
from raytower.objectives.gather import gather_constants
from raytower.runtime import log
from raytower.training.config import TrainJobConfig
from raytower.training.optimizer import load_optimizer, make_optimizer, make_schedule, save_optimizer
from raytower.training.row_stream import stream_batches, worker_slice
from raytower.training.task import Task

MODEL_DIR = "model"
STATE_NAME = "state.json"
OPTIMIZER_NAME = "optimizer.safetensors"


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """Everything a worker needs; made on the driver."""

    config: TrainJobConfig
    task: Task
    pieces: Sequence[Piece]
    num_steps: int
    num_threads: int


@dataclass
class _Progress:
    step: int = 0
    best: float | None = None
    best_step: int = 0
    stale_evaluations: int = 0
    seconds: float = 0.0
    history: list[dict[str, float]] | None = None


def train_worker(loop_config: dict[str, Any]) -> dict[str, Any]:
    """Ray Train's entry on each worker; returns the run's figures."""
    plan: TrainingPlan = loop_config["plan"]
    torch.set_num_threads(plan.num_threads)
    return _Worker(plan).run()


class _Worker:
    def __init__(self, plan: TrainingPlan) -> None:
        self.plan = plan
        self.config = plan.config
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device()
        self.progress = _Progress(history=[])
        with _checkpoint_folder() as folder:
            # The same seed on every worker: a freshly initialised head must be the same everywhere.
            torch.manual_seed(self.config.seed)
            self.model = plan.task.build(folder / MODEL_DIR if folder else None).to(self.device).train()
            self.optimizer = make_optimizer(self.model, self.config.optimizer)
            self.schedule = make_schedule(self.optimizer, plan.num_steps, self.config.optimizer.warmup_ratio)
            if folder:
                self._restore(folder)
        self.parallel: nn.Module = self.model
        if self.world_size > 1:
            devices = [self.device] if self.device.type == "cuda" else None
            self.parallel = nn.parallel.DistributedDataParallel(
                self.model, device_ids=devices, broadcast_buffers=False
            )

    def run(self) -> dict[str, Any]:
        config, plan, progress = self.config, self.plan, self.progress
        batches = stream_batches(
            plan.pieces,
            batch_size=config.batch_size,
            seed=config.seed,
            window_rows=config.shuffle_rows,
            skip_batches=progress.step,
        )
        started, first_step, before = time.perf_counter(), progress.step, progress.seconds
        while progress.step < plan.num_steps:
            rows = worker_slice(next(batches), self.rank, self.world_size)
            loss = self._step(rows)
            progress.step += 1
            progress.seconds = before + time.perf_counter() - started
            if progress.step % config.log_every_steps == 0 or progress.step == plan.num_steps:
                self._log(
                    loss, (progress.step - first_step) * config.batch_size / (time.perf_counter() - started)
                )
            last = progress.step == plan.num_steps
            if self._evaluates() and (last or progress.step % plan.task.every_steps == 0):
                if self._evaluate():
                    break
            elif last or progress.step % config.checkpoint_every_steps == 0:
                self._report({})
        return {
            "steps": progress.step,
            "seconds": round(progress.seconds, 3),
            "best": progress.best,
            "best_step": progress.best_step,
            "history": progress.history,
        }

    def _step(self, rows: dict[str, list[Any]]) -> float:
        # Dropout is a function of seed, step and worker, so a continued run draws what an undisturbed one did.
        torch.manual_seed((self.config.seed * 1_000_003 + self.progress.step) * 4099 + self.rank)
        dtype = getattr(torch, self.config.dtype)
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not torch.float32):
            loss = self.plan.task.loss(self.parallel, rows)
        mean_loss = float(gather_constants(loss.detach().reshape(1)).mean())
        if not mean_loss == mean_loss or abs(mean_loss) == float("inf"):
            raise RaytowerError(
                f"the loss is {mean_loss} at step {self.progress.step + 1}; training stops and the last checkpoint "
                "stays. Lower optimizer.lr, or use dtype float32"
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optimizer.max_grad_norm)
        self.optimizer.step()
        self.schedule.step()
        return mean_loss

    def _evaluates(self) -> bool:
        return self.plan.task.metric is not None

    def _evaluate(self) -> bool:
        """Measure on dev, report a checkpoint, and say whether patience has run out."""
        task, progress = self.plan.task, self.progress
        assert task.metric is not None
        self.model.eval()
        metrics = task.evaluate(self.model)
        self.model.train()
        value = metrics[task.metric]
        if progress.best is None or value > progress.best:
            progress.best, progress.best_step, progress.stale_evaluations = value, progress.step, 0
        else:
            progress.stale_evaluations += 1
        assert progress.history is not None
        progress.history.append({"step": progress.step, **metrics})
        if self.rank == 0:
            log(f"step {progress.step}: dev {task.metric} {value:.4f} (best {progress.best:.4f})")
        self._report(metrics)
        return progress.stale_evaluations >= task.patience

    def _report(self, metrics: dict[str, float]) -> None:
        values = {**metrics, "step": self.progress.step}
        if self.rank:
            ray.train.report(values)
            return
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            self.plan.task.save(self.model, folder / MODEL_DIR, {"history": self.progress.history})
            save_optimizer(self.optimizer, folder / OPTIMIZER_NAME)
            (folder / STATE_NAME).write_text(json.dumps(vars(self.progress)))
            ray.train.report(values, checkpoint=ray.train.Checkpoint.from_directory(name))

    def _restore(self, folder: Path) -> None:
        self.progress = _Progress(**json.loads((folder / STATE_NAME).read_text()))
        load_optimizer(self.optimizer, folder / OPTIMIZER_NAME)
        for _ in range(self.progress.step):
            self.schedule.step()
        if self.rank == 0:
            log(f"continuing from step {self.progress.step} of {self.plan.num_steps}")

    def _log(self, loss: float, rows_per_second: float) -> None:
        if self.rank:
            return
        left = (
            (self.plan.num_steps - self.progress.step) * self.config.batch_size / max(rows_per_second, 1e-9)
        )
        log(
            f"step {self.progress.step}/{self.plan.num_steps}  loss {loss:.4f}  "
            f"lr {self.schedule.get_last_lr()[0]:.2e}  {rows_per_second:.1f} rows/s  {left:.0f} s left"
        )


class _checkpoint_folder:  # noqa: N801 - used as a function
    """The last checkpoint as a local folder, or None on a fresh start."""

    def __init__(self) -> None:
        checkpoint = ray.train.get_checkpoint()
        self._context = checkpoint.as_directory() if checkpoint else None

    def __enter__(self) -> Path | None:
        return Path(self._context.__enter__()) if self._context else None

    def __exit__(self, *error: object) -> None:
        if self._context:
            self._context.__exit__(*error)
