"""Commands about commands: an example config to start from, and completion for a shell."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import shtab

from raytower.cli.arguments import whole_parser
from raytower.cli.starting import starting_config
from raytower.commands import COMMANDS, Command, find_reference
from raytower.errors import InputError
from raytower.examples import EXAMPLES

# Keys whose values are files or folders.
_PLACES = {
    *(
        "config",
        "path",
        "input",
        "output",
        "queries",
        "train",
        "corpus",
        "labels",
        "state",
        "log_dir",
        "work_dir",
    ),
    *("model", "init_from", "encoder", "reranker", "teacher", "classifier", "embeddings", "index"),
}


@dataclass(frozen=True)
class About:
    """A command that answers from the table of commands alone."""

    help: str
    tell: Callable[[Sequence[str]], str]


def _tell_config(given: Sequence[str]) -> str:
    name = " ".join(given)
    if name not in EXAMPLES:
        raise InputError(f"config needs a command's name, not {name!r}; there are {', '.join(EXAMPLES)}")
    return starting_config(name).rstrip("\n")


def _tell_completion(given: Sequence[str]) -> str:
    if len(given) != 1 or given[0] not in shtab.SUPPORTED_SHELLS:
        raise InputError(
            f"completion needs a shell, not {' '.join(given)!r}; there are {', '.join(shtab.SUPPORTED_SHELLS)}"
        )
    return str(shtab.complete(_whole_parser(), given[0]))


def _whole_parser() -> argparse.ArgumentParser:
    """One parser of all commands, with groups such as `index` as commands of commands."""
    root = argparse.ArgumentParser(prog="raytower")
    commands = root.add_subparsers()
    groups: dict[str, argparse._SubParsersAction[argparse.ArgumentParser]] = {}
    for name, command in COMMANDS.items():
        *group, last = name.split(" ")
        if group and group[0] not in groups:
            groups[group[0]] = commands.add_parser(group[0], help=f"{group[0]} commands").add_subparsers()
        place = groups[group[0]] if group else commands
        parser = _completed_parser(command)
        place.add_parser(last, help=command.help, parents=[parser], add_help=False)
    for name in ABOUT:
        commands.add_parser(name, help=ABOUT[name].help)
    return root


def _completed_parser(command: Command) -> argparse.ArgumentParser:
    """A command's parser that offers choices where there are some, and files where a place is named."""
    parser = whole_parser(find_reference(command.config), command.positions)
    for action in parser._actions:
        if action.dest.rpartition(".")[2] in _PLACES:
            action.complete = shtab.FILE  # type: ignore[attr-defined] # read by shtab
    return parser


ABOUT: dict[str, About] = {
    "config": About("print a command's config to start from, with the meaning of every key", _tell_config),
    "completion": About("print completion for a shell: bash, zsh, fish or tcsh", _tell_completion),
}
