"""AdamW, its schedule, and its state as safetensors."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from raytower.models.directory import save_tensors
from raytower.training.config import OptimizerConfig


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> AdamW:
    """AdamW over the trainable parameters; biases and norm weights (every one-dimensional tensor) do not decay."""
    decayed = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
    plain = [p for p in model.parameters() if p.requires_grad and p.dim() <= 1]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    # Fused: one pass over weights and moments in place of several, five times as fast on a CPU.
    return AdamW(groups, lr=config.lr, fused=True)


def make_schedule(optimizer: AdamW, num_steps: int, warmup_ratio: float) -> LambdaLR:
    """Linear warm-up over `warmup_ratio` of the steps, then linear decay that would reach zero after the last."""
    num_warmup = int(num_steps * warmup_ratio)

    def factor(step: int) -> float:
        if step < num_warmup:
            return (step + 1) / num_warmup
        return max(num_steps - step, 0) / max(num_steps - num_warmup, 1)

    return LambdaLR(optimizer, factor)


def save_optimizer(optimizer: AdamW, path: Path) -> None:
    """Write moments and step counts. No pickle: names are `<parameter number>.<state name>`."""
    tensors = {
        f"{number}.{name}": value.detach().cpu().contiguous()
        for number, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }
    save_tensors(tensors, path)


def load_optimizer(optimizer: AdamW, path: Path) -> None:
    """Read back what `save_optimizer` wrote, onto the devices of the parameters."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    with safe_open(path, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 - the handle is no mapping
            number, _, name = key.partition(".")
            state.setdefault(int(number), {})[name] = file.get_tensor(key)
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
