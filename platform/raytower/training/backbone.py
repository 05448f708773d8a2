"""Settings of a backbone that every task shares: adapters, recomputation, compilation. No Ray."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from raytower.collectives import rank
from raytower.errors import InputError
from raytower.models.device import TORCH_DTYPES
from raytower.models.lora import add_adapters, merge_adapters, narrow_frozen
from raytower.progress import log
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


def narrow_base(model: nn.Module, config: TrainJobConfig) -> None:
    """Hold what lies under adapters in the precision of forward passes, in place, once the model is built."""
    if config.lora is not None:
        narrow_frozen(model, TORCH_DTYPES[config.dtype])


# Any text: which weights a model's output depends on does not hang on it.
PROBE = "a text of a few words"


def freeze_unreached(model: nn.Module, forward: Callable[[], Tensor | Iterable[Tensor]]) -> list[str]:
    """Freeze, in place, the weights that the output of `forward` does not depend on, and return their names.

    Such as RoFormer's positions and Longformer's projections of global attention. They would never get a gradient,
    and data parallelism would wait for it: "Expected to have finished reduction in the prior iteration". The graph of
    one forward pass is searched; no backward pass is made.

    Args:
        model: as it will be trained, adapters included; in eval mode, so that nothing is drawn by chance.
        forward: one forward pass of it.
    """
    # Compiled now, on the CPU and for a single text, the backbone would be compiled once more on the device.
    with torch.enable_grad(), torch.compiler.set_stance("force_eager"):
        output = forward()
    reached = _leaves([output] if isinstance(output, Tensor) else output)
    frozen = [name for name, p in model.named_parameters() if p.requires_grad and p not in reached]
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    if frozen and rank() == 0:
        log(f"{len(frozen)} weights take no part in the output and are not trained, {frozen[0]} among them")
    return frozen


def _leaves(outputs: Iterable[Tensor]) -> set[Tensor]:
    """The tensors that a backward pass from `outputs` would give a gradient."""
    nodes: list[Any] = [output.grad_fn for output in outputs]
    seen: set[Any] = set()
    leaves: set[Tensor] = set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.add(node.variable)
        nodes += [following for following, _ in node.next_functions]
    return leaves


def merged_copy(model: ModuleT, config: TrainJobConfig) -> ModuleT:
    """The model as it is saved: itself, or a copy with its adapters folded in."""
    if config.lora is None:
        return model
    merged = copy.deepcopy(model)
    merge_adapters(merged)
    return merged


def has_dropout(backbone: nn.Module) -> bool:
    """Whether two passes over the same text can differ while training."""
    return any(isinstance(module, nn.Dropout) and module.p > 0 for module in backbone.modules())
