"""The command line: one table of commands, one way to run each of them.

`raytower NAME --config FILE --section.key value --dry-run`; jobs/*.py call `run_command` with the same names.
Results go to stdout: tables on a terminal, elsewhere and with --json one JSON object as the last line. Progress goes
to stderr.
Exit codes: 0 done, 2 bad input or configuration, 1 failure, 130 ended by Ctrl-C, 143 ended by SIGTERM.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from raytower import __version__, escapes
from raytower.cli import help
from raytower.cli.about import ABOUT
from raytower.cli.arguments import read_arguments
from raytower.collecting import nothing_is_garbage
from raytower.commands import COMMANDS, find_reference
from raytower.config import Config, dump_config, load_config, to_json
from raytower.ending import INTERRUPTED, TERMINATED, bounded_ending, signal_code
from raytower.errors import EndedJobError, InputError, RaytowerError, find_cause
from raytower.worker_output import OUTPUT

# What a shell makes of SIGPIPE.
_CLOSED_PIPE = 141
_OUTPUT_REMEDY = "the result goes there: lead it into a file on a disk with space left, or to /dev/null"


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `raytower`; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        return run_work(lambda: _show(help.usage())) or (0 if given else 2)
    if given[0] == "--version":
        return run_work(lambda: _show(f"raytower {__version__}"))
    if given[0] == "help":
        return main([*given[1:], "--help"])
    if given[0] in ABOUT:
        about = ABOUT[given[0]]
        asks = {"-h", "--help"} & set(given[1:])
        return run_work(lambda: _show(about.explain(given[0]) if asks else about.tell(given[1:])))
    name, rest = _split_name(given)
    if name in COMMANDS:
        return run_command(name, rest)
    if help.names_below(name) and (not rest or rest[0] in ("-h", "--help")):
        return run_work(lambda: _show(help.usage(name))) or (0 if rest else 2)
    print(f"raytower: {help.describe_unknown_command(name, rest)}", file=sys.stderr)
    return 2


def _split_name(given: Sequence[str]) -> tuple[str, list[str]]:
    """The command's name, which may have two words, and its arguments."""
    for words in (2, 1):
        name = " ".join(given[:words])
        if name in COMMANDS:
            return name, list(given[words:])
    return given[0], list(given[1:])


def run_command(name: str, arguments: Sequence[str] | None = None, default_config: Path | None = None) -> int:
    """Run one command with its arguments (default: the process's) and return the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    return run_work(lambda: _execute(name, _decode(given), default_config))


def run_work(work: Callable[[], None]) -> int:
    """Do `work` and return the exit code; what it raises is said on stderr."""
    OUTPUT.begin()
    if sys.stderr is None:  # closed by whoever started us, who wants to hear nothing
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - for the rest of the process
    try:
        with bounded_ending():
            if sys.stdout is None:
                raise RaytowerError(f"standard output is closed; {_OUTPUT_REMEDY}")
            work()
            _write("")
    except BrokenPipeError:
        # Whoever read has seen enough (`| head`).
        _abandon_output()
        return _CLOSED_PIPE
    except (KeyboardInterrupt, SystemExit) as end:
        return _say_end(signal_code() or _code_of(end))
    except Exception as error:
        # What a signal ends fails in ways of its own: its processes may have got the signal too.
        code = signal_code()
        return _explain(error) if code is None else _say_end(code)
    return 0


def _code_of(end: BaseException) -> int:
    """The exit code of what ends a command by a signal that `bounded_ending` was not told of.

    While it starts, Ray answers SIGTERM by SystemExit(15); while it trains, Ctrl-C by SystemExit(0).
    """
    is_sigterm = isinstance(end, SystemExit) and end.code in (TERMINATED, signal.SIGTERM)
    return TERMINATED if is_sigterm else INTERRUPTED


def _say_end(code: int) -> int:
    print("raytower: ended by SIGTERM" if code == TERMINATED else "raytower: interrupted", file=sys.stderr)
    return code


def _write(text: str) -> None:
    """Write `text` and what was printed before. Raises RaytowerError where standard output takes nothing more."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        _abandon_output()
        raise RaytowerError(
            f"standard output cannot be written: {error.strerror or error}; {_OUTPUT_REMEDY}"
        ) from error


def _abandon_output() -> None:
    """Have what is left to be flushed at exit go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _execute(name: str, given: Sequence[str], default_config: Path | None) -> None:
    command = COMMANDS[name]
    config_class: type[Config] = find_reference(command.config)
    own = find_reference(command.part)(given) if command.part else given
    arguments = read_arguments(config_class, command.positions, own)
    if arguments.help:
        _show(help.command_help(name))
        return
    path = default_config if arguments.config_path is None else arguments.config_path
    config = load_config(config_class, path, arguments.overrides)
    if arguments.dry_run:
        plan = _imported(command.plan)(config) if command.plan else {}
        _show(escapes.lines(dump_config(config).rstrip("\n")))
        _show_json({"plan": plan})
        return
    result = _imported(command.run)(config)
    if arguments.as_json or not (command.always_rendered or sys.stdout.isatty()):
        _show_json(result)
    else:
        render = find_reference(command.render or "raytower.cli.tables:render_result")
        _show(render(result))


def _imported(reference: str) -> Callable[[Config], Any]:
    """What a command does, with all the libraries that it needs."""
    with nothing_is_garbage():
        function: Callable[[Config], Any] = find_reference(reference)
    return function


def _show_json(value: Any) -> None:
    """One line of JSON, with escapes for what the terminal's encoding (GBK, ASCII) does not have."""
    text = to_json(value)
    _show(escapes.in_json(text) if _holds(text) else json.dumps(json.loads(text)))


def _show(text: str) -> None:
    """Print `text`; characters that the terminal's encoding does not have are shown by their codes."""
    encoding = sys.stdout.encoding or "utf-8"
    shown = text if _holds(text) else text.encode(encoding, errors="backslashreplace").decode(encoding)
    _write(f"{shown}\n")


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
        print(f"raytower: {escapes.lines(str(cause))}", file=sys.stderr)
        return 2
    if isinstance(cause, RaytowerError):
        print(f"raytower: {escapes.lines(str(cause))}", file=sys.stderr)
    else:
        # Lines of the traceback may quote a document.
        print(escapes.lines("".join(traceback.format_exception(error))), end="", file=sys.stderr)
    kept = OUTPUT.keep()
    if kept is not None:
        print(f"raytower: what Ray and its workers wrote is in {kept}", file=sys.stderr)
    return cause.exit_code if isinstance(cause, EndedJobError) else 1


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
