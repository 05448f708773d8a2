"""Report pages in Debian's Chromium: light and dark, wide and on a phone, by keys, with texts that would be scripts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect

from raytower.annotation.label_page import render_label_page
from raytower.evaluation.page import evaluation_plots, render_comparison_page, render_page
from raytower.pages.html import write_plots
from raytower.storage import Location
from tests.support.browser import IN_BROWSER, PHONE, WIDE
from tests.support.report_cases import classification, comparison, report

pytestmark = IN_BROWSER
PAGES: dict[str, Callable[[], str]] = {
    "report": lambda: render_page(report()),
    "comparison": lambda: render_comparison_page(comparison()),
    "labels": lambda: render_label_page(classification()),
}


@pytest.fixture
def open_page(browser: Browser, tmp_path: Path) -> Iterator[Callable[..., Page]]:
    """Opens a page from its file. It must ask for nothing else, and write no error of script or policy."""
    wrong: list[str] = []
    contexts = []

    def open_one(name: str, **context: Any) -> Page:
        place = tmp_path / f"{name}.html"
        place.write_text(PAGES[name](), encoding="utf-8")
        contexts.append(browser.new_context(**({"viewport": WIDE} | context)))
        opened = contexts[-1].new_page()
        opened.on("console", lambda message: wrong.append(message.text))
        opened.on("pageerror", lambda error: wrong.append(str(error)))
        opened.on("request", lambda request: request.url == place.as_uri() or wrong.append(request.url))
        opened.goto(place.as_uri())
        return opened

    yield open_one
    for context in contexts:
        context.close()
    assert wrong == []


@pytest.mark.parametrize("name", PAGES)
def test_texts_are_texts_and_plots_are_drawn(open_page: Callable[..., Page], name: str) -> None:
    page = open_page(name)
    expect(page).not_to_have_title("owned")
    assert page.locator("script").count() == 0
    plots = page.locator("svg[role=img]")
    assert plots.count() >= 3
    for number in range(plots.count()):
        box = plots.nth(number).bounding_box()
        assert box is not None
        assert box["width"] > 300
    # No text of a plot leaves it.
    outside = page.evaluate(
        """() => [...document.querySelectorAll('svg.plot')].flatMap(svg => {
            const all = svg.getBoundingClientRect();
            return [...svg.querySelectorAll('text')].filter(text => {
                const box = text.getBoundingClientRect();
                return box.left < all.left - 1 || box.right > all.right + 1 || box.bottom > all.bottom + 1;
            }).map(text => text.textContent);
        })"""
    )
    assert outside == []


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize(("screen", "scheme"), [(WIDE, "light"), (PHONE, "dark")])
def test_no_barrier_that_axe_finds(
    open_page: Callable[..., Page], name: str, screen: dict[str, int], scheme: str
) -> None:
    page = open_page(name, viewport=screen, color_scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") == screen["width"]
    found = Axe().run(page, options={"resultTypes": ["violations"]})
    barriers = [
        f"{one['id']} {node['target']} {node['failureSummary']}"
        for one in found.response["violations"]
        for node in one["nodes"]
    ]
    assert barriers == []


def test_all_is_reached_by_keys(open_page: Callable[..., Page]) -> None:
    page = open_page("report")
    worst = page.locator("details", has_text="q1,").last
    assert not worst.evaluate("each => each.open")
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.textContent").endswith("q1, mrr@10 0.000"):
            break
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    assert worst.evaluate("each => each.open")


def test_dark_where_the_system_is(open_page: Callable[..., Page]) -> None:
    colours = {
        scheme: open_page("report", color_scheme=scheme).evaluate(
            """[getComputedStyle(document.body).backgroundColor,
                getComputedStyle(document.querySelector('svg.plot text')).fill]"""
        )
        for scheme in ("light", "dark")
    }
    assert colours == {
        "light": ["rgb(247, 247, 245)", "rgb(29, 31, 35)"],
        "dark": ["rgb(21, 23, 26)", "rgb(231, 232, 234)"],
    }


def test_a_plot_is_a_picture_of_its_own(browser: Browser, tmp_path: Path) -> None:
    write_plots(Location.of(tmp_path), evaluation_plots(report()))
    page = browser.new_page(color_scheme="dark")
    page.goto((tmp_path / "recall-by-k.svg").as_uri())
    assert page.evaluate("getComputedStyle(document.querySelector('.ground')).fill") == "rgb(30, 33, 37)"
    assert page.evaluate("document.querySelectorAll('path').length") == 6
    page.context.close()
