"""Which tests `make quick` leaves out for their time: those of tests/slower.txt, which `make slower` measures anew.

A mark in the code would go stale in silence, and 400 of them would hide what a test is about.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest

LIST = Path(__file__).resolve().parents[1] / "slower.txt"
SECONDS = 0.1
_HEAD = (
    f"# Tests that took more than {SECONDS} seconds when `make slower` measured them last, with their fixtures.\n"
    "# `make quick` leaves them out; `make test` runs them.\n"
)


def without_parameters(node_id: str) -> str:
    """The name of a test function: `file::Class::test[a-b]` gives `file::Class::test`."""
    return node_id.split("[", 1)[0]


def listed(text: str) -> set[str]:
    """The names of a list, without its comments."""
    return {line for line in text.splitlines() if line and not line.startswith("#")}


class Recorder:
    """Adds up what each test took, and writes the list when the run ends. Takes the reports of all processes."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._seconds[report.nodeid] += report.duration

    def pytest_sessionfinish(self) -> None:
        slower = {without_parameters(name) for name, seconds in self._seconds.items() if seconds > SECONDS}
        LIST.write_text(_HEAD + "".join(f"{name}\n" for name in sorted(slower)), encoding="utf-8")
