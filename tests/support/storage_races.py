"""Processes that write to one place at the same time, or hold its lease."""

from __future__ import annotations

import os
import subprocess
import sys

from raytower.runtime import worker_environment

RACE = (
    "import sys\nfrom raytower.storage import Location\n"
    "place = Location.of(sys.argv[1])\nprint('ready', flush=True)\nsys.stdin.readline()\n"
    "print(place.put_if_absent(sys.argv[2].encode() * 100_000), flush=True)\n"
)
HOLD = (
    "import sys\nfrom raytower.storage import Location, writer_lease\n"
    "with writer_lease(Location.of(sys.argv[1]), owner='first', seconds=float(sys.argv[2])):\n"
    "    print('held', flush=True)\n    sys.stdin.readline()\n"
)


def start(script: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", script, *arguments]
    environment = {**os.environ, **worker_environment()}
    return subprocess.Popen(
        command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=1
    )


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    return process.stdout.readline().strip()


def race(uri: str) -> list[str]:
    """What 8 processes that create one place at the same time say."""
    processes = [start(RACE, uri, str(number)) for number in range(8)]
    try:
        assert [line_of(process) for process in processes] == ["ready"] * 8
        for process in processes:
            assert process.stdin
            process.stdin.write("\n")
            process.stdin.flush()
        return [line_of(process) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
