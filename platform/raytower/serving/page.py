"""The search page for people: one self-contained HTML file and the headers that keep it so."""

from __future__ import annotations

import base64
import hashlib
import html
import re
from dataclasses import dataclass
from importlib import resources

_TITLE_MARK = "{{title}}"


@dataclass(frozen=True)
class Page:
    content: bytes
    headers: dict[str, str]


def load_page(title: str) -> Page:
    """The page with its title. Its policy allows only its own style and script, named by their hashes."""
    text = resources.files("raytower.serving").joinpath("page.html").read_text(encoding="utf-8")
    text = text.replace(_TITLE_MARK, html.escape(title))
    policy = "; ".join(
        (
            "default-src 'none'",
            f"script-src {_hash(text, 'script')}",
            f"style-src {_hash(text, 'style')}",
            "img-src data:",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    )
    headers = {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    return Page(text.encode(), headers)


def _hash(text: str, tag: str) -> str:
    (body,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, flags=re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode("ascii")
    return f"'sha256-{digest}'"
