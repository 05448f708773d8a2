"""`python -m raytower.cli.step GIVEN OUTCOME`: a step of a pipeline that runs several at once, in its own process.

GIVEN is a JSON file of job and config. OUTCOME gets the job's figures, or its error and the kind of that; the process
ends as the command itself would, and as by SIGTERM where the one that started it has gone.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from raytower.cli import run_work
from raytower.commands import COMMANDS, find_reference
from raytower.config import make_config
from raytower.errors import InputError, OtherOutputError, find_cause


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code."""
    given, outcome = map(Path, arguments)
    threading.Thread(target=_end_with_starter, daemon=True).start()

    def work() -> None:
        step = json.loads(given.read_text("utf-8"))
        command = COMMANDS[step["job"]]
        try:
            config = make_config(find_reference(command.config), step["config"], source=step["job"])
            figures = find_reference(command.run)(config)
        except Exception as error:
            cause = find_cause(error)
            kind = "failure"
            if isinstance(cause, InputError):
                kind = "other_output" if isinstance(cause, OtherOutputError) else "input"
            said = str(cause) or type(cause).__name__
            outcome.write_text(json.dumps({"error": said, "kind": kind}), "utf-8")
            raise
        outcome.write_text(json.dumps({"figures": figures}, default=str), "utf-8")

    return run_work(work)


def _end_with_starter() -> None:
    """Wait for the end of standard input, which the starter holds open; then ask this process to end."""
    # Not sys.stdin, whose lock would keep the interpreter from ending.
    while os.read(0, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
