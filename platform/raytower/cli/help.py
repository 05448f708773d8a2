"""What `--help` says: the list of commands, and a command's keys with meaning, type, choices and default."""

from __future__ import annotations

import difflib
import shutil
import textwrap
from collections.abc import Iterator, Sequence

from raytower import __version__
from raytower.cli.about import ABOUT
from raytower.cli.keys import Key, keys_of
from raytower.commands import COMMANDS, find_reference

_COMMON = """\
  --config FILE   YAML or JSON with any of these keys; what stands on the command line goes before
  --dry-run       show the whole config and what would be done, and do nothing
  --json          the result as one line of JSON, as where the output is no terminal
"""


def usage(group: str = "") -> str:
    """All commands, or those of a group such as `index`, a line each."""
    names = names_below(group) if group else list(COMMANDS)
    width = max(map(len, [*names, *ABOUT]))
    lines = [f"  raytower {name:<{width}}  {COMMANDS[name].help}" for name in names]
    if not group:
        lines += [""]
        lines += [f"  raytower {name:<{width}}  {about.help}" for name, about in ABOUT.items()]
    return "\n".join(
        [
            f"raytower {__version__}: semantic retrieval on Ray",
            "",
            *lines,
            "",
            "`raytower COMMAND --help` lists a command's keys; every command takes --config FILE and --dry-run.",
        ]
    )


def names_below(group: str) -> list[str]:
    """The commands whose first word is `group`."""
    return [name for name in COMMANDS if name.startswith(f"{group} ")]


def describe_unknown_command(name: str, rest: Sequence[str]) -> str:
    """What is said of a command that there is not, with the nearest one that there is."""
    given = " ".join([name, *rest[:1]]) if names_below(name) and rest else name
    nearest = difflib.get_close_matches(given, [*COMMANDS, *ABOUT], n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    return f"no command {given!r}; {hint}`raytower --help` lists them"


def command_help(name: str) -> str:
    """What a command does, how it is written, and its keys."""
    command = COMMANDS[name]
    width = min(max(shutil.get_terminal_size((100, 24)).columns, 40), 110)
    positions = "".join(f" [{key.upper()}]" for key in command.positions)
    lines = [f"raytower {name}{positions} [--key VALUE …]", "", f"  {command.help}", ""]
    if command.example:
        lines += [f"  example: raytower {name} {command.example}", ""]
    lines += ["Keys:"]
    for key in keys_of(find_reference(command.config)):
        lines += _describe(key, width)
    return "\n".join([*lines, "", "Besides:", _COMMON.rstrip("\n")])


def _describe(key: Key, width: int) -> Iterator[str]:
    chosen = f"{key.chosen_by}: " if key.chosen_by else ""
    default = "required" if key.default is None else f"default {key.default}"
    if key.is_section:
        short = f", or a single value for {key.shorthand}" if key.shorthand else ""
        yield f"  --{key.path}  (the keys below{short}; {default})"
    else:
        yield f"  --{key.path} {key.kind}  ({default})"
    if chosen or key.meaning:
        yield from textwrap.wrap(
            f"{chosen}{key.meaning}", width, initial_indent=" " * 8, subsequent_indent=" " * 8
        )
