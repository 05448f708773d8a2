"""Faults in running jobs, drawn by a seed: `python -m tests.faults.campaign --seed 0 --injections 40`.

Each injection puts one fault of plan.KINDS into one run of a job when a share of it, drawn too, is done, as its own
files and lines say. The job, or where it has ended the same command once more, must end with the undisturbed run's
output, read by other libraries; a failure must be one message; everything must end within a deadline, and no process
may be left. A line for each injection goes to standard output, then a table; exit code 1 if any is not whole.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from raytower import ending
from tests.faults.campaign.plan import SENSIBLE, draw, prepare_environment
from tests.faults.campaign.report import table


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.campaign", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="draws jobs, kinds and moments")
    parser.add_argument("--injections", type=int, default=40, help="how many there are")
    parser.add_argument("--only", nargs="*", default=[], metavar="KIND/JOB", help="pairs, kinds or jobs")
    parser.add_argument(
        "--jobs", nargs="*", default=[], help="of the injections drawn, those of these jobs alone"
    )
    parser.add_argument("--list", action="store_true", help="say what would be done, and stop")
    given = parser.parse_args()
    try:
        injections = draw(given.seed, given.injections, given.only)
    except ValueError as error:
        parser.error(str(error))
    injections = [item for item in injections if item.job in (given.jobs or SENSIBLE)]
    if given.list:
        print("\n".join(f"{item.name} at {item.moment:.0%}, way {item.way}" for item in injections))
        return 0
    prepare_environment()
    from tests.faults.campaign.campaign import run_all  # what it imports reads the environment

    signal.signal(signal.SIGTERM, ending.raise_terminated)  # else what it has started would outlive it
    folder = Path(tempfile.mkdtemp(prefix="campaign-"))
    began = time.monotonic()
    outcomes = run_all(injections, given.seed, folder)
    print(
        f"\nseed {given.seed}, {time.monotonic() - began:.0f} s, {os.cpu_count()} cores\n\n{table(outcomes)}"
    )
    if all(item.is_whole for item in outcomes):
        shutil.rmtree(folder, ignore_errors=True)
        return 0
    print(f"\nlogs of what is not whole lie in {folder}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
