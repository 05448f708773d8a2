"""The Markdown pages of the repository: the links that they hold, and the commands that readers type."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from raytower.cli.about import ABOUT
from raytower.cli.arguments import read_arguments
from raytower.commands import COMMANDS, find_reference
from raytower.config import load_config
from raytower.examples import EXAMPLES

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/**/*.md", "deploy/**/*.md", "benchmarks/*.md")
    for path in ROOT.glob(pattern)
)
_BLOCK = re.compile(
    r"^(?P<ticks>```+)(?P<language>\w*).*?\n(?P<code>.*?)^(?P=ticks) *$", re.MULTILINE | re.DOTALL
)
_INDENTED = re.compile(r"(?<=\n\n)(?: {4}.*\n?)+")
_SPAN = re.compile(r"(?<!`)`(raytower [^`]+)`(?!`)")
_LINK = re.compile(r"\[[^\]]*\]\(([^()\s]+)\)")
_OPERATORS = set("();<>|&")
# Words of a line that stand for what a reader has, or leave something out.
_LEFT_OUT = re.compile(r"…|^[A-Z]+$|^<\w+>$")


@dataclass(frozen=True)
class Typed:
    """One call of `raytower`, or of a job's file, and whether it stands there whole."""

    line: int
    words: tuple[str, ...]
    is_whole: bool

    def check(self) -> None:
        """Read it as the command line does. Raises InputError, or KeyError for a command or job that there is not."""
        name, given = self._command()
        if name is None:
            return
        command = COMMANDS[name]
        config_class = find_reference(command.config)
        if (
            not self.is_whole and given and given[-1].startswith("--") and given[-1] != "--help"
        ):  # a key that is only named
            given = [*given[:-1], f"{given[-1]}=null"]
        arguments = read_arguments(config_class, command.positions, given)
        path = arguments.config_path and ROOT / arguments.config_path
        if self.is_whole and not arguments.help and (not path or path.is_file()):
            load_config(config_class, path or None, arguments.overrides)

    def _command(self) -> tuple[str | None, Sequence[str]]:
        """The command and its arguments; None where it is about commands, and right."""
        first, *rest = self.words
        rest = [word for word in rest if word != "…"]
        if first != "raytower":  # a job's file
            found = re.search(r'run_command\("([^"]+)"', (ROOT / first).read_text(encoding="utf-8"))
            assert found is not None
            return found[1], rest
        if not rest or rest[0].startswith("-") or _LEFT_OUT.search(rest[0]):
            return None, ()
        if rest[0] in ABOUT:
            of_config = rest[0] == "config" and len(rest) > 1 and not _LEFT_OUT.search(rest[1])
            assert not of_config or " ".join(rest[1:]) in EXAMPLES, f"there is no config of {rest[1:]}"
            return None, ()
        size = 2 if " ".join(rest[:2]) in COMMANDS else 1
        return " ".join(rest[:size]), rest[size:]


def typed_in(text: str) -> Iterator[Typed]:
    """What the blocks of a shell and the spans of code of a page have typed."""
    for code, line in _shell_code(text):
        joined = code.replace("\\\n", "  ")
        for number, whole in enumerate(joined.splitlines()):
            if "raytower " in whole or "jobs/" in whole:
                yield from _calls(whole, line + number)
    for span in _SPAN.finditer(_without_blocks(text)):
        for typed in _calls(" ".join(span[1].split()), text.count("\n", 0, text.find(span[0])) + 1):
            yield replace(typed, is_whole=False)


def _shell_code(text: str) -> Iterator[tuple[str, int]]:
    for block in _BLOCK.finditer(text):
        if block["language"] in ("sh", "bash", ""):
            yield block["code"], text.count("\n", 0, block.start("code")) + 1
    for block in _INDENTED.finditer(_BLOCK.sub("", text)):
        yield block[0], text.count("\n", 0, text.find(block[0])) + 1


def _calls(line: str, number: int) -> Iterator[Typed]:
    """The calls of a line, which `&&`, `|` and their kin part."""
    lexer = shlex.shlex(re.sub(r"(^|\s)#\s.*$", "", line), posix=True, punctuation_chars=True)
    lexer.whitespace_split, lexer.commenters = True, ""
    call: list[str] = []
    for word in [*lexer, ";"]:
        if word == "--" or set(word) <= _OPERATORS:
            if call and (call[0] == "raytower" or re.fullmatch(r"jobs/\w+\.py", call[0])):
                yield Typed(number, tuple(call), not any(map(_LEFT_OUT.search, call)))
            call = []
        elif call or not re.fullmatch(r"python|\w+=.*", word):  # what may stand before a command
            call.append(word)


def _without_blocks(text: str) -> str:
    return _INDENTED.sub("", _BLOCK.sub("", text))


def links_in(text: str) -> list[str]:
    """The targets of links outside of code."""
    plain = re.sub(r"(`+)(?!`).+?(?<!`)\1(?!`)", "", _without_blocks(text), flags=re.DOTALL)
    return [
        target for target in _LINK.findall(plain) if "://" not in target and not target.startswith("mailto:")
    ]


def anchors_of(text: str) -> set[str]:
    """What links to a page may name behind `#`: its headings by GitHub's rule, and anchors that are written down."""
    anchors: dict[str, int] = {}
    found = set(re.findall(r'<a id="([^"]+)">', text))
    for heading in re.findall(r"^#+ (.+?)#*$", _without_blocks(text), re.MULTILINE):
        name = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        count = anchors.get(name, 0)
        anchors[name] = count + 1
        found.add(f"{name}-{count}" if count else name)
    return found
