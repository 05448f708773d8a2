"""Pairs from structure: what each rule makes of a row, worked out by hand."""

from __future__ import annotations

import pytest

from raytower.adapt.config import Rule
from raytower.adapt.rules import (
    Row,
    document_of,
    is_mostly_han,
    num_letters,
    pairs_of_rows,
    similarity,
)

ALL: tuple[Rule, ...] = ("title", "question", "heading", "law", "neighbour", "category", "lead")


def made(*rows: Row, rules: tuple[Rule, ...] = ALL) -> list[tuple[str, str, str]]:
    return [
        (pair.rule, pair.query, pair.document) for each in pairs_of_rows(rows, rules) for pair in each.pairs
    ]


def row(text: str, document: str = "d", **values: str) -> Row:
    return Row("r", text, document, **values)


def test_a_title_goes_with_its_text_and_is_cut_off_where_the_text_repeats_it() -> None:
    assert made(row("Hold the button\nfor ten seconds.", title="Reset a router")) == [
        ("title", "Reset a router", "Hold the button for ten seconds.")
    ]
    assert made(row("Reset a router: hold the button.", title="Reset a router")) == [
        ("title", "Reset a router", "hold the button.")
    ]


def test_a_markdown_heading_goes_with_its_section_after_the_title() -> None:
    text = "A small device.\n# Power\nPlug it in.\nWait.\n## Reset ##\nHold the button."
    assert made(row(text, title="Router")) == [
        ("title", "Router", "A small device."),
        ("heading", "Router Power", "Plug it in. Wait."),
        ("heading", "Router Reset", "Hold the button."),
    ]
    assert made(row("#hashtag is no heading", title=""), rules=("heading",)) == []


def test_numbered_chinese_headings_lose_their_numbers() -> None:
    text = "第一章 总则\n这里说目的。\n第二章 登记\n这里说登记。"
    assert made(row(text, title="条例")) == [
        ("heading", "条例 总则", "这里说目的。"),
        ("heading", "条例 登记", "这里说登记。"),
    ]
    assert made(row("一、适用范围\n本办法适用于本市。\n二、办理流程\n先到窗口。")) == [
        ("heading", "适用范围", "本办法适用于本市。"),
        ("heading", "办理流程", "先到窗口。"),
    ]


def test_an_article_is_asked_for_by_the_law_and_its_number() -> None:
    """A chapter's heading stands in no article; an article that is mentioned within a sentence cuts nothing."""
    text = "第一章 总则\n第一条 为了规范公司，制定本法。\n第二条　依照第一条设立。\n第二章 登记\n第三条 应当登记。"
    assert made(row(text, title="公司法")) == [
        ("law", "公司法 第一条", "为了规范公司，制定本法。"),
        ("law", "公司法 第二条", "依照第一条设立。"),
        ("law", "公司法 第三条", "应当登记。"),
    ]
    assert made(row("第五条 说了什么，我不知道。"), rules=("law",)) == []


def test_a_question_column_and_a_question_that_a_text_begins_with() -> None:
    assert made(row("Yes, twice a year.", question="May I change it?", title="Plans")) == [
        ("question", "May I change it?", "Yes, twice a year."),
        ("title", "Plans", "Yes, twice a year."),
    ]
    assert made(row("怎么开通？在首页点击申请。")) == [("question", "怎么开通？", "在首页点击申请。")]
    # A question after the first sentence is no title of the text.
    assert made(row("It is late. Is it? Yes."), rules=("question",)) == []


def test_neighbours_are_of_one_document_and_a_category_goes_with_each_text() -> None:
    rows = [row("one", "a"), row("two", "a"), row("three", "b", category="x##y"), row("four", "a")]
    assert made(*rows) == [("neighbour", "one", "two"), ("category", "x y", "three")]


def test_a_first_sentence_goes_with_the_rest_where_nothing_else_is_there() -> None:
    assert made(row("It costs 3.5 dollars. Pay at the desk. Thanks.")) == [
        ("lead", "It costs 3.5 dollars.", "Pay at the desk. Thanks.")
    ]
    assert made(row("第一句。第二句。")) == [("lead", "第一句。", "第二句。")]
    assert made(row("Cut. Rest.", title="T")) == [("title", "T", "Cut. Rest.")]


def test_each_row_gives_its_passages_once_whether_pairs_are_made_of_them_or_not() -> None:
    rows = [row("plain  text"), row("answer", question="q", title="t"), row("# A\none\n# B\ntwo")]
    assert [each.passages for each in pairs_of_rows(rows, ("title", "question", "heading"))] == [
        ("plain text",),
        ("answer",),
        ("one", "two"),
    ]


def test_letters_scripts_likeness_and_documents() -> None:
    assert (
        num_letters("第十二条"),
        num_letters("2.3 "),
        num_letters("第三章 总则"),
        num_letters("a-1 b"),
    ) == (
        0,
        0,
        2,
        2,
    )
    assert is_mostly_han("公司 ab") is True
    assert is_mostly_han("公司 abc") is False
    # abcd: ab bc cd; abce: ab bc ce. Two of four.
    assert similarity("Abcd!", "ab ce") == pytest.approx(2 / 4)
    assert similarity("a", "!") == 0.0
    assert document_of("law-7#12", "", "#") == "law-7"
    assert document_of("law-7", "", "#") == "law-7"
    assert document_of("law-7#12", "", None) == "law-7#12"
    assert document_of("law-7#12", "law", "#") == "law"
