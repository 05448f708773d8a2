"""Low-rank adapters: training a few added weights in place of the backbone's own, merged when a directory is saved.

Source: Hu et al. 2021 (LoRA), by the library `peft`, an optional extra.
"""

from __future__ import annotations

import re

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from raytower.errors import InputError, import_extra
from raytower.models.config import LoraConfig

_POOLER = r"(.*\.)?pooler(\..*)?"


def add_adapters(backbone: PreTrainedModel, config: LoraConfig) -> None:
    """Put adapters into the backbone, in place, and freeze its own weights. At first they change nothing.

    Raises:
        MissingExtraError: `peft` is not installed.
        InputError: no layer has a name that ends in one of `target_modules`, or there is no linear one at all.
    """
    peft = import_extra("peft")
    if not any(isinstance(module, nn.Linear | Conv1D) for module in backbone.modules()):
        raise InputError(
            f"lora is set, and a {type(backbone).__name__} has no linear layer that takes an adapter; remove lora"
        )
    has_pooler = any(re.fullmatch(_POOLER, name) for name, _ in backbone.named_modules())
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=config.target_modules or "all-linear",
        # ALBERT's is a linear layer itself; peft warns where there is none.
        exclude_modules=_POOLER if has_pooler else None,
    )
    # The pooler belongs to a classifier's head, which trains as a whole; that of an encoder is frozen already.
    pooler = [p for name, p in backbone.named_parameters() if name.startswith("pooler.") and p.requires_grad]
    try:
        peft.inject_adapter_in_model(settings, backbone)
    except ValueError as error:
        known = sorted(
            {name.rsplit(".", 1)[-1] for name, m in backbone.named_modules() if isinstance(m, nn.Linear)}
        )
        raise InputError(
            f"lora.target_modules is {config.target_modules}: {error}; this backbone's linear layers are {known}"
        ) from error
    for parameter in pooler:
        parameter.requires_grad_(True)


def narrow_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """Hold, in place, the frozen linear layers of a model's backbone in `dtype`: in 16 bits half the memory.

    Autocast would cast these weights so in each forward pass, so that no product changes. Norms, embeddings and what
    lies behind the backbone compute in float32, and stay so.
    """
    backbone = next(module for module in model.modules() if isinstance(module, PreTrainedModel)).base_model
    # A tied one is read as a table, too.
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for module in backbone.modules():
        if isinstance(module, nn.Linear):
            for parameter in module.parameters(recurse=False):
                if not parameter.requires_grad and id(parameter) not in tables:
                    parameter.data = parameter.data.to(dtype)


def merge_adapters(backbone: nn.Module) -> None:
    """Fold the adapters into the weights that they adapt, in place and in float32; the backbone is then as if it had
    never had any.
    """
    import peft

    backbone.float()  # in a narrower type what the adapters add would be rounded away
    adapted = [(n, m) for n, m in backbone.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    for name, module in adapted:
        module.merge(safe_merge=True)
        parent, _, leaf = name.rpartition(".")
        setattr(backbone.get_submodule(parent), leaf, module.get_base_layer())
    if hasattr(backbone, "peft_config"):
        del backbone.peft_config
