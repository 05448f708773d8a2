"""Sharing out rows for evaluation: worker r of W takes rows r, r+W, …; results come back in order on every worker."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raytower.collectives import gather_constants, rank, world_size


def own_rows(num_rows: int) -> NDArray[np.int64]:
    """The numbers of this worker's rows, int64 (own rows,): of 5 rows, worker 1 of 2 has 1 3."""
    return np.arange(rank(), num_rows, world_size())


def gather_rows_in_order(values: Tensor | NDArray[np.float32], num_rows: int) -> Tensor:
    """Each worker's results (own rows, …) → (num_rows, …), in row order, on every worker, on their device."""
    workers = world_size()
    own = torch.as_tensor(values)
    # Shares differ by one row at most, so the filler stands at the very end and is cut off.
    padded = own.new_zeros((-(-num_rows // workers), *own.shape[1:]))
    padded[: len(own)] = own
    parts = gather_constants(padded).reshape(workers, *padded.shape)
    return parts.transpose(0, 1).reshape(-1, *padded.shape[1:])[:num_rows]


def evaluation_dtype(dtype: str, device: torch.device) -> Literal["float32", "bfloat16", "float16"]:
    """Precision of dev measurements: the training's, except float16 on a CPU, which has no fast kernels for it."""
    if dtype == "float16" and device.type == "cpu":
        return "float32"
    return dtype  # type: ignore[return-value] # a TrainDtype is one of these
