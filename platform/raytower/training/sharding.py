"""Fully sharded data parallelism: each worker holds a part of the weights, gradients and moments. Imports no Ray.

A layer of the transformer is put together from the parts of all workers before it computes, forward and backward, in
the precision of forward passes, which its input is rounded to, and taken apart behind it; its gradient is summed in
float32 into the parts. What lies outside of layers (tables, the last norm, projections, heads) is put together once a
forward pass, in float32, as it is without sharding.

All of this is exchanged between the workers, so that each must make the same forward passes, in one order. See
`Sharding.even_out` for chunks, of which each worker cuts as many as suit its own texts, and `Sharding.whole_on_each`
for dev rows.

Source: Rajbhandari et al. 2020, ZeRO, stage 3; by FSDP2 of torch (`fully_shard`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from raytower.collectives import gather_constants, rank, world_size
from raytower.errors import InputError
from raytower.models.chunks import Chunk


class Sharding:
    """A model whose parts lie on the workers of the default process group."""

    def __init__(self, model: nn.Module, *, dtype: torch.dtype, device: torch.device) -> None:
        """Share `model` out, in place: what it holds of it, each worker moves to `device` and drops the rest.

        Args:
            model: the whole model on the CPU, the same on every worker; all of them call this together.
            dtype: precision of forward passes, in which layers are put together.
            device: this worker's.

        Raises:
            InputError: as `layers_of`.
        """
        layers = layers_of(model)
        if device.type == "cuda":
            torch.cuda.set_device(device)  # a mesh has the current one
        # What is saved has the classes that the model had, and only the first worker saves.
        names = dict(model.named_parameters())
        empty = {name: torch.empty_like(p, device="meta") for name, p in names.items()}
        self._structure = with_weights(model, empty) if rank() == 0 else None
        mesh = init_device_mesh(device.type, (world_size(),))
        of_layers = MixedPrecisionPolicy(
            param_dtype=None if dtype is torch.float32 else dtype,
            reduce_dtype=torch.float32,
            # What follows the layers has weights of this type, in evaluation without autocast too.
            output_dtype=torch.float32,
        )
        self._layers = [fully_shard(layer, mesh=mesh, mp_policy=of_layers) for layer in layers]
        fully_shard(model, mesh=mesh)
        self.model = model

    def even_out(self, chunks: Sequence[Chunk]) -> list[Chunk]:
        """This worker's chunks of a batch, and behind them such without rows, so that all workers have equally many."""
        counts_W = gather_constants(torch.tensor([len(chunks)]))
        return [*chunks, *[_without_rows(chunks[0])] * (int(counts_W.max()) - len(chunks))]

    @contextmanager
    def whole_on_each(self) -> Iterator[None]:
        """Inside, each worker holds all weights, layers in the precision of forward passes, and computes alone.

        Dev rows of one worker may take more forward passes than those of another. A step has been made before.
        """
        root = cast(FSDPModule, self.model)
        for layer in self._layers:
            layer.set_reshard_after_forward(False, recurse=False)
        for module in (root, *self._layers):
            module.unshard()
        try:
            yield
        finally:
            # Also forgets in which order layers were last used, by which the next backward pass would fetch them.
            root.reset_iter_state()
            for layer in self._layers:
                layer.set_reshard_after_forward(True, recurse=False)

    @torch.no_grad()
    def gather(self) -> nn.Module | None:
        """The whole model in the CPU's memory of the first worker, None on the others; all call it together.

        One weight after another passes through the devices. It is the one full copy that there is.
        """
        weights = {}
        for name, parameter in self.model.named_parameters():
            whole = cast(DTensor, parameter).full_tensor()
            if self._structure is not None:
                weights[name] = whole.cpu()
        return None if self._structure is None else with_weights(self._structure, weights)


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The layers of the transformer within `model`, as transformers names them: what it does not split over devices.

    Where it names none, those that it recomputes one by one.

    Raises:
        InputError: there are none.
    """
    backbone = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    found: list[nn.Module] = []
    if backbone is not None:
        names = set(backbone._no_split_modules or ())
        tables = {id(module) for module in _word_tables(backbone)}
        # The module of a model's embeddings may be named, too; its table is the largest weight, and no layer.
        found = [
            module
            for module in backbone.modules()
            if type(module).__name__ in names and not tables & set(map(id, module.modules()))
        ] or [module for module in backbone.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not found:
        raise InputError(
            f"workers.sharding is full, and {type(backbone or model).__name__} names no layers to share out; set it "
            "to none"
        )
    inner = {id(part) for module in found for part in module.modules() if part is not module}
    return [module for module in found if id(module) not in inner]


def total_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """The norm of all gradients, a scalar; of weights in parts, over the parts of all workers, who call it together."""
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def with_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """A copy of `model` with `weights`, by name, in place of its parameters, of which none is copied."""
    memo: dict[int, object] = {
        id(parameter): nn.Parameter(weights[name], requires_grad=parameter.requires_grad)
        for name, parameter in model.named_parameters()
    }
    return copy.deepcopy(model, memo)


def _word_tables(backbone: PreTrainedModel) -> list[nn.Module]:
    try:
        table = backbone.get_input_embeddings()
    except NotImplementedError:  # what transformers raises for a model without a table that it knows
        return []
    return [] if table is None else [table]


def _without_rows(chunk: Chunk) -> Chunk:
    """One row of a chunk, filled up, which goes through the model and is left out of what comes back."""
    of_rows = {name: values[:1] for name, values in chunk.inputs.items() if name not in ("places", "starts")}
    return Chunk(of_rows, chunk.rows[:0])
