"""Commands about commands: an example config to start from, and completion for a shell."""

from __future__ import annotations

import argparse
import textwrap
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
    takes: str
    """Its argument, and what that may be."""

    def explain(self, name: str) -> str:
        """What `raytower NAME --help` says."""
        words = textwrap.wrap(f"{self.takes}.", 100, initial_indent="  ", subsequent_indent="  ")
        return "\n".join(
            [f"raytower {name} {self.takes.partition(' ')[0]}", "", f"  {self.help}", "", *words]
        )


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
    """One parser of all commands, and of the commands about them."""
    root = argparse.ArgumentParser(prog="raytower")
    commands = root.add_subparsers()
    _add_commands(commands, lambda command: [_completed_parser(command)])
    config = commands.add_parser("config", help=ABOUT["config"].help)
    _add_commands(config.add_subparsers(), lambda _: [])
    completion = commands.add_parser("completion", help=ABOUT["completion"].help)
    completion.add_argument("shell", choices=shtab.SUPPORTED_SHELLS)
    return root


def _add_commands(
    place: argparse._SubParsersAction[argparse.ArgumentParser],
    options: Callable[[Command], list[argparse.ArgumentParser]],
) -> None:
    """Every command with its options; groups such as `index` are commands of commands, and `serve` is both."""
    parsers: dict[str, argparse.ArgumentParser] = {}
    groups: dict[str, argparse._SubParsersAction[argparse.ArgumentParser]] = {}
    for name, command in COMMANDS.items():
        *group, last = name.split(" ")
        if group and group[0] not in groups:
            parser = parsers.get(group[0]) or place.add_parser(group[0], help=f"{group[0]} commands")
            groups[group[0]] = parser.add_subparsers()
        where = groups[group[0]] if group else place
        parsers[name] = where.add_parser(last, help=command.help, parents=options(command), add_help=False)


def _completed_parser(command: Command) -> argparse.ArgumentParser:
    """A command's parser that offers choices where there are some, and files where a place is named."""
    parser = whole_parser(find_reference(command.config), command.positions)
    for action in parser._actions:
        if action.dest.rpartition(".")[2] in _PLACES:
            action.complete = shtab.FILE  # type: ignore[attr-defined] # read by shtab
    return parser


ABOUT: dict[str, About] = {
    "config": About(
        "print a command's config to start from, with the meaning of every key",
        _tell_config,
        f"COMMAND is one of {', '.join(EXAMPLES)}",
    ),
    "completion": About(
        "print completion for a shell, to be read by it",
        _tell_completion,
        f"SHELL is one of {', '.join(shtab.SUPPORTED_SHELLS)}",
    ),
}
