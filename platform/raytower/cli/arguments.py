"""A command's arguments: which key each of them sets, and to what.

argparse takes the options that all commands share, positions and whatever is left; pydantic reads the values, by the
command's own config class. Libraries that do both from the class were tried on the same three commands, and change
what is said: pydantic-settings tears texts at `=`, `,` and backslashes wherever a mapping or a list is allowed,
jsonargparse loses the `name` of a chosen section, cyclopts has no sections to choose from, tyro makes subcommands of
them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import yaml

from raytower.cli.keys import Key, keys_of
from raytower.config import Config, Loader, describe_unknown, nested_keys, refuse_unknown_keys
from raytower.errors import InputError

_FLAGS = ("dry_run", "json", "help")
# What pydantic reads as true or false; 1 and 0 need `=`, since a position may be called so.
_TRUTHS = ("true", "false", "yes", "no", "on", "off")


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

    A list grows by every argument that names it; all else may be given once. Where no key is given by position, a list
    of texts takes several arguments (`--compare A B`).
    `--key value`, `--key=value`, `--section.key value`, `--section value` (its shorthand), `--switch`, `--no-switch`;
    dashes and underscores in names are the same. A mapping is written as JSON, or in braces as in a config file; a list
    as JSON, by one argument an item, or, of numbers, with commas.

    Raises:
        InputError: an unknown key (the nearest one is named), a key without a value, or an argument too many.
    """
    values = _Values(config_class, lists_take_all=not positions)
    parsed, unknown = _shared_parser(positions).parse_known_intermixed_args(values.take(given))
    if parsed.help:
        return Arguments(help=True)
    for argument in unknown:
        if argument.startswith("--"):
            name = argument[2:].partition("=")[0].replace("-", "_")
            refuse_unknown_keys(config_class, nested_keys({name: None}), "the command line")
            raise InputError(f"the command line: {describe_unknown(config_class, name)}")
        raise InputError(f"unexpected argument {argument!r}; keys are written --key VALUE")
    for key in positions:
        if (value := getattr(parsed, key)) is not None:
            values.set_by_position(key, value)
    return Arguments(parsed.config, nested_keys(values.said), parsed.dry_run, parsed.json)


def whole_parser(config_class: type[Config], positions: Sequence[str] = ()) -> argparse.ArgumentParser:
    """A parser with an option for every key, for completion to be written from."""
    parser = _shared_parser(positions)
    for key in keys_of(config_class):
        names = dict.fromkeys((f"--{key.path}", f"--{key.path.replace('_', '-')}"))
        if not any(name in parser._option_string_actions for name in names):
            words = (key.meaning or key.kind).replace("%", "%%")
            parser.add_argument(*names, dest=key.path, help=words, choices=key.choices or None)
    return parser


def _shared_parser(positions: Sequence[str]) -> argparse.ArgumentParser:
    parser = _Parser(prog="raytower", allow_abbrev=False, add_help=False)
    for key in positions:
        parser.add_argument(key, nargs="?", metavar=key.upper())
    parser.add_argument("--config", help="YAML or JSON with any of these keys")
    parser.add_argument("--dry-run", action="store_true", help="show the config and what would be done")
    parser.add_argument("--json", action="store_true", help="the result as one line of JSON")
    parser.add_argument("-h", "--help", action="store_true", help="list all keys")
    return parser


class _Values:
    """What is said of a config's keys, by dotted path.

    Args:
        config_class: the command's config.
        lists_take_all: whether a list of texts takes all arguments up to the next key (`--compare A B C`), which they
            may where none is meant by its position.
    """

    def __init__(self, config_class: type[Config], lists_take_all: bool = False) -> None:
        self._lists_take_all = lists_take_all
        self.said: dict[str, Any] = {}
        self._keys = {key.path: key for key in keys_of(config_class)}
        self._aliases = {
            f"{key.path}.{other}": f"{key.path}.{name}"
            for key in self._keys.values()
            for other, name in key.aliases.items()
        }

    def take(self, given: Sequence[str]) -> list[str]:
        """Take the config's keys out of `given`, each with its value; the rest comes back in order."""
        rest: list[str] = []
        waiting = list(given)
        while waiting:
            argument = waiting.pop(0)
            name, has_value, value = argument[2:].partition("=")
            path = name.replace("-", "_")
            if not argument.startswith("--"):
                rest.append(argument)
                continue
            if path in _FLAGS:
                rest.append(f"--{path.replace('_', '-')}{has_value}{value}")
                continue
            path = self._aliases.get(path, path)
            key, positive = self._keys.get(path), self._keys.get(path.removeprefix("no_"))
            if key is None and positive is not None and positive.is_switch and not has_value:
                self._set(positive, "false")
                continue
            if not has_value and waiting and _is_value(waiting[0], key):
                has_value, value = "=", waiting.pop(0)
            elif not has_value and key is not None and key.is_switch:
                has_value, value = "=", "true"
            if not has_value and (key is not None or path == "config"):
                raise InputError(f"--{name} has no value; write --{name} VALUE")
            if path == "config" and any(other.startswith("--config=") for other in rest):
                raise InputError(
                    "the command line: --config is given twice; give one file, and other keys by name"
                )
            if key is None:  # --config, or one that is unknown
                rest.append(f"--{path}={value}" if has_value else argument)
            else:
                self._set(key, value)
                while self._lists_take_all and key.kind.startswith("list of TEXT") and waiting:
                    if waiting[0].startswith("--"):
                        break
                    self._set(key, waiting.pop(0))
        return rest

    def set_by_position(self, path: str, value: str) -> None:
        """Raises InputError where the key is given by its name too."""
        key = self._keys[path]
        full = _full_path(key, value)
        if full in self.said:
            raise InputError(f"the command line: {full} is given by position and by name; give it once")
        self._set(key, value)

    def _set(self, key: Key, value: str) -> None:
        path = _full_path(key, value)
        read = _read(self._keys[path], value)
        before = self.said.get(path)
        if isinstance(before, list) and isinstance(read, list):
            read = before + read
        elif path in self.said:
            raise InputError(f"the command line: {path} is given twice; give it once")
        self.said[path] = read


def _is_value(argument: str, key: Key | None) -> bool:
    if key is not None and key.is_switch:
        return argument.lower() in _TRUTHS
    return not argument.startswith("--")


def _full_path(key: Key, value: str) -> str:
    """The key that `--section VALUE` means: the section itself where the value is JSON or null."""
    if not key.is_section or key.shorthand is None or value == "null" or _mapping(value) is not None:
        return key.path
    return f"{key.path}.{key.shorthand}"


def _read(key: Key, value: str) -> Any:
    """A value as pydantic is to see it: texts stay what was typed, mappings and lists are read."""
    if value == "null" and not key.is_text:
        return None
    if key.is_section or key.is_mapping:
        mapping = _mapping(value)
        return value if mapping is None else mapping
    if not key.kind.startswith("list of "):
        return value
    if value.lstrip().startswith("["):
        try:
            items = json.loads(value)
        except ValueError as error:
            raise InputError(
                f'the command line: {key.path} is {value!r}, which is no JSON list ({error}); write \'["a", "b"]\''
            ) from None
        return items
    return [value] if key.kind.startswith("list of TEXT") else value.split(",")


def _mapping(value: str) -> Mapping[str, Any] | None:
    try:
        read = json.loads(value, object_pairs_hook=_without_doubles)
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        read = _yaml_mapping(value)
    return read if isinstance(read, dict) else None


def _yaml_mapping(value: str) -> Any:
    """`{0: 1, 1: 5}`, as it stands in a config file; None for what is no such mapping."""
    if not value.lstrip().startswith("{"):
        return None
    try:
        return yaml.load(value, Loader)
    except InputError as error:
        raise InputError(f"the command line: {error}") from error
    except (yaml.YAMLError, ValueError, RecursionError):
        return None


def _without_doubles(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, of which Python would take the last of two equal keys."""
    read = dict(pairs)
    for key in read:
        if sum(other == key for other, _ in pairs) > 1:
            raise InputError(f"the command line: key {key!r} stands twice in a mapping; keep one of them")
    return read
