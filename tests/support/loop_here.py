"""The training loop as the only worker in this process, with Ray Train's calls answered."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray.train
import torch


def answer_ray_train(patch: pytest.MonkeyPatch, folder: Path) -> list[tuple[Any, dict[str, Any]]]:
    """Have `train_worker` begin anew, and report checkpoints into `folder`; each of them, with its metrics."""
    reported: list[tuple[Any, dict[str, Any]]] = []

    def report(metrics: dict[str, Any], checkpoint: Any, checkpoint_upload_mode: Any) -> None:
        place = folder / f"checkpoint{len(reported)}"
        shutil.copytree(checkpoint.path, place)
        reported.append((ray.train.Checkpoint.from_directory(str(place)), metrics))

    answers: dict[str, Callable[..., Any]] = {
        "get_context": lambda: SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 1),
        "get_checkpoint": lambda: None,
        "report": report,
        "get_all_reported_checkpoints": lambda consistency_mode: reported,
    }
    for name, answer in answers.items():
        patch.setattr(ray.train, name, answer)
    patch.setattr("ray.train.torch.get_device", lambda: torch.device("cpu"))
    return reported
