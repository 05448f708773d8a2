"""The search page as it is put together; tests/jobs/test_search_page.py opens it in a browser."""

from __future__ import annotations

import base64
import hashlib
import re
import tomllib
from html.parser import HTMLParser
from pathlib import Path

from raytower.serving.page import load_page

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "platform" / "raytower" / "serving" / "search_page"


class PageParts(HTMLParser):
    """Bodies of style, script and title, every address that the page would load, and code in attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.bodies: dict[str, str] = {}
        self.addresses: list[str] = []
        self.handlers: list[str] = []
        self._inside = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside = tag
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "action")]
        self.handlers += [name for name, _ in attrs if name.startswith("on") or name == "style"]

    def handle_data(self, data: str) -> None:
        if self._inside in ("title", "style", "script") and data.strip():
            self.bodies[self._inside] = data
            self._inside = ""


def test_the_policy_allows_the_pages_own_style_and_script_alone() -> None:
    page = load_page("Search")
    parts = PageParts(page.content.decode())
    policy = dict(rule.split(" ", 1) for rule in page.headers["Content-Security-Policy"].split("; "))
    for tag in ("script", "style"):
        digest = base64.b64encode(hashlib.sha256(parts.bodies[tag].encode()).digest()).decode()
        assert policy.pop(f"{tag}-src") == f"'sha256-{digest}'"
    assert policy == {
        "default-src": "'none'",
        "img-src": "data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    assert parts.addresses == ["data:,"]
    assert parts.handlers == []
    assert not re.search(
        rb"https?://|innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", page.content
    )


def test_a_title_stays_a_title() -> None:
    for title in ("<b>法律 & search</b>", "{{script}}", r"\1 {{other}}"):
        parts = PageParts(load_page(title).content.decode())
        assert parts.bodies["title"] == title
        assert parts.bodies["script"] == PageParts(load_page("x").content.decode()).bodies["script"]


def test_every_source_of_the_page_is_used_and_packed() -> None:
    page = load_page("x").content.decode()
    for path in FOLDER.iterdir():
        assert path.suffix == ".html" or path.read_text(encoding="utf-8") in page, path.name
    package_data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert "serving/search_page/*" in package_data["raytower"]
