"""Gathering rows across workers with gradients. Without a process group everything stays as it is.

Shape legend: B rows of this worker, W workers, N = B·W rows of all.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch import distributed as dist


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


class _GatherRows(torch.autograd.Function):
    """Forward: (B, …) of each worker → (N, …) in rank order. Backward: the sum over workers of each row's gradient.

    With each worker's loss a mean over its own B queries and data parallelism averaging gradients over workers, the
    sum here is what makes the result the gradient of the mean over all N queries: no factor of W enters anywhere.
    """

    @staticmethod
    def forward(context: Any, rows: Tensor) -> Tensor:
        return _gathered(rows)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        gradient_N = gradients[0].contiguous()
        # Each worker gets the sum of its own rows alone, half of what moves in an all-reduce.
        own_B = gradient_N.new_empty((len(gradient_N) // world_size(), *gradient_N.shape[1:]))
        dist.reduce_scatter_tensor(own_B, gradient_N)
        return own_B


def gather_rows(rows: Tensor) -> Tensor:
    """(B, …) → (N, …), rank 0's rows first; gradients flow back to the worker that holds a row.

    Every worker must hold equally many rows.
    """
    if world_size() == 1:
        return rows
    return cast(Tensor, _GatherRows.apply(rows))


def gather_constants(rows: Tensor) -> Tensor:
    """(B, …) → (N, …) for values that need no gradient, on the device that they came from."""
    if world_size() == 1:
        return rows
    # NCCL moves nothing that lies in the CPU's memory.
    sent = rows.cuda() if dist.get_backend() == "nccl" else rows
    return _gathered(sent).to(rows.device)


def _gathered(rows: Tensor) -> Tensor:
    """(B, …) → (N, …), in one piece of memory, without a copy of each worker's part."""
    everyone = rows.new_empty((len(rows) * world_size(), *rows.shape[1:]))
    dist.all_gather_into_tensor(everyone, rows.contiguous())
    return everyone
