"""The lines of a guide that a reader types: fenced blocks, run as written, and the answers shown below them."""

from __future__ import annotations

import json
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Every answer must be a success; the last one of a block is kept, to be compared with what the guide shows.
_PREAMBLE = """set -euo pipefail
curl() { command curl --fail-with-body --max-time 60 -sS "$@" | tee "$LAST_ANSWER"; }
"""


@dataclass(frozen=True)
class Served:
    """A server of the guide: without keys at `url`, and one that asks for `key` at `keyed_url`.

    Both have the collection `faq` with a reranker and labels to classify by.
    """

    url: str
    keyed_url: str
    key: str


@dataclass(frozen=True)
class Block:
    """Lines of a shell with the JSON that the guide shows below them, if it does."""

    line: int
    code: str
    shown: Any | None

    @property
    def needs_key(self) -> bool:
        return "$KEY" in self.code


def read_blocks(text: str) -> list[Block]:
    """The blocks marked `sh` that call curl, in order."""
    fences = list(re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    blocks = []
    for fence, following in zip(fences, [*fences[1:], None], strict=True):
        if fence[1] == "sh" and "curl" in fence[2]:
            directly = following is not None and text[fence.end() : following.start()].strip() == ""
            shown = json.loads(following[2]) if directly and following and following[1] == "json" else None
            blocks.append(Block(text.count("\n", 0, fence.start()) + 1, fence[2], shown))
    return blocks


def run_block(block: Block, served: Served, folder: Path) -> bytes:
    """Runs a block with URL and KEY of a server, and gives the answer to its last curl."""
    code = re.sub(r"^export URL=.*\n", "", block.code, flags=re.MULTILINE)
    environment = {
        **os.environ,
        "URL": served.keyed_url if block.needs_key else served.url,
        "KEY": served.key,
        "LAST_ANSWER": str(folder / "answer"),
    }
    done = subprocess.run(
        ["bash", "-c", _PREAMBLE + code],
        env=environment,
        cwd=folder,
        capture_output=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, (
        f"line {block.line} of the guide failed:\n{code}\n{done.stdout.decode()}\n{done.stderr.decode()}"
    )
    return (folder / "answer").read_bytes()


def check_shape(shown: Any, answer: Any, where: str = "answer") -> None:
    """An answer has every field that the guide shows, of the same type; values may be others, and null is any."""
    if shown is None or answer is None:
        return
    if isinstance(shown, dict):
        assert isinstance(answer, dict), f"{where} is {answer!r}, and the guide shows an object"
        for name, value in shown.items():
            assert name in answer, f"{where} has no {name!r}, which the guide shows"
            check_shape(value, answer[name], f"{where}.{name}")
    elif isinstance(shown, list):
        assert isinstance(answer, list), f"{where} is {answer!r}, and the guide shows a list"
        assert bool(shown) <= bool(answer), f"{where} is empty, and the guide shows elements"
        if shown and answer:
            check_shape(shown[0], answer[0], f"{where}[0]")
    else:
        numbers = (int, float)
        alike = type(shown) is type(answer) or (type(shown) in numbers and type(answer) in numbers)
        assert alike, f"{where} is {answer!r}, and the guide shows {shown!r}"
