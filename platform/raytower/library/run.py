"""The commands of the command line as a function."""

from __future__ import annotations

import difflib
from typing import Any

from raytower.commands import COMMANDS, find_reference
from raytower.config import make_config, nested_keys
from raytower.errors import InputError, RaytowerError, find_cause
from raytower.library.inputs import plain, shown


def run(command: str, /, **config: Any) -> dict[str, Any]:
    """Run a command of the command line in this process and return its figures.

    `raytower COMMAND --help` lists the keys and what comes back. Progress goes to stderr; jobs over worker processes
    start or join Ray as they do from the command line. Only `demo` shows something on stdout, and `serve` returns when
    it is told to end.

    Args:
        command: its name, such as "encode" or "index build".
        config: its keys, sections as mappings: `input={"path": "corpus.tsv"}`, or dotted, `**{"input.path": …}`.

    Raises:
        InputError: no such command, an unknown key, or a value that breaks its rule; and bad input.
        MissingExtraError: what the command runs on is not installed.
        RaytowerError: what else it cannot do.

    >>> raytower.run("search", index=index_dir, query="When do you open?", k=1)["results"][0]["id"]
    'hours'
    """
    if not isinstance(command, str):
        raise InputError(f"command is {shown(command)}; it must be the name of a command, such as 'encode'")
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"; the nearest is {near[0]!r}" if near else f"; there are {', '.join(COMMANDS)}"
        raise InputError(f"there is no command {command!r}{hint}")
    try:
        values = nested_keys({key: plain(value) for key, value in config.items()})
        made = make_config(find_reference(COMMANDS[command].config), values, source=f"run({command!r})")
        result: dict[str, Any] = find_reference(COMMANDS[command].run)(made)
    except Exception as error:
        cause = find_cause(error)
        if isinstance(cause, RaytowerError) and cause is not error:
            raise cause from error
        raise
    return result
