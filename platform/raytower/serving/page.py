"""The search page for people: one self-contained HTML answer and the headers that keep it so.

The files of `search_page/` become one page: the browser asks for nothing else, wherever a proxy puts the server.
"""

from __future__ import annotations

import base64
import hashlib
import html
import re
from dataclasses import dataclass
from importlib import resources

# In the order in which the browser runs them.
_SCRIPTS = ("words.js", "exact.js", "marks.js", "server.js", "filters.js", "results.js", "app.js")


@dataclass(frozen=True)
class Page:
    content: bytes
    headers: dict[str, str]


def load_page(title: str) -> Page:
    """The page with its title. Its policy allows only its own style and script, named by their hashes."""
    style = "\n" + _read("style.css")
    script = '\n"use strict";\n' + "\n".join(_read(name) for name in _SCRIPTS)
    parts = {"title": html.escape(title), "style": style, "script": script}
    # One pass, so that a title that looks like a mark stays a title.
    text = re.sub(r"\{\{(\w+)\}\}", lambda mark: parts[mark[1]], _read("page.html"))
    policy = "; ".join(
        (
            "default-src 'none'",
            f"script-src {_hash(script)}",
            f"style-src {_hash(style)}",
            "img-src data:",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            # The browser itself refuses a text as HTML.
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        )
    )
    headers = {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    return Page(text.encode(), headers)


def _read(name: str) -> str:
    return resources.files("raytower.serving").joinpath("search_page", name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")
    return f"'sha256-{digest}'"
