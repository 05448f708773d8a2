"""Errors that raytower raises on purpose, and how to find one inside what Ray wraps around it."""

from __future__ import annotations


class RaytowerError(Exception):
    """A failure with a message meant for the user: what, which value, the rule and the remedy."""


class InputError(RaytowerError, ValueError):
    """Bad input or configuration. The command line answers it with exit code 2 and no traceback."""


class FormatError(InputError):
    """A stored artefact (model directory, embeddings, index) that breaks its contract: refused, never guessed at."""


class MissingExtraError(RaytowerError, ImportError):
    """An optional package is not installed; the message holds the install line."""


def find_cause(error: BaseException) -> BaseException:
    """Return the first RaytowerError in the chain of causes of `error`, or `error` itself.

    Ray wraps what a worker raises in RayTaskError, UserCodeException and TrainingFailedError; the user's
    mistake lies at the bottom of that chain.
    """
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
        for name in ("cause", "__cause__", "__context__"):
            inner = getattr(current, name, None)
            if isinstance(inner, BaseException):
                queue.append(inner)
        # Train reports the failures of its workers as a mapping of rank to exception.
        workers = getattr(current, "worker_failures", None)
        if isinstance(workers, dict):
            queue.extend(value for value in workers.values() if isinstance(value, BaseException))
    return error
