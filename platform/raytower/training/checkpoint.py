"""The state that a checkpoint holds beside the model directory, as JSON and safetensors. No pickle, no Ray.

    model/                  the directory as it would be published
    state.json              progress, and the loss scale of float16
    optimizer.safetensors   Adam's moments and step counts
    trainable.safetensors   with adapters, or a layer into a teacher's space, only: the weights that train, unmerged

The step decides the schedule and the position in the data; seed, step and worker decide dropout.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from safetensors.torch import load_file
from torch import nn
from torch.optim import AdamW

from raytower.models.directory import save_tensors
from raytower.training.optimizer import load_optimizer, save_optimizer
from raytower.training.step import TrainingStep

MODEL_DIR = "model"
_STATE_NAME = "state.json"
_OPTIMIZER_NAME = "optimizer.safetensors"
_TRAINABLE_NAME = "trainable.safetensors"


def save_state(step: TrainingStep, progress: Mapping[str, Any], folder: Path) -> None:
    """Write the state of `step` and the run's progress, which must hold `step`, the steps made."""
    save_optimizer(cast(AdamW, step.optimizer), folder / _OPTIMIZER_NAME)
    state = {"progress": dict(progress), "scaler": step.scaler.state_dict()}
    (folder / _STATE_NAME).write_text(json.dumps(state), encoding="utf-8")


def load_state(step: TrainingStep, folder: Path) -> dict[str, Any]:
    """Restore `step` and return the progress."""
    state = json.loads((folder / _STATE_NAME).read_text(encoding="utf-8"))
    load_optimizer(cast(AdamW, step.optimizer), folder / _OPTIMIZER_NAME)
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
    """Read the trainable weights back into `model`, in place."""
    weights = load_file(folder / _TRAINABLE_NAME)
    for name, parameter in _trainable(model).items():
        parameter.data.copy_(weights[name])


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
