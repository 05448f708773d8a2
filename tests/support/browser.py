"""The browser that pages are opened in: Debian's Chromium."""

from __future__ import annotations

import shutil

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
IN_BROWSER = [
    pytest.mark.browser,
    pytest.mark.skipif(
        CHROMIUM is None, reason="no Chromium is installed; Debian's package is named chromium"
    ),
]
WIDE = {"width": 1100, "height": 900}
PHONE = {"width": 360, "height": 740}
