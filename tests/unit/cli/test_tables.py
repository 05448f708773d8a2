"""What people see: tables as wide as their terminal, and texts that cannot do anything to it."""

from __future__ import annotations

import io
import json
import sys

import pytest

from raytower import cli, escapes
from raytower.cli.tables import render_result, render_versions
from raytower.commands import COMMANDS, find_reference
from raytower.progress import log
from raytower.retrieval.search import render_search

EVIL = "a\x1b[31mred\r\x00\x9b2J\u202egpj.exe\u2066\u2028b"
SHOWN = r"a\x1b[31mred\r\x00\x9b2J\u202egpj.exe\u2066\u2028b"
VERSION = {
    "version": "000001",
    "operation": "build",
    "kind": "ivf_rabitq",
    "rows": 1234567,
    "shards": 16,
    "recall": 0.98765,
    "recall_target": 0.98,
    "target_reached": True,
    "search_parameters": {"nprobe": 16},
}


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")


def test_what_is_escaped_and_what_is_not() -> None:
    assert escapes.one_cell(EVIL + "\t\n") == SHOWN + r"\t\n"
    assert escapes.lines(f"{EVIL}\t\n") == SHOWN + "\t\n"
    kept = "中文 العربية עברית 👩\u200d💻 é\u0301 \u200f\xa0"
    assert escapes.one_cell(kept) == kept
    assert escapes.without_colours("\x1b[1;36m(worker)\x1b[0m 5 %\r\x1b]0;title\x07") == (
        r"(worker) 5 %\r\x1b]0;title\x07"
    )
    assert json.loads(escapes.in_json(json.dumps(EVIL, ensure_ascii=False))) == EVIL
    assert escapes.in_json(json.dumps(EVIL, ensure_ascii=False)).isprintable()


def test_search_shows_no_control_characters() -> None:
    item = {"rank": 1, "score": 0.5, "id": EVIL, "text": f"first\n {EVIL}"}
    line = render_search({"index_version": "1", "results": [item]})
    assert line.isprintable()
    assert SHOWN in line


def test_tables_show_no_control_characters(plain: None) -> None:
    evil = "\x1b\n\u202e"
    shown = render_result({evil: evil, "rows": [{"id": evil, evil: 1}], "list": [evil]})
    assert all(line.isprintable() for line in shown.splitlines())
    assert shown.count(r"\x1b\n\u202e") == 5


def test_every_way_of_showing_a_result_escapes_what_documents_hold(plain: None) -> None:
    """Each renderer of the commands, given control characters wherever a result holds a text."""
    evil = "\x1b]0;owned\x07"
    point = {"weight": 0.0, "mrr@10": 0.5}
    results = {
        "raytower.cli.tables:render_search_or_figures": {
            "index_version": evil,
            "results": [{"rank": 1, "score": 0.5, "id": evil, "text": evil}],
        },
        "raytower.retrieval.embed:render_embed": {"vectors": [[0.5]], "encoder": evil},
        "raytower.cli.tables:render_versions": {
            "current": "000001",
            "versions": [{**VERSION, "operation": evil, "kind": evil}],
        },
        "raytower.cli.tables:render_evaluation": {
            "intervals": {"mrr@10": [0.1, 0.2]},
            "mrr@10": 0.15,
            "recall_stage": None,
            "output": evil,
        },
        "raytower.serving.plan:render_serve_file": {"import_path": evil},
        "raytower.cli.tables:render_pipeline": {
            "steps": [{"step": 1, "why": evil, "output": evil, "lineage": {}}],
            "running_by": evil,
        },
        "raytower.cli.tables:render_tuning": {"weight": 0.0, "curve": [point], "reranker": evil},
    }
    assert results.keys() == {command.render for command in COMMANDS.values() if command.render}
    for name, result in results.items():
        shown = find_reference(name)(result)
        assert all(line.isprintable() for line in shown.splitlines()), name
        # As we write it, YAML and JSON.
        ways = (r"\x1b]0;owned\x07", r"\e]0;owned\a", r"\u001b]0;owned\u0007")
        assert any(way in shown for way in ways), name


def test_a_terminal_that_lacks_a_character_is_shown_its_code(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    terminal = io.TextIOWrapper(raw, encoding="gbk")
    monkeypatch.setattr(sys, "stdout", terminal)
    cli._show("a policy 🚗 保险")
    cli._show_json({"text": "🚗 保险"})
    first, second = raw.getvalue().decode("gbk").splitlines()
    assert first == r"a policy \U0001f697 保险"
    assert json.loads(second) == {"text": "🚗 保险"}


def test_a_traceback_cannot_move_the_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli._explain(ValueError("a document: \x1b[2J")) == 1
    said = capsys.readouterr().err
    assert said == "ValueError: a document: \\x1b[2J\n"


def test_log_lines_show_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    log(f"first {EVIL}\n\tsecond")
    assert capsys.readouterr().err == f"first {SHOWN}\n\tsecond\n"


def test_json_on_a_terminal_shows_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    cli._show_json({"text": EVIL})
    out = capsys.readouterr().out
    assert out.rstrip("\n").isprintable()
    assert json.loads(out) == {"text": EVIL}


@pytest.mark.parametrize("columns", [1, 8, 20, 39, 60, 200])
def test_nothing_is_lost_where_a_terminal_is_narrow(
    columns: int, plain: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    versions = render_versions({"current": "000001", "versions": [VERSION]})
    result = render_result({"a_long_name.of_a_figure": 1234567, "path": "/a/b", "parts": [VERSION, VERSION]})
    for value in ("000001", "ivf_rabitq", "1,234,567", "0.9877", "nprobe=16"):
        assert value in versions.replace("\n", "") or columns >= 60
    assert "1,234,567" in result
    assert "a_long_name.of_a_figure" in result
    if columns >= 39:
        assert max(map(len, result.splitlines())) <= columns


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_no_colours_where_none_are_wanted(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    result = {"rows": 3, "parts": [{"id": "a"}]}
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert "\x1b[1m" in render_result(result)
    monkeypatch.setenv(name, value)
    assert "\x1b" not in render_result(result)
