"""The command line: one table of commands, one way to run each of them.

`raytower NAME --config FILE --section.key value --dry-run`; jobs/*.py call `run_command` with the same names.
Results go to stdout, the last line of a job being one JSON object; progress goes to stderr.
Exit codes: 0 done, 2 bad input or configuration, 1 failure, 130 ended by Ctrl-C, 143 ended by SIGTERM.
"""

from __future__ import annotations

import json
import signal
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raytower import __version__
from raytower.commands import COMMANDS, Command, find_reference
from raytower.config import Config, dump_config, load_config, nested_configs, parse_overrides, to_json
from raytower.ending import INTERRUPTED, TERMINATED, bounded_ending
from raytower.errors import InputError, RaytowerError, find_cause


@dataclass(frozen=True)
class _Arguments:
    config_path: str | None
    overrides: dict[str, Any]
    dry_run: bool
    as_json: bool


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `raytower`; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0 if given else 2
    if given[0] == "--version":
        print(f"raytower {__version__}")
        return 0
    name, rest = given[0], given[1:]
    if name == "index" and rest and not rest[0].startswith("-"):
        name, rest = f"index {rest[0]}", rest[1:]
    if name not in COMMANDS:
        print(f"raytower: no command {name!r}; `raytower --help` lists them", file=sys.stderr)
        return 2
    return run_command(name, rest)


def run_command(name: str, arguments: Sequence[str] | None = None, default_config: Path | None = None) -> int:
    """Run one command with its arguments (default: the process's) and return the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    command = COMMANDS[name]
    if "-h" in given or "--help" in given:
        print(_command_help(name, command))
        return 0
    try:
        with bounded_ending():
            return _execute(command, _parse(_decode(given), default_config))
    except (KeyboardInterrupt, SystemExit) as end:
        # While it starts, Ray answers SIGTERM by SystemExit(15); while it trains, Ctrl-C by SystemExit(0).
        if isinstance(end, SystemExit) and end.code in (TERMINATED, signal.SIGTERM):
            print("raytower: ended by SIGTERM", file=sys.stderr)
            return TERMINATED
        print("raytower: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        return _explain(error)


def _execute(command: Command, arguments: _Arguments) -> int:
    config = load_config(find_reference(command.config), arguments.config_path, arguments.overrides)
    if arguments.dry_run:
        plan = find_reference(command.plan)(config) if command.plan else {}
        _show(dump_config(config).rstrip("\n"))
        _show_json({"plan": plan})
        return 0
    result = find_reference(command.run)(config)
    if command.render and not arguments.as_json:
        _show(find_reference(command.render)(result))
    else:
        _show_json(result)
    return 0


def _show_json(value: Any) -> None:
    """One line of JSON, with escapes for what the terminal's encoding (GBK, ASCII) does not have."""
    text = to_json(value)
    _show(text if _holds(text) else json.dumps(json.loads(text)))


def _show(text: str) -> None:
    """Print `text`; characters that the terminal's encoding does not have are shown by their codes."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text if _holds(text) else text.encode(encoding, errors="backslashreplace").decode(encoding))


def _holds(text: str) -> bool:
    """Whether standard output can carry `text`."""
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _explain(error: Exception) -> int:
    """Say what went wrong: one message for the user's mistakes, the traceback for ours."""
    cause = find_cause(error)
    if isinstance(cause, InputError):
        print(f"raytower: {cause}", file=sys.stderr)
        return 2
    if isinstance(cause, RaytowerError):
        print(f"raytower: {cause}", file=sys.stderr)
        return 1
    traceback.print_exception(error)
    return 1


def _decode(given: list[str]) -> list[str]:
    """The arguments as UTF-8, whatever the locale; Python keeps bytes that it cannot decode as lone surrogates."""
    decoded = []
    for argument in given:
        raw = argument.encode("utf-8", "surrogateescape")
        try:
            decoded.append(raw.decode("utf-8"))
        except UnicodeError:
            raise InputError(
                f"the argument {raw.decode('utf-8', errors='backslashreplace')} is not valid UTF-8; "
                "set the terminal to "
                "UTF-8, rename a file whose name is in another encoding (GBK, say), or give a text in a --config file"
            ) from None
    return decoded


def _parse(given: list[str], default_config: Path | None) -> _Arguments:
    config_path = str(default_config) if default_config else None
    rest: list[str] = []
    dry_run = as_json = False
    position = 0
    while position < len(given):
        argument = given[position]
        if argument == "--dry-run":
            dry_run = True
        elif argument == "--json":
            as_json = True
        elif argument == "--config" or argument.startswith("--config="):
            _, equals, value = argument.partition("=")
            if not equals:
                position += 1
                if position >= len(given):
                    raise InputError("--config has no value; write --config FILE.yaml")
                value = given[position]
            config_path = value
        elif argument in ("--full", "--keep-serving") and _is_switch(given, position):
            rest.append(f"{argument}=true")
        else:
            rest.append(argument)
            if argument.startswith("--") and "=" not in argument and position + 1 < len(given):
                position += 1
                rest.append(given[position])
        position += 1
    return _Arguments(config_path, parse_overrides(rest), dry_run, as_json)


def _is_switch(given: list[str], position: int) -> bool:
    """Whether `--flag` stands alone rather than with true or false behind it."""
    return position + 1 >= len(given) or given[position + 1] not in ("true", "false")


def _usage() -> str:
    width = max(len(name) for name in COMMANDS)
    lines = [f"  raytower {name:<{width}}  {command.help}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            f"raytower {__version__}: semantic retrieval on Ray",
            "",
            *lines,
            "",
            "Every command takes --config FILE.yaml, overrides --section.key VALUE, --dry-run and --help.",
        ]
    )


def _command_help(name: str, command: Command) -> str:
    config_class: type[Config] = find_reference(command.config)
    lines = [f"raytower {name}: {command.help}", "", "Keys (--key VALUE, or in the file of --config):"]
    lines += [f"  {line}" for line in _describe_keys(config_class)]
    return "\n".join(lines)


def _describe_keys(config_class: type[Config], prefix: str = "") -> list[str]:
    lines = []
    for key, field in config_class.model_fields.items():
        nested = nested_configs(field.annotation)
        default = field.get_default(call_default_factory=True, validated_data={})
        if len(nested) > 1:
            lines += _describe_choice(nested, default, f"{prefix}{key}.")
        elif nested:
            if not field.is_required() and default is None:
                lines.append(f"{prefix}{key}  (default null, or the keys below)")
            lines += _describe_keys(nested[0], f"{prefix}{key}.")
        elif field.is_required():
            lines.append(f"{prefix}{key}  (required)")
        else:
            lines.append(f"{prefix}{key}  (default {to_json(default)})")
    return lines


def _describe_choice(choices: Sequence[type[Config]], default: Any, prefix: str) -> list[str]:
    """The keys of a part whose `name` chooses what it is."""
    lines = [f"{prefix}name  (default {to_json(getattr(default, 'name', None))}), one of"]
    for choice in choices:
        keys = [line.removeprefix(prefix) for line in _describe_keys(choice, prefix)]
        name = choice.model_fields["name"].default
        others = ", ".join(key for key in keys if not key.startswith("name "))
        lines.append(f"    {name}: {others}" if others else f"    {name}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
