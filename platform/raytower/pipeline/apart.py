"""Steps in processes of their own, which end with this one; the other end is `raytower.cli.step`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from raytower.config import Config
from raytower.ending import INTERRUPTED, TERMINATED
from raytower.errors import InputError, OtherOutputError, RaytowerError
from raytower.progress import log

_ENTRY = "raytower.cli.step"
_SOURCE_ROOT = str(Path(__file__).resolve().parents[2])
# What a step has written last is shown this long after its end.
_LATE_SECONDS = 5.0
_ERRORS: dict[str, type[RaytowerError]] = {
    "other_output": OtherOutputError,
    "input": InputError,
    "failure": RaytowerError,
}


class Processes:
    """Runs jobs in processes of their own, from any threads, until `stop` is called."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[str]] = set()
        self._is_over = False
        self._lock = threading.Lock()

    def run(self, job: str, config: Config, title: str) -> dict[str, Any]:
        """Run a job and return its figures. Lines that it writes are shown behind `title`.

        Raises:
            OtherOutputError, InputError, RaytowerError: as the job has, which tells its message; a process that ended
                without a word is a RaytowerError.
        """
        with tempfile.TemporaryDirectory(prefix="raytower-step-") as folder:
            given, outcome = Path(folder) / "step.json", Path(folder) / "outcome.json"
            # Jobs may tell what was set from what is so by default.
            step = {"job": job, "config": config.model_dump(mode="json", exclude_unset=True)}
            given.write_text(json.dumps(step), "utf-8")
            code = self._run([str(given), str(outcome)], title)
            said = json.loads(outcome.read_text("utf-8")) if outcome.is_file() else {}
        if code == 0:
            figures: dict[str, Any] = said["figures"]
            return figures
        if "error" in said:
            raise _ERRORS[said["kind"]](f"{title}: {said['error']}")
        raise RaytowerError(
            f"{title}: its process {_how_ended(code)}; run the pipeline again, the step goes on where it was"
        )

    def stop(self) -> None:
        """Have all processes end as by SIGTERM, and start no more. `run` then returns or raises within their grace."""
        with self._lock:
            self._is_over = True
            for process in self._running:
                process.terminate()

    def _run(self, arguments: list[str], title: str) -> int:
        """The exit code of the entry with these arguments."""
        process = self._start(arguments)
        # A process that it has left behind may hold its output open for ever, so that its end is not waited for.
        shown = threading.Thread(target=_show, args=(process, title), daemon=True)
        shown.start()
        try:
            code = process.wait()
            shown.join(_LATE_SECONDS)
            return code
        finally:
            with self._lock:
                self._running.discard(process)
            assert process.stdin is not None
            process.stdin.close()

    def _start(self, arguments: list[str]) -> subprocess.Popen[str]:
        with self._lock:
            if self._is_over:
                raise RaytowerError("the pipeline is ending; no more steps are started")
            # -P: a file in the folder where the pipeline runs must not stand in for a module.
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", _ENTRY, *arguments],
                env={**os.environ, "PYTHONPATH": _with_source_root(os.environ.get("PYTHONPATH"))},
                # Held open and never written to: its end tells the step that this process has gone.
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                encoding="utf-8",
                errors="backslashreplace",
            )
            self._running.add(process)
            return process


def _show(process: subprocess.Popen[str], title: str) -> None:
    """Show what a process writes, behind the title of its step."""
    assert process.stdout is not None
    for line in process.stdout:
        log(f"{title}: {line.rstrip()}")


def _with_source_root(paths: str | None) -> str:
    """So that a checkout needs no install."""
    return os.pathsep.join(dict.fromkeys([_SOURCE_ROOT, *filter(None, (paths or "").split(os.pathsep))]))


def _how_ended(code: int) -> str:
    if code < 0:
        return f"was ended by signal {-code}" + (", perhaps for want of memory" if code == -9 else "")
    return "was ended by a signal" if code in (INTERRUPTED, TERMINATED) else f"ended with exit code {code}"
