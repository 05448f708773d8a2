"""A command's arguments, read by pydantic-settings over the command's own config class.

pydantic-settings makes an argparse parser of the class and gives back only what was said, as nested keys, so that a
config file can lie below it and everything is validated once. Tried on the same three commands: jsonargparse loses the
`name` of a chosen section, cyclopts has no sections to choose from, and tyro makes subcommands of them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn

from pydantic_settings import BaseSettings, CliSettingsSource, SettingsError

from raytower.cli.keys import Key, keys_of
from raytower.config import Config, describe_unknown, lay_over, nested_keys, refuse_unknown_keys
from raytower.errors import InputError

# Stands for null in what pydantic-settings reads: a text key may hold the word itself.
_NULL = "\0null"
POSITION = "position:"
_COMMON = ("config", "dry_run", "json", "help")


@dataclass(frozen=True)
class Arguments:
    """What a command line says."""

    config_path: str | None = None
    overrides: dict[str, Any] = field(default_factory=dict)
    """Nested keys to values or their texts."""
    dry_run: bool = False
    as_json: bool = False
    help: bool = False


class _Parser(argparse.ArgumentParser):
    """Says what is wrong by InputError rather than by ending the process."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"the command line: {message}; --help lists the keys")


def read_arguments(config_class: type[Config], positions: Sequence[str], given: Sequence[str]) -> Arguments:
    """Read `given`; `positions` are keys that may be given by position, without their names.

    `--key value`, `--key=value`, `--section.key value`, `--section value` (its shorthand), `--switch`, `--no-switch`;
    dashes and underscores in names are the same.

    Raises:
        InputError: an unknown key (the nearest one is named), a key without a value, or an argument too many.
    """
    parser, source = make_parser(config_class, positions)
    keys = {key.path: key for key in keys_of(config_class)}
    mappings: dict[str, Any] = {}
    parsed, unknown = parser.parse_known_intermixed_args(_written_out(keys, given, mappings))
    said = vars(parsed)
    common = {name: said.pop(name) for name in _COMMON}
    if common["help"]:
        return Arguments(help=True)
    for argument in unknown:
        if argument.startswith("--"):
            name = argument[2:].partition("=")[0].replace("-", "_")
            refuse_unknown_keys(config_class, nested_keys({name: None}), "the command line")
            raise InputError(f"the command line: {describe_unknown(config_class, name)}")
        raise InputError(f"unexpected argument {argument!r}; keys are written --key VALUE")
    by_position = {key: value for key in positions if (value := said.pop(POSITION + key)) is not None}
    try:
        overrides = source(parsed_args=said)()
    except (SettingsError, ValueError) as error:
        raise InputError(f"the command line: {error}; a list or a mapping is written as JSON") from error
    twice = by_position.keys() & overrides.keys()
    if twice:
        raise InputError(f"the command line: {min(twice)} is given by position and by name; give it once")
    overrides = lay_over(config_class, overrides, nested_keys(mappings)) | by_position
    return Arguments(common["config"], overrides, common["dry_run"], common["json"])


def make_parser(
    config_class: type[Config], positions: Sequence[str] = ()
) -> tuple[argparse.ArgumentParser, CliSettingsSource[Any]]:
    """The parser of a command's arguments, and the source that turns what it parsed into nested keys."""
    parser = _Parser(prog="raytower", allow_abbrev=False, add_help=False)
    for key in positions:
        parser.add_argument(POSITION + key, nargs="?", metavar=key.upper())
    parser.add_argument("--config")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("-h", "--help", action="store_true")
    settings = type(config_class.__name__, (config_class, BaseSettings), {"__module__": __name__})
    source: CliSettingsSource[Any] = CliSettingsSource(
        settings,
        root_parser=parser,
        cli_parse_none_str=_NULL,
        add_argument_method=_add_argument,
        parse_args_method=partial(argparse.ArgumentParser.parse_args),
    )
    return parser, source


def _add_argument(parser: Any, *names: str, **options: Any) -> Any:
    """`-k` is `--k` too, and `--max-length` is `--max_length`; what is required is the config's to say."""
    every = [name if name.startswith("--") or len(name) > 2 else f"-{name}" for name in names]
    every += [name.replace("_", "-") for name in every if "_" in name]
    return parser.add_argument(*dict.fromkeys((*names, *every)), **options)


def _written_out(keys: dict[str, Key], given: Sequence[str], mappings: dict[str, Any]) -> list[str]:
    """Every key with its value in one argument, switches with true or false, and a section's shorthand by its name.

    Keys that hold mappings go into `mappings` with their values: pydantic-settings would take the SQL text `a = 1` for
    the mapping of a to 1.
    """
    written: list[str] = []
    waiting = list(given)
    aliases = {
        f"{key.path}.{other}": f"{key.path}.{name}"
        for key in keys.values()
        for other, name in key.aliases.items()
    }
    while waiting:
        argument = waiting.pop(0)
        if not argument.startswith("--") or argument in ("--dry-run", "--json", "--help"):
            written.append(argument)
            continue
        name, has_value, value = argument[2:].partition("=")
        path = name.replace("-", "_")
        path = aliases.get(path, path)
        key, positive = keys.get(path), keys.get(path.removeprefix("no_"))
        if key is None and positive is not None and positive.is_switch and not has_value:
            written.append(f"--{positive.path}=false")
            continue
        if not has_value and waiting and _is_value(waiting[0], key):
            has_value, value = "=", waiting.pop(0)
        elif not has_value and key is not None and key.is_switch:
            has_value, value = "=", "true"
        if not has_value:
            if key is None and path != "config":
                written.append(argument)  # unknown, which is said before that it has no value
                continue
            raise InputError(f"--{name} has no value; write --{name} VALUE")
        if key is not None and key.is_mapping:
            mappings[path] = _read_mapping(value)
            continue
        written.append(f"--{_full_path(path, key, value)}={_read_null(key, value)}")
    return written


def _is_value(argument: str, key: Key | None) -> bool:
    if key is not None and key.is_switch:
        return argument in ("true", "false")
    return not argument.startswith("--")


def _full_path(path: str, key: Key | None, value: str) -> str:
    """The key that `--section VALUE` means: the section itself where the value is JSON or null."""
    if key is None or not key.is_section or key.shorthand is None or value == "null" or _is_mapping(value):
        return path
    return f"{path}.{key.shorthand}"


def _read_mapping(value: str) -> Any:
    """A mapping or null where the value is one in JSON; else the text, which the config takes or refuses."""
    return None if value == "null" else json.loads(value) if _is_mapping(value) else value


def _is_mapping(value: str) -> bool:
    try:
        return isinstance(json.loads(value), dict)
    except ValueError:
        return False


def _read_null(key: Key | None, value: str) -> str:
    return _NULL if value == "null" and not (key is not None and key.is_text) else value
