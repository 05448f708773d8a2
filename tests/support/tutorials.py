"""Tutorials as their readers type them: blocks of a shell that are marked to run, and what the page says they print.

A block is marked by a comment on the line above it: `<!-- run -->` has it run; `<!-- run: 2 -->` has its last command
end with this exit code; `<!-- plan -->` has trainings check and plan all that they would do, without training. A block
of text or JSON behind it shows what it prints, or a part of that, with `…` for what differs between machines.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.typed_commands import TRAININGS, Line, Typist

_STEP = re.compile(
    r"^<!-- (?P<mark>run|plan)(?:: (?P<code>\d+))? -->\n```sh\n(?P<typed>.*?)^```$"
    r"(?:\n\n```(?P<kind>text|json)\n(?P<shown>.*?)^```$)?",
    re.MULTILINE | re.DOTALL,
)
_ANY = "…"
# What need not be the same to the letter.
_LOOSE = re.compile(rf"{_ANY}|\d+\.\d+")


@dataclass(frozen=True)
class Step:
    """A block that is typed, and what is shown behind it."""

    lines: list[Line]
    is_planned: bool = False
    shown: str | None = None
    is_json: bool = False


def read_steps(page: str) -> list[Step]:
    """The marked blocks of a page, in order."""
    steps = []
    for found in _STEP.finditer(page):
        lines = list(read_lines(found["typed"], page.count("\n", 0, found.start("typed")) + 1))
        lines[-1] = replace(lines[-1], ends_with=int(found["code"] or 0))
        steps.append(Step(lines, found["mark"] == "plan", found["shown"], found["kind"] == "json"))
    return steps


def read_lines(typed: str, number: int) -> Iterator[Line]:
    """The commands of a block, each with its continuation lines or its here-document."""
    waiting = typed.splitlines()
    while waiting:
        first, text = number, waiting.pop(0)
        number += 1
        while text.endswith("\\"):
            text = text.removesuffix("\\") + waiting.pop(0)
            number += 1
        if found := re.search(r"<<'?(\w+)'?", text):
            end = waiting.index(found[1]) + 1
            text = "\n".join([text, *waiting[:end]])
            del waiting[:end]
            number += end
        yield Line(first, text)


def type_page(
    page: str, typist: Typist, given: Mapping[str, str], patch: pytest.MonkeyPatch, *, compares: bool = True
) -> int:
    """Run a page's steps; the number of those whose output was compared.

    Args:
        given: values in place of what the page's `export` lines say: the directory of a model in place of its hub id.
        compares: whether models are those that the page shows the output of.
    """
    compared = 0
    for step in read_steps(page):
        typist.printed = ""
        for line in step.lines:
            if exported := re.fullmatch(r"export (\w+)=(\S*)", line.text):
                patch.setenv(exported[1], given.get(exported[1], exported[2]))
            elif step.is_planned and line.text.startswith("raytower "):
                typist.plan(line)
                _stand_in(line, given)
            else:
                typist.type(line)
        if step.shown is not None and compares:
            check_shown(step, typist.printed)
            compared += 1
    return compared


def _stand_in(line: Line, given: Mapping[str, str]) -> None:
    """The model that a training begins with stands for what it would make of it."""
    words = shlex.split(line.text)
    if words[1] in TRAININGS:
        shutil.copytree(given["MODEL"], Path(words[words.index("--output") + 1]))


def check_shown(step: Step, printed: str) -> None:
    """Every line that is shown was printed, in this order; of JSON every key, with its value."""
    number = step.lines[0].number
    assert step.shown is not None
    if step.is_json:
        found = json.loads(printed.strip().splitlines()[-1])
        assert is_part(json.loads(step.shown), found), f"the block of line {number} printed {found}"
        return
    printed_lines = iter(printed.splitlines())
    for shown in step.shown.splitlines():
        assert any(_is_alike(shown.rstrip(), line.rstrip()) for line in printed_lines), (
            f"the block of line {number} did not print {shown!r}, but\n{printed}"
        )


def _is_alike(shown: str, printed: str) -> bool:
    """Whether a line is what is shown; the last digit of a score may be another."""
    parts = [".*" if part == _ANY else r"(\d+\.\d+)" for part in _LOOSE.findall(shown)]
    fixed = [re.escape(part) for part in _LOOSE.split(shown)]
    pattern = "".join(fixed[:1] + [part for pair in zip(parts, fixed[1:], strict=True) for part in pair])
    found = re.fullmatch(pattern, printed)
    if found is None:
        return False
    decimals = [float(part) for part in _LOOSE.findall(shown) if part != _ANY]
    return [float(part) for part in found.groups()] == pytest.approx(decimals, abs=2e-4)


def is_part(shown: Any, found: Any) -> bool:
    """Whether `found` holds all that is shown: keys of objects, elements of lists from the first on, equal values."""
    if shown == _ANY:
        return True
    if isinstance(shown, dict):
        return isinstance(found, dict) and all(
            name in found and is_part(value, found[name]) for name, value in shown.items()
        )
    if isinstance(shown, list):
        enough = isinstance(found, list) and len(found) >= len(shown)
        return enough and all(is_part(*pair) for pair in zip(shown, found, strict=False))
    if isinstance(shown, float) and isinstance(found, float):
        return found == pytest.approx(shown, abs=1e-4)
    return bool(shown == found)
