"""Which engine computes at which precision. Imports no torch, so that a config checks itself at no cost."""

from __future__ import annotations

from typing import Literal

from raytower.errors import InputError

Engine = Literal["torch", "onnx"]
EngineDtype = Literal["float32", "bfloat16", "float16", "int8"]

DTYPES: dict[str, tuple[str, ...]] = {
    "torch": ("float32", "bfloat16", "float16"),
    "onnx": ("float32", "int8"),
}
# int8: matrices only; embedding tables and norms stay float32 and are counted in what is planned.
PARAMETER_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}


def check_compute(engine: str, dtype: str) -> None:
    """Raises InputError where `engine` does not compute in `dtype`, naming what does."""
    if engine not in DTYPES:
        raise InputError(f"engine is {engine!r}; it must be one of {', '.join(DTYPES)}")
    if dtype in DTYPES[engine]:
        return
    others = [name for name, dtypes in DTYPES.items() if dtype in dtypes]
    remedy = f"set engine to {others[0]}, or " if others else ""
    raise InputError(
        f"dtype is {dtype!r}, which engine {engine} does not compute in; {remedy}choose dtype "
        f"{' or '.join(DTYPES[engine])}"
    )
