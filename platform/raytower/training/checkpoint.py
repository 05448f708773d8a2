"""The state that a checkpoint holds beside the model directory, as JSON and safetensors. No pickle, no Ray.

    model/                  the directory as it would be published
    state.json              progress, and the loss scale of float16
    optimizer.safetensors   Adam's moments and step counts
    trainable.safetensors   with adapters, or a layer into a teacher's space, only: the weights that train, unmerged
    parts/                  of a model that is shared out, in place of both: what each worker holds of them

Any number of workers goes on from either, whether they share the model out or not. `parts` is written and read by
torch.distributed.checkpoint, in its form as safetensors; it lacks the weights that the model directory holds.

The step decides the schedule and the position in the data; seed, step and worker decide dropout.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed import checkpoint as distributed_checkpoint
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.optim import AdamW

from raytower.models.directory import save_tensors
from raytower.training.optimizer import load_optimizer, parameters_of, save_optimizer
from raytower.training.step import TrainingStep

MODEL_DIR = "model"
_STATE_NAME = "state.json"
_OPTIMIZER_NAME = "optimizer.safetensors"
_TRAINABLE_NAME = "trainable.safetensors"
_PARTS_DIR = "parts"
_WEIGHT = "weight."


def save_state(step: TrainingStep, progress: Mapping[str, Any], folder: Path) -> None:
    """Write the state of `step` and the run's progress, which must hold `step`, the steps made.

    Of a model that is shared out, `save_parts` writes the optimizer.
    """
    if step.sharding is None:
        save_optimizer(cast(AdamW, step.optimizer), folder / _OPTIMIZER_NAME)
    state = {"progress": dict(progress), "scaler": step.scaler.state_dict()}
    (folder / _STATE_NAME).write_text(json.dumps(state), encoding="utf-8")


def load_state(step: TrainingStep, folder: Path) -> dict[str, Any]:
    """Restore `step` and return the progress. Workers that share the model out call it together."""
    state = json.loads((folder / _STATE_NAME).read_text(encoding="utf-8"))
    optimizer = cast(AdamW, step.optimizer)
    if (folder / _PARTS_DIR).is_dir():
        _load_moments(optimizer, folder / _PARTS_DIR)
    else:
        load_optimizer(optimizer, folder / _OPTIMIZER_NAME)
    if state["scaler"]:
        step.scaler.load_state_dict(state["scaler"])
    with warnings.catch_warnings():
        # torch warns if a schedule steps before its optimizer. This one catches up with a restored optimizer.
        warnings.simplefilter("ignore", UserWarning)
        for _ in range(state["progress"]["step"]):
            step.schedule.step()
    return cast(dict[str, Any], state["progress"])


def save_trainable(model: nn.Module, folder: Path) -> None:
    """Write the trainable weights."""
    weights = {name: p.detach().cpu().contiguous() for name, p in _trainable(model).items()}
    save_tensors(weights, folder / _TRAINABLE_NAME)


def load_trainable(model: nn.Module, folder: Path) -> None:
    """Read the trainable weights back into `model`, in place, which is not shared out yet.

    Workers that a process group joins call it together.
    """
    trainable = _trainable(model)
    if (folder / _PARTS_DIR).is_dir():
        _load_parts({f"{_WEIGHT}{name}": p.data for name, p in trainable.items()}, folder / _PARTS_DIR)
        return
    weights = load_file(folder / _TRAINABLE_NAME)
    for name, parameter in trainable.items():
        parameter.data.copy_(weights[name])


def save_parts(step: TrainingStep, folder: Path, *, with_weights: bool) -> None:
    """Write what this worker holds of a model that is shared out: moments, step counts and, `with_weights`, weights.

    All workers call it together, each with a folder of its own; `load_state` and `load_trainable` read a folder that
    has the files of all.
    """
    state = cast(AdamW, step.optimizer).state_dict()["state"]
    tensors = {_moment(number, name): value for number, own in state.items() for name, value in own.items()}
    if with_weights:
        tensors |= {f"{_WEIGHT}{name}": p.detach() for name, p in _trainable(step.model).items()}
    writer = HuggingFaceStorageWriter(str(folder / _PARTS_DIR), save_distributed=True)
    distributed_checkpoint.save(tensors, storage_writer=writer)


def _load_moments(optimizer: AdamW, folder: Path) -> None:
    """The optimizer's state from parts, in those that this process holds of the weights now."""
    state = {
        number: {
            "step": torch.zeros(()),
            "exp_avg": torch.zeros_like(parameter, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
        }
        for number, parameter in enumerate(parameters_of(optimizer))
    }
    _load_parts({_moment(n, name): value for n, own in state.items() for name, value in own.items()}, folder)
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def _load_parts(tensors: dict[str, Tensor], folder: Path) -> None:
    """Fill `tensors`, whole ones or parts, in place."""
    with warnings.catch_warnings():
        # torch warns where there is but one process.
        warnings.simplefilter("ignore", UserWarning)
        distributed_checkpoint.load(
            cast(dict[str, Any], tensors),
            storage_reader=HuggingFaceStorageReader(str(folder)),
            no_dist=not dist.is_initialized(),
        )


def _moment(number: int, name: str) -> str:
    return f"optimizer.{number}.{name}"


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
