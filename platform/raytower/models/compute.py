"""Which engine computes at which precision, and how much at once. No torch: a config checks itself at no cost."""

from __future__ import annotations

from numbers import Integral
from typing import Literal

from raytower.errors import InputError

Engine = Literal["torch", "onnx"]
ENGINES: tuple[Engine, ...] = ("torch", "onnx")
EngineChoice = Literal["torch", "onnx", "auto"]
"""auto takes the faster of those that compute in the precision asked for."""
ComputeDtype = Literal["float32", "bfloat16", "float16"]
EngineDtype = Literal["float32", "bfloat16", "float16", "int8"]

DTYPES: dict[str, tuple[str, ...]] = {
    "torch": ("float32", "bfloat16", "float16"),
    "onnx": ("float32", "int8"),
}
# int8: matrices only; embedding tables and norms stay float32 and are counted in what is planned.
PARAMETER_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}


def check_compute(engine: str, dtype: str) -> None:
    """Raises InputError where `engine` does not compute in `dtype`, naming what does."""
    if engine not in (*DTYPES, "auto"):
        raise InputError(f"engine is {engine!r}; it must be one of {', '.join(DTYPES)} or auto")
    others = engines_of(dtype)
    if engine in others or (engine == "auto" and others):
        return
    if engine == "auto":
        raise InputError(f"dtype is {dtype!r}; it must be one of {', '.join(PARAMETER_BYTES)}")
    remedy = f"set engine to {others[0]}, or " if others else ""
    raise InputError(
        f"dtype is {dtype!r}, which engine {engine} does not compute in; {remedy}choose dtype "
        f"{' or '.join(DTYPES[engine])}"
    )


def engines_of(dtype: str) -> list[Engine]:
    """The engines that compute in `dtype`."""
    return [engine for engine in ENGINES if dtype in DTYPES[engine]]


def check_max_length(max_length: int, positions: int) -> int:
    """Return `max_length` if the backbone has positions for it. Raises InputError otherwise."""
    if not _is_whole(max_length) or not 1 <= max_length <= positions:
        raise InputError(
            f"max_length is {max_length!r}; this model has positions for 1 to {positions} tokens; give a whole number "
            "of them"
        )
    return int(max_length)


def check_tokens_per_batch(tokens_per_batch: int) -> int:
    """Return `tokens_per_batch` if it is one. Raises InputError otherwise."""
    if not _is_whole(tokens_per_batch) or tokens_per_batch < 1:
        raise InputError(
            f"tokens_per_batch is {tokens_per_batch!r}; it must be a whole number of at least 1, or None to choose it "
            "by the device"
        )
    return int(tokens_per_batch)


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
