"""Which engine computes a model: as asked for, or by a short race of both. No Ray."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from raytower.errors import FormatError, RaytowerError
from raytower.models.compute import Engine, EngineChoice, EngineDtype, engines_of
from raytower.models.device import warn_of_slow_dtype
from raytower.models.directory import resolve_model
from raytower.models.onnx_export import Model, body_of, open_graph, put_body
from raytower.progress import log

# A query, two of another length and language, and a passage, as they come one by one; then all of them together.
RACE_TEXTS = (
    "How do I reset the password of my account?",
    "如何重置我的账户密码?",
    "refund of a payment that was made twice",
    "The invoice of March was paid twice; the second payment has to be returned within fourteen days. " * 5,
)
_ROUNDS = 3


@dataclass(frozen=True)
class Settled:
    """The engine that was taken, and why, in words."""

    engine: Engine
    reason: str


def narrowed(engine: EngineChoice, dtype: EngineDtype) -> EngineChoice:
    """auto becomes an engine where only one computes in `dtype`; what is asked for by name stays."""
    possible = engines_of(dtype)
    return possible[0] if engine == "auto" and len(possible) == 1 else engine


def graph_directory(name: str, engine: EngineChoice) -> Path | None:
    """Where `raytower export` may have put a graph of the model `name`; None where no graph is wanted."""
    return None if engine == "torch" else resolve_model(name)


def settle_engine(
    model: Model,
    engine: EngineChoice,
    dtype: EngineDtype,
    device: torch.device,
    directory: Path | None,
    run: Callable[[], object],
) -> Settled:
    """Leave in `model`, which is on `device`, the transformer of the engine asked for, or of the faster one.

    Args:
        model: by torch, in float32.
        engine: auto times both. Without ONNX Runtime, for a model that it cannot compute, and on a GPU, torch is taken.
        dtype: precision of the forward pass.
        device: where torch computes.
        directory: where the model was loaded from, in case `raytower export` put a graph there.
        run: computes a few texts with the transformer that `model` has.

    Raises:
        MissingExtraError: engine onnx without ONNX Runtime.
        FormatError: the directory's graph is damaged, or belongs to other weights.
        RaytowerError: engine onnx, and the model cannot be exported.
    """
    if engine == "torch":
        warn_of_slow_dtype(dtype, device.type)
        return Settled("torch", "as asked for")
    if engine == "onnx":
        put_body(model, open_graph(model, dtype, directory))
        return Settled("onnx", "as asked for")
    if device.type != "cpu":
        return Settled("torch", f"ONNX Runtime computes on CPUs, and this is {device}")
    by_torch = body_of(model)
    try:
        by_onnx = open_graph(model, dtype, directory)
    except FormatError:
        raise
    except RaytowerError as error:
        return _said(Settled("torch", f"no ONNX: {error}"))

    def run_by(body: torch.nn.Module) -> Callable[[], object]:
        def run_it() -> None:
            put_body(model, body)
            run()

        return run_it

    seconds = race({"torch": run_by(by_torch), "onnx": run_by(by_onnx)})
    faster: Engine = "onnx" if seconds["onnx"] < seconds["torch"] else "torch"
    put_body(model, by_onnx if faster == "onnx" else by_torch)
    timed = ", ".join(f"{name} {value * 1000:.1f} ms" for name, value in seconds.items())
    return _said(Settled(faster, f"the faster on a few texts: {timed}"))


def race(
    ways: Mapping[Engine, Callable[[], object]], clock: Callable[[], float] | None = None
) -> dict[Engine, float]:
    """The least seconds of each way over a few rounds; each is run once before, and the ways take turns."""
    now = clock or time.perf_counter
    for way in ways.values():
        way()
    least = dict.fromkeys(ways, float("inf"))
    for _ in range(_ROUNDS):
        for name, way in ways.items():
            started = now()
            way()
            least[name] = min(least[name], now() - started)
    return least


def _said(settled: Settled) -> Settled:
    log(f"engine auto takes {settled.engine}: {settled.reason}")
    return settled
