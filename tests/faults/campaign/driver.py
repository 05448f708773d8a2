"""`raytower ARGUMENTS…` with a clock that the campaign sets: `python -m tests.faults.campaign.driver CLOCK ARGUMENTS…`.

The file CLOCK holds by how many seconds this process's time of day is off. SIGUSR1 has the stacks of all threads
written to standard error.
"""

from __future__ import annotations

import faulthandler
import signal
import sys
import time
from pathlib import Path


def set_clock(file: Path) -> None:
    """Have `time.time` and `time.time_ns` off by what `file` says at the moment; nothing where it is not there."""
    real, real_ns = time.time, time.time_ns

    def off_s() -> float:
        return float(file.read_text() or 0) if file.exists() else 0.0

    time.time = lambda: real() + off_s()
    time.time_ns = lambda: real_ns() + int(off_s() * 1e9)


def main() -> int:
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    set_clock(Path(sys.argv.pop(1)))
    from raytower.cli import main

    return main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
