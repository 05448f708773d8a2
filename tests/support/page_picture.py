"""Draws the search page for the documentation: python -m tests.support.page_picture docs/images/search-page.png"""

from __future__ import annotations

import shutil
import sys

from playwright.sync_api import expect, sync_playwright

from tests.support.search_server import SearchServer, served


def draw(path: str) -> None:
    with served(SearchServer()) as server, sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=shutil.which("chromium"))
        page = chromium.new_page(viewport={"width": 1100, "height": 800}, locale="en-US")
        page.goto(f"{server.url}/#q=When+can+I+cancel+my+policy%3F&k=4&view=compare")
        expect(page.locator(".columns section")).to_have_count(2)
        page.screenshot(path=path)
        chromium.close()


if __name__ == "__main__":
    draw(sys.argv[1])
