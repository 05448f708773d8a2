"""Plots as PNG: whole files that say whose they are, with the colours of the page, and text in them."""

from __future__ import annotations

import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

from raytower.errors import InputError, MissingExtraError
from raytower.pages import pictures
from raytower.pages.pictures import check_pictures, png_file, write_pictures
from raytower.pages.plots import Axis, Line, Plot, Point, line_plot, matrix
from raytower.pages.style import FLAT_PLOT_STYLE, PLOT_STYLE
from raytower.storage import Location

SIGNATURE = b"\x89PNG\r\n\x1a\n"
needs_resvg = pytest.mark.usefixtures("resvg")


@pytest.fixture(scope="module")
def resvg() -> None:
    pytest.importorskip("resvg_py", reason="resvg_py, which the extra [png] brings, is not installed")


def plot(name: str = "lines", label: str = "recall") -> Plot:
    line = Line("first", [Point(1, 0.25, 0.2, 0.3), Point(100, 1.0, 0.9, 1.0)])
    return line_plot(name, "A title", [line], Axis("k"), Axis(label))


def chunks(content: bytes) -> list[tuple[bytes, bytes]]:
    """Names and contents of a PNG file's chunks; each checksum is proved."""
    assert content.startswith(SIGNATURE)
    found, place = [], len(SIGNATURE)
    while place < len(content):
        (length,) = struct.unpack(">I", content[place : place + 4])
        name, inside = content[place + 4 : place + 8], content[place + 8 : place + 8 + length]
        (checksum,) = struct.unpack(">I", content[place + 8 + length : place + 12 + length])
        assert checksum == zlib.crc32(name + inside)
        found.append((name, inside))
        place += 12 + length
    return found


def pixels(content: bytes) -> np.ndarray:
    """The points (H, W, 4) of a PNG of 8 bits and four channels, its filters undone here."""
    parts = chunks(content)
    width, height, depth, kind = struct.unpack(">IIBB", parts[0][1][:10])
    assert (depth, kind) == (8, 6)
    raw = zlib.decompress(b"".join(inside for name, inside in parts if name == b"IDAT"))
    lines = np.frombuffer(raw, np.uint8).reshape(height, 1 + width * 4)
    image = np.zeros((height, width, 4), np.int64)
    for row in range(height):
        way, line = lines[row, 0], lines[row, 1:].reshape(width, 4).astype(np.int64)
        above = image[row - 1] if row else np.zeros((width, 4), np.int64)
        for column in range(width):
            left = image[row, column - 1] if column else np.zeros(4, np.int64)
            corner = above[column - 1] if column and row else np.zeros(4, np.int64)
            guess = left + above[column] - corner
            distances = np.abs(np.stack([guess - left, guess - above[column], guess - corner]))
            paeth = np.where(
                (distances[0] <= distances[1]) & (distances[0] <= distances[2]),
                left,
                np.where(distances[1] <= distances[2], above[column], corner),
            )
            added = [0, left, above[column], (left + above[column]) // 2, paeth][way]
            image[row, column] = (line[column] + added) % 256
    return image


def test_the_flat_style_has_no_variable_left_and_loses_none() -> None:
    assert "var(" not in FLAT_PLOT_STYLE
    assert "@media" not in FLAT_PLOT_STYLE
    assert "system-ui" not in FLAT_PLOT_STYLE
    assert ".plot .line.c1,.plot .bar.c1{stroke:#1b5fc1}" in FLAT_PLOT_STYLE
    assert FLAT_PLOT_STYLE.count("{") == len(re.findall(r"\.[^{}@:]+\{", PLOT_STYLE))


@needs_resvg
def test_a_plot_becomes_a_whole_file_of_ours() -> None:
    parts = chunks(png_file(plot()))
    assert [name for name, _ in parts[:2]] == [b"IHDR", b"tEXt"]
    assert parts[1][1] == b"Software\0raytower"
    assert parts[-1][0] == b"IEND"
    assert struct.unpack(">II", parts[0][1][:8]) == (1760, 1040)


@needs_resvg
def test_colours_are_those_of_a_light_page_and_text_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "_WIDTH", 220)
    square = matrix("m", "A title", ["first"], [[3]])
    image = pixels(png_file(square))
    assert image[0, -1].tolist() == [255, 255, 255, 255]  # the ground
    # The cell: what is green, at .7 over .35 of the line's grey over white.
    under = np.array([255, 255, 255]) * 0.65 + np.array([0xD5, 0xD7, 0xDB]) * 0.35
    green = np.array([0x17, 0x69, 0x3A]) * 0.7 + under * 0.3
    assert image[image.shape[0] * 3 // 4, 150, :3].tolist() == pytest.approx(green.tolist(), abs=3)
    other = pixels(png_file(matrix("m", "A title", ["other name"], [[3]])))
    assert (image != other).any(), "the names are written"


@needs_resvg
def test_pictures_replace_pictures_and_nothing_else(tmp_path: Path) -> None:
    folder = Location.of(tmp_path)
    names = ("lines", "others", "more")
    check_pictures(str(tmp_path), names)
    write_pictures(folder, [plot(), plot("others")], names)
    check_pictures(str(tmp_path), names)
    # A plot that the next job does not have is not left of the last one.
    write_pictures(folder, [plot(label="ndcg")], names)
    assert [place.name for place in tmp_path.iterdir()] == ["lines.png"]
    (tmp_path / "more.png").write_bytes(SIGNATURE + b"somebody's")
    (tmp_path / "own.png").write_bytes(b"somebody's")
    with pytest.raises(InputError, match=r"holds a 'more\.png' that raytower has not drawn"):
        check_pictures(str(tmp_path), names)


def test_without_a_font_they_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A renderer without fonts draws lines and leaves out every text."""
    monkeypatch.setattr(pictures, "_drawn", lambda svg, width: b"the same")
    with pytest.raises(InputError, match="no font to write with; install one"):
        check_pictures(str(tmp_path), ())


def test_without_the_renderer_the_extra_is_named() -> None:
    code = "import sys; sys.modules['resvg_py'] = None\nfrom raytower.pages.pictures import check_pictures\n"
    code += "try: check_pictures('.', ())\nexcept ImportError as error: print(error)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'raytower[png]'" in done.stdout
    assert issubclass(MissingExtraError, ImportError)
