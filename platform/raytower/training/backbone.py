"""Settings of a backbone that every task shares: adapters, recomputation, compilation. No Ray."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import nn
from transformers import PreTrainedModel

from raytower.errors import InputError
from raytower.models.lora import add_adapters, merge_adapters
from raytower.training.config import TrainJobConfig

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def prepare_backbone(backbone: PreTrainedModel, config: TrainJobConfig) -> None:
    """Apply `lora`, `recompute` and `compile` to the backbone, in place.

    Raises:
        InputError: the model cannot recompute activations, or no layer takes an adapter.
        MissingExtraError: lora without `peft`.
    """
    if config.lora is not None:
        add_adapters(backbone, config.lora)
    if config.recompute:
        if not backbone.supports_gradient_checkpointing:
            raise InputError(
                f"recompute is true, and {type(backbone).__name__} cannot recompute activations; set it to false, "
                "or use gradient_cache"
            )
        backbone.gradient_checkpointing_enable({"use_reentrant": False})
    if config.compile:
        # In place: a wrapper would change the names of the weights that are saved.
        backbone.compile(dynamic=True)


def merged_copy(model: ModuleT, config: TrainJobConfig) -> ModuleT:
    """The model as it is saved: itself, or a copy with its adapters folded in."""
    if config.lora is None:
        return model
    merged = copy.deepcopy(model)
    merge_adapters(merged)
    return merged


def evaluation_copy(model: ModuleT, config: TrainJobConfig) -> ModuleT:
    """A copy of the model as it would be saved. The caller may cast it; training keeps its own fp32 weights."""
    return copy.deepcopy(model) if config.lora is None else merged_copy(model, config)


def has_dropout(backbone: nn.Module) -> bool:
    """Whether two passes over the same text can differ while training."""
    return any(isinstance(module, nn.Dropout) and module.p > 0 for module in backbone.modules())
