"""`raytower ARGUMENTS…` with a clock that the campaign sets: `python -m tests.faults.campaign.driver CLOCK ARGUMENTS…`.

The file CLOCK holds by how many seconds the time of day is off where leases read it, which nothing else decides by.
SIGUSR1 has the stacks of all threads written to standard error.
"""

from __future__ import annotations

import faulthandler
import signal
import sys
import time
from pathlib import Path

from raytower.storage import lease


class Clock:
    """In place of the module `time`."""

    monotonic, sleep = staticmethod(time.monotonic), staticmethod(time.sleep)

    def __init__(self, file: Path) -> None:
        self._file = file

    def time(self) -> float:
        return time.time() + (float(self._file.read_text() or 0) if self._file.exists() else 0.0)


def main() -> int:
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    # Not `time.time` itself: Ray pickles functions that refer to it.
    lease.time = Clock(Path(sys.argv.pop(1)))  # type: ignore[assignment]
    from raytower.cli import main

    return main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
