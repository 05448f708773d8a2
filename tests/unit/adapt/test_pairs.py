"""`raytower pairs`: parts that share no text, and what is left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from raytower.adapt.config import PairsConfig
from raytower.adapt.pairs import pairs, part_of, plan_pairs
from raytower.config import make_config
from raytower.errors import InputError


def run(folder: Path, rows: list[dict[str, Any]], **values: Any) -> tuple[dict[str, Any], list[Any]]:
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = {
        "input": str(folder / "corpus.jsonl"),
        "output": str(folder / "out.jsonl"),
        "file_type": "jsonl",
    }
    config = make_config(PairsConfig, {**settings, **values})
    figures = pairs(config)
    lines = Path(config.output).read_text(encoding="utf-8").splitlines()
    return figures, [json.loads(line) for line in lines]


def corpus(num: int, **more: Any) -> list[dict[str, Any]]:
    """Documents of two passages each, with a title of their own."""
    names = ["".join(chr(97 + int(digit)) for digit in f"{n:04d}") for n in range(num)]
    return [
        {
            "id": f"{name}#{half}",
            "title": f"title {name} {half}",
            "text": f"the text of {name} {half * 9}",
            **more,
        }
        for name in names
        for half in "xy"
    ]


def test_each_pair_says_its_rule_and_what_is_left_out_is_counted(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"id": "1", "title": "Reset a router", "text": "Hold the button for ten seconds."},
        {"id": "2", "title": "Reset a router", "text": "Hold the button for ten seconds."},
        {"id": "3", "title": "12", "text": "A title of digits says nothing."},
        {"id": "4", "title": "Short", "text": "Too short"},
        {"id": "5", "title": "Change of a plan within a year", "text": "A change of a plan within a year"},
        {"id": "6", "title": None, "text": "No title, no pair."},
    ]
    figures, found = run(tmp_path, rows)
    assert found == [
        {"query": "Reset a router", "document": "Hold the button for ten seconds.", "rule": "title"}
    ]
    assert figures["by_rule"] == {"title": 1}
    assert figures["left_out"] == {"near_empty": 2, "too_alike": 1, "in_dev": 0, "repeated": 1}
    assert figures["columns"] == {"title": "title", "question": None, "category": None, "document": None}
    assert (figures["rows"], figures["documents"], figures["pairs"]) == (6, 6, 1)


def test_no_text_and_no_document_of_dev_trains(tmp_path: Path) -> None:
    rows = corpus(200, category="Shared")
    # A document that repeats the text of another one, whichever side it comes to.
    rows += [
        {"id": f"copy {row['id']}", "title": f"copy of {row['title']}", "text": row["text"]}
        for row in rows[:80]
    ]
    split = {"dev_share": 0.25, "train_share": 0.5, "seed": 3}
    dev_figures, dev = run(tmp_path, rows, part="dev", output=str(tmp_path / "dev.jsonl"), **split)
    figures, train = run(tmp_path, rows, part="train", apart_from=str(tmp_path / "dev.jsonl"), **split)
    passages_figures, passages = run(
        tmp_path, rows, part="documents", output=str(tmp_path / "passages.jsonl"), **split
    )
    texts = [{text for pair in part for text in (pair["query"], pair["document"])} for part in (dev, train)]
    assert all(texts)
    assert not texts[0] & texts[1]
    assert figures["left_out"]["in_dev"] > 0
    # A category's name trains, so it is no query of dev.
    assert {pair["rule"] for pair in dev} == {"title", "neighbour"}
    assert {pair["rule"] for pair in train} == {"title", "neighbour", "category"}
    # 280 documents: a quarter, then half of the others.
    assert dev_figures["documents"] == pytest.approx(70, abs=25)
    assert figures["documents"] == pytest.approx(105, abs=30)
    there = {row["text"] for row in passages}
    assert len(there) == len(passages) == passages_figures["passages"] == 400
    assert {pair["document"] for pair in dev + train} <= there


def test_whole_categories_may_be_kept_for_dev(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"id": str(n), "category": f"kind {chr(97 + n % 20)}", "text": f"a text with the number {n}"}
        for n in range(200)
    ]
    split: dict[str, Any] = {"dev_share": 0.3, "split_by": "category", "rules": ["category"]}
    _, dev = run(tmp_path, rows, part="dev", output=str(tmp_path / "dev.jsonl"), **split)
    _, train = run(tmp_path, rows, part="train", **split)
    names = [{pair["query"] for pair in part} for part in (dev, train)]
    assert not names[0] & names[1]
    assert len(names[0] | names[1]) == 20
    with pytest.raises(InputError, match=r"gives no pair by the rules category.*set split_by to category"):
        run(tmp_path, rows, part="dev", **{**split, "split_by": "document"})


def test_columns_by_their_usual_names_or_by_the_config(tmp_path: Path) -> None:
    rows = [{"标题": "如何开通", "text": "在首页点击申请就可以了吗当然。", "headline": "Open an account"}]
    assert run(tmp_path, rows)[1][0]["query"] == "如何开通"
    assert run(tmp_path, rows, columns={"title": "headline"})[1][0]["query"] == "Open an account"
    with pytest.raises(InputError, match=r"columns.title is 'head'.*'标题', 'headline'"):
        run(tmp_path, rows, columns={"title": "head"})
    config = make_config(
        PairsConfig, {"input": str(tmp_path / "corpus.jsonl"), "output": str(tmp_path / "plan.tsv")}
    )
    assert plan_pairs(config)["columns"]["title"] == "标题"


def test_lines_of_a_plain_file_are_documents_of_their_own(tmp_path: Path) -> None:
    """Their ids are file and line, of which no document's name is made."""
    (tmp_path / "lines.txt").write_text("the first text of the file\nthe second text of the file\n")
    config = {"input": str(tmp_path / "lines.txt"), "output": str(tmp_path / "out.tsv"), "id_separator": ":"}
    with pytest.raises(InputError, match="gives no pair"):
        pairs(make_config(PairsConfig, config))
    assert not (tmp_path / "out.tsv").exists()


def test_parts_are_shares_of_documents() -> None:
    parts = [part_of(str(number), 7, 0.2, 0.5) for number in range(10_000)]
    # Standard deviations are 40 and 49 documents.
    assert parts.count("dev") == pytest.approx(2000, abs=200)
    assert parts.count("train") == pytest.approx(4000, abs=250)
    assert {part_of(str(number), 7, 0.2, 1.0) for number in range(1000)} == {"dev", "train"}
    assert parts != [part_of(str(number), 8, 0.2, 0.5) for number in range(10_000)]
