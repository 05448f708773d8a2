"""The command line of `raytower submit`, parted: its own keys, and what is passed on to the job."""

from __future__ import annotations

import json
from collections.abc import Sequence

from raytower.cli.keys import keys_of
from raytower.cluster.config import SubmitConfig
from raytower.cluster.jobs import JOBS

_FLAGS = {"dry_run", "json", "help"}
_TRUTHS = ("true", "false", "yes", "no", "on", "off")


def own_arguments(given: Sequence[str]) -> list[str]:
    """Arguments as keys of `SubmitConfig` alone.

    `encode --address http://head:8265 --config c.yaml --output s3://b/e` becomes `--job encode --address
    http://head:8265 --arguments '["--config", "c.yaml", "--output", "s3://b/e"]'`.
    """
    name, rest = _split_job(given)
    switches = {key.path: key.is_switch for key in keys_of(SubmitConfig)} | dict.fromkeys(_FLAGS, True)
    own: list[str] = [] if name is None else [f"--job={name}"]
    passed: list[str] = []
    waiting = list(rest)
    while waiting:
        argument = waiting.pop(0)
        key, _, value = argument.removeprefix("--").partition("=")
        path = key.replace("-", "_").removeprefix("no_" if not value else "")
        if argument == "-h" and not (passed and passed[-1].startswith("--")):
            own.append("--help")
        elif not argument.startswith("--") or path not in switches:
            passed.append(argument)
        else:
            own.append(argument)
            if "=" not in argument and waiting and not waiting[0].startswith("--"):
                is_switch = switches[path]
                if not is_switch or (path not in _FLAGS and waiting[0].lower() in _TRUTHS):
                    own[-1] += f"={waiting.pop(0)}"
    return [*own, f"--arguments={json.dumps(passed)}"] if passed else own


def _split_job(given: Sequence[str]) -> tuple[str | None, Sequence[str]]:
    """The job's name, which may have two words, and the rest."""
    if not given or given[0].startswith("-"):
        return None, given
    number = 2 if " ".join(given[:2]) in JOBS else 1
    return " ".join(given[:number]), given[number:]
