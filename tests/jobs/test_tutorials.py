"""docs/tutorials: the blocks that are marked to run, and what they print."""

from __future__ import annotations

from pathlib import Path

import pytest

from raytower.demo.sample import find_demo_model
from tests.conftest import SHARED
from tests.support.tutorials import Step, check_shown, read_lines, read_steps, type_page
from tests.support.typed_commands import Line, Typist, without_ray

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "tutorials"
# On a GPU, a cluster or Kubernetes nothing can be typed here; the command line's own parser reads those.
NOT_RUN = {"gpu", "cluster", "kubernetes"}
RUN = sorted({path.stem for path in FOLDER.glob("*.md")} - NOT_RUN)
E5 = SHARED / "models" / "e5-small-zh-en"


def page_of(name: str) -> str:
    return (FOLDER / f"{name}.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", RUN)
def test_a_tutorial_runs_as_it_stands(name: str, typist: Typist, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the model that the demo brings: hub ids cannot be fetched here."""
    # The Chinese one shows what a multilingual model prints.
    compares = name != "chinese"
    with without_ray():
        compared = type_page(
            page_of(name), typist, {"MODEL": find_demo_model()}, monkeypatch, compares=compares
        )
    assert not compares or compared >= 1


@pytest.mark.shared
def test_the_chinese_one_prints_what_it_shows(typist: Typist, monkeypatch: pytest.MonkeyPatch) -> None:
    with without_ray():
        assert type_page(page_of("chinese"), typist, {"MODEL": str(E5)}, monkeypatch) >= 3


def test_others_hold_no_block_to_run() -> None:
    for name in NOT_RUN:
        assert read_steps(page_of(name)) == []


def test_what_is_not_printed_is_found() -> None:
    for shown, is_json in (
        ("rank 1\nrank 3\n", False),
        ("rank 2\nrank 1\n", False),
        ("rank …5\n", False),
        ("score 0.5777\n", False),
        ('{"rows": 4}', True),
        ('{"row": 3}', True),
        ('{"hits": [{"id": "a"}, {"id": "b"}]}', True),
    ):
        step = Step([Line(7, "raytower x")], shown=shown, is_json=is_json)
        with pytest.raises(AssertionError, match="the block of line 7"):
            check_shown(step, 'rank 1\nrank 2\nscore 0.5774\n{"rows": 3, "hits": [{"id": "a", "k": 1}]}')
    check_shown(Step([Line(7, "raytower x")], shown="1 …e: 0.5775 a.b\n"), "no\n1  file: 0.5774 a.b\n")
    step = Step([Line(7, "raytower x")], shown='{"hits": [{"id": "…"}], "score": 0.61312}', is_json=True)
    check_shown(step, 'a line\n{"rows": 3, "score": 0.61314, "hits": [{"id": "a"}, 5]}\n')


def test_lines_of_a_block_are_whole() -> None:
    typed = "a \\\n  b\ncat > f <<'END'\nx\n  y\nEND\nc\n"
    assert list(read_lines(typed, 3)) == [
        Line(3, "a   b"),
        Line(5, "cat > f <<'END'\nx\n  y\nEND"),
        Line(9, "c"),
    ]
