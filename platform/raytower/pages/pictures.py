"""Plots as PNG files, for what shows no SVG: mails, slides, documents.

resvg draws them, a renderer without a browser (extra `png`). It knows neither variables of styles nor a dark page, so
colours are written out and those of a light page. It draws no text at all where it finds no font of a list, so the list
names those that machines have, and a machine without any is refused.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Sequence

from raytower.errors import InputError, import_extra
from raytower.pages.plots import Plot, svg_file
from raytower.pages.style import FLAT_PLOT_STYLE
from raytower.storage import Location

# A screen of high resolution shows a page's plot with as many.
_WIDTH = 1760
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_OURS = b"Software\0raytower"
_STYLE = re.compile(r"<style>.*?</style>", re.DOTALL)
_FIRST_BYTES = 256
_LETTER = (
    '<svg xmlns="http://www.w3.org/2000/svg" width="20" height="20"><style>{style}</style>'
    '<g class="plot"><text x="2" y="16">{text}</text></g></svg>'
)


def png_file(plot: Plot) -> bytes:
    """The plot as a PNG of 1,760 points from left to right, light, which says in its head that raytower drew it.

    Raises:
        MissingExtraError: resvg is not installed.
    """
    flat = _STYLE.sub(f"<style>{FLAT_PLOT_STYLE}</style>", svg_file(plot).decode(), count=1)
    drawn = _drawn(flat, _WIDTH)
    # The header is the first chunk: 8 bytes of length and name, 13 of content and 4 of checksum.
    head = len(_SIGNATURE) + 25
    return drawn[:head] + _chunk(b"tEXt", _OURS) + drawn[head:]


def check_pictures(folder: str, names: Sequence[str]) -> None:
    """Find before any work that plots cannot be drawn as PNG files, or not written into a folder.

    Raises:
        MissingExtraError: resvg is not installed.
        InputError: no font is here to write with, or a file has the name of a plot and is none of ours.
    """
    blank, letter = (_drawn(_LETTER.format(style=FLAT_PLOT_STYLE, text=text), 20) for text in ("", "k"))
    if blank == letter:
        raise InputError(
            "plots cannot be drawn as PNG: this machine has no font to write with; install one (Debian's packages are "
            "fonts-dejavu-core and, for Chinese, fonts-noto-cjk), or take SVG"
        )
    wanted = {f"{name}.png" for name in names}
    for child in Location.of(folder).children():
        if child.name in wanted and not _is_ours(child):
            raise InputError(
                f"output {folder!r} holds a {child.name!r} that raytower has not drawn, and which would be lost; name "
                "another folder, or remove it"
            )


def write_pictures(folder: Location, plots: Sequence[Plot], names: Sequence[str]) -> None:
    """A file `<name>.png` each; of `names`, those of all plots, others that an earlier job drew are removed.

    Raises:
        MissingExtraError: as `png_file`.
    """
    for plot in plots:
        (folder / f"{plot.name}.png").write_bytes(png_file(plot))
    for name in set(names) - {plot.name for plot in plots}:
        (folder / f"{name}.png").delete()


def _drawn(svg: str, width: int) -> bytes:
    drawn: bytes = import_extra("resvg_py").svg_to_bytes(svg_string=svg, width=width)
    return drawn


def _chunk(name: bytes, content: bytes) -> bytes:
    """A chunk of a PNG file: length, name, content, and the checksum of the last two."""
    checksum = zlib.crc32(name + content)
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)


def _is_ours(place: Location) -> bool:
    if not place.is_file():
        return False
    with place.open_read() as stream:
        first = bytes(stream.read(_FIRST_BYTES))
    return first.startswith(_SIGNATURE) and _OURS in first
