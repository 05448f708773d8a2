"""Where models compute: the device, how much goes through it at once, the way onto it, and what it says when full."""

from __future__ import annotations

import functools

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raytower.errors import InputError
from raytower.models.compute import ComputeDtype, EngineChoice
from raytower.progress import log
from raytower.storage.errors import one_line

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Padded tokens of a batch. Small batches stay in a CPU's cache; an accelerator wants big ones.
_CPU_TOKENS_PER_BATCH = 2048
# Encoders train twice as fast in chunks of this size as with one padded batch of 64 pairs.
_CPU_TOKENS_PER_ENCODER_CHUNK = 1024
_GPU_TOKENS_PER_BATCH = 65536
# What one more chunk costs while training, in padded tokens that take as long: the launches of a forward and a backward
# pass, some 1,000 kernels, take an accelerator milliseconds, in which a BERT-base computes a few thousand tokens.
_CPU_TOKENS_PER_LAUNCH = 64
_GPU_TOKENS_PER_LAUNCH = 4096
# Enough rows that batches of like length fill up, few enough that memory does not depend on the input.
_CPU_BLOCK_ROWS = 4096
_GPU_BLOCK_ROWS = 8192
# What torch's CPU allocator, cuBLAS, ONNX Runtime and C++ say; only CUDA's allocator has an exception of its own.
_OUT_OF_MEMORY = (
    "can't allocate memory",
    "cublas_status_alloc_failed",
    "failed to allocate memory",
    "bad allocation",
    "bad_alloc",
)


def default_device() -> torch.device:
    """A GPU where PyTorch sees one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def fast_dtype(device: torch.device) -> ComputeDtype:
    """bfloat16 where the hardware multiplies it, else float32.

    A CPU without AVX-512 BF16 or AMX emulates bfloat16, which takes several times as long as float32.
    """
    # torch 2.8 answers these questions in private functions alone.
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bfloat16" if device.type == "cuda" or native else "float32"


@functools.cache  # said once in a process, however many models it loads
def warn_of_slow_dtype(dtype: str, device_type: str) -> None:
    """Say where a precision that was asked for is emulated: nothing else tells why a job takes so long."""
    if dtype == "bfloat16" and device_type == "cpu" and fast_dtype(torch.device("cpu")) != dtype:
        log(
            "warning: dtype is bfloat16, which this CPU emulates in about ten times the time of float32 (it has "
            "neither AVX-512 BF16 nor AMX); set dtype to float32"
        )


def choose_device(device: str | torch.device | None, engine: EngineChoice = "torch") -> torch.device:
    """The device of that name, found to work; None takes the default.

    Raises:
        InputError: there is no such device, or `engine` does not compute on it.
    """
    if device is None:
        return torch.device("cpu") if engine == "onnx" else default_device()
    try:
        if not isinstance(device, str | torch.device):
            raise TypeError(f"it is of type {type(device).__name__}, and must be a name or a torch.device")
        chosen = torch.device(device)
        if engine == "onnx" and chosen.type != "cpu":
            raise InputError(
                f"engine onnx computes on CPUs, not on {chosen}; use engine torch there, or give it no GPU"
            )
        torch.zeros(1, device=chosen).cpu()
    except (TypeError, RuntimeError, AssertionError) as error:
        seen = "" if torch.cuda.is_available() else " (PyTorch sees no GPU here)"
        raise InputError(
            f"device is {str(device)!r}{seen}: {one_line(error)}; write 'cpu' or 'cuda:0', or leave it out"
        ) from error
    return chosen


def default_tokens_per_batch(device: torch.device) -> int:
    """Padded tokens of a forward pass."""
    return _CPU_TOKENS_PER_BATCH if device.type == "cpu" else _GPU_TOKENS_PER_BATCH


def default_tokens_per_encoder_chunk(device: torch.device) -> int:
    """Padded tokens of a chunk while an encoder is trained."""
    return _CPU_TOKENS_PER_ENCODER_CHUNK if device.type == "cpu" else _GPU_TOKENS_PER_BATCH


def tokens_per_launch(device: torch.device) -> int:
    """Padded tokens that take as long as one more chunk of a batch that is trained on."""
    return _CPU_TOKENS_PER_LAUNCH if device.type == "cpu" else _GPU_TOKENS_PER_LAUNCH


def default_block_rows(device: torch.device) -> int:
    """Rows that are tokenised, sorted by length and computed together."""
    return _CPU_BLOCK_ROWS if device.type == "cpu" else _GPU_BLOCK_ROWS


def load_tensor(values: NDArray[np.int64], device: torch.device) -> Tensor:
    """`values` on the device."""
    return send(torch.from_numpy(values), device)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor`, which lies in the CPU's memory, on the device, without waiting for the device."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        # From pinned memory the copy is one more entry in the device's queue.
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def multiply_fast(dtype: torch.dtype, device: torch.device) -> None:
    """Have this process multiply by TF32 where it trains in float32 on a GPU: ten bits of each factor, sums in float32.

    Training in bfloat16 leaves in float32, such as the losses' softmax, what must not lose bits.
    """
    if device.type == "cuda" and dtype is torch.float32:
        torch.set_float32_matmul_precision("high")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory, the device's or the process's, ran out."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return any(text in str(error).lower() for text in _OUT_OF_MEMORY)
