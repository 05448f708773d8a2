"""What readers of a page type: lines with `raytower …` and blocks of Python in this process, all else by a shell."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from raytower.cli import main
from raytower.cli.arguments import read_arguments
from raytower.config import load_config
from raytower.index import build as build_module
from raytower.serving.config import ServeConfig
from tests.support.encoding_here import no_ray
from tests.support.index_cases import HERE
from tests.support.real_server import serving

_REDIRECTION = re.compile(r"^(?P<command>.*?)(?: (?P<mode>>>?) (?P<file>\S+))?$", re.DOTALL)
_ADDRESS = "http://127.0.0.1:8000"
TRAININGS = ("train-retriever", "train-reranker", "train-classifier")


@dataclass(frozen=True)
class Line:
    """One line of a shell with those that a backslash joins to it, or a block of Python."""

    number: int
    text: str
    is_python: bool = False
    ends_with: int = 0
    """The exit code that the page names."""

    @property
    def is_training(self) -> bool:
        return self.text.startswith(tuple(f"raytower {name} " for name in TRAININGS))


def read_lines(page: str, heading: str) -> list[Line]:
    """What the blocks marked `sh` and `python` hold between a heading of the second level and the next one."""
    start = page.index(f"\n## {heading}")
    end = page.find("\n## ", start + 1)
    found: list[Line] = []
    for fence in re.finditer(r"^```(sh|python)\n(.*?)^```$", page[:end], re.MULTILINE | re.DOTALL):
        number = page.count("\n", 0, fence.start(2)) + 1
        if fence.start() < start:
            continue
        if fence[1] == "python":
            found.append(Line(number, fence[2], is_python=True))
            continue
        whole = ""
        for line in fence[2].splitlines():
            whole += line.removesuffix("\\")
            if not line.endswith("\\"):
                found.append(Line(number, whole))
                whole = ""
            number += 1
    return found


class Typist:
    """Runs lines one after the other in a folder, which is the current one."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._url = _ADDRESS
        self.names: dict[str, Any] = {}
        """What blocks of Python have named."""
        self.printed = ""
        """What commands have printed, of failed ones what they said on stderr too."""
        self._server = contextlib.ExitStack()

    def close(self) -> None:
        self._server.close()

    def type(self, line: Line) -> None:
        """Run a line; raises AssertionError with what it said where it fails."""
        if line.is_python:
            code = compile(line.text.replace(_ADDRESS, self._url), f"line {line.number}", "exec")
            exec(code, self.names)
        elif line.text.startswith("raytower serve "):
            self._serve(shlex.split(line.text)[2:])
        elif line.text.startswith("raytower "):
            self._run(line)
        else:
            code = line.text.replace(_ADDRESS, self._url)
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", code],
                cwd=self._folder,
                env={**os.environ, "no_proxy": "127.0.0.1"},
                capture_output=True,
                text=True,
                check=False,
                timeout=120,
            )
            assert done.returncode == 0, f"line {line.number} failed:\n{code}\n{done.stdout}{done.stderr}"
            self.printed += done.stdout

    def plan(self, line: Line) -> None:
        """Have a training check all that it would check, without training."""
        self._run(Line(line.number, f"{line.text} --dry-run"))

    def _run(self, line: Line) -> None:
        found = _REDIRECTION.match(line.text)
        assert found is not None
        out, said = io.StringIO(), io.StringIO()
        arguments = shlex.split(os.path.expandvars(found["command"]), comments=True)[1:]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(said):
            code = main(arguments)
        assert code == line.ends_with, f"line {line.number} failed:\n{line.text}\n{said.getvalue()}"
        self.printed += out.getvalue() + (said.getvalue() if code else "")
        if found["file"]:
            with open(self._folder / found["file"], "a" if found["mode"] == ">>" else "w") as file:
                file.write(out.getvalue())

    def _serve(self, arguments: Sequence[str]) -> None:
        self._server.close()
        given = [word for word in arguments if word != "&"]
        config = load_config(ServeConfig, None, read_arguments(ServeConfig, ("index",), given).overrides)
        keys = {**config.model_dump(exclude_unset=True), "server": "uvicorn", "timeout_ms": 60_000}
        self._url = self._server.enter_context(serving(**keys))


def output_of(line: Line) -> str:
    """What `--output` names."""
    words = shlex.split(line.text)
    return words[words.index("--output") + 1]


@contextlib.contextmanager
def without_ray() -> Iterator[None]:
    """Corpora are encoded and indexes built in this process."""
    with no_ray(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(build_module, "on_ray", lambda *_: HERE)
        yield
