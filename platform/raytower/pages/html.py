"""Report pages: one HTML file without scripts, fonts or anything from outside.

A policy inside the page forbids all but its own style, so that a text that got past escaping would still do nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from raytower.errors import InputError
from raytower.pages.plots import Plot, svg_file
from raytower.pages.style import STYLE
from raytower.pages.texts import escaped
from raytower.storage import Location, check_output

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_FIRST_BYTES = 2**16
_OURS = b'class="plot"'


class Cell(NamedTuple):
    """A cell of a table; `kind` is one of the style's classes."""

    text: Any
    kind: str = ""
    small: str = ""
    """Said behind it, less loudly."""


class Card(NamedTuple):
    """A figure to be seen first."""

    name: str
    value: str
    small: str = ""


def title_tag(title: str) -> str:
    """By which a page is known to be one of ours."""
    return f"<title>{escaped(title)}</title>"


def page(title: str, heading: str, lede: str, sections: Sequence[str]) -> str:
    """A page. `title`, `heading` and `lede` are texts, `sections` are HTML that is escaped already."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"{title_tag(title)}<style>{STYLE}</style></head><body><main><h1>{escaped(heading)}</h1>"
        f'<p class="lede">{escaped(lede)}</p>{"".join(sections)}</main></body></html>\n'
    )


def section(heading: str, *parts: str, note: str = "") -> str:
    """A section with its heading; nothing where it has no parts."""
    inside = "".join(parts)
    said = f'<p class="note">{escaped(note, 2_000)}</p>' if note else ""
    return f"<section><h2>{escaped(heading)}</h2>{said}{inside}</section>" if inside else ""


def cards(items: Sequence[Card]) -> str:
    """Figures side by side."""
    inside = "".join(
        f'<div><dt>{escaped(item.name)}</dt><dd><span class="value">{escaped(item.value)}</span>'
        f'<br><span class="interval">{escaped(item.small)}</span></dd></div>'
        for item in items
    )
    return f'<dl class="cards">{inside}</dl>' if items else ""


def table(name: str, columns: Sequence[Cell | str], rows: Sequence[Sequence[Cell | str]]) -> str:
    """A table that scrolls sideways by itself, by keys too; the first column heads its rows."""
    head = f"<thead><tr>{''.join(_cell(cell, 'col') for cell in columns)}</tr></thead>" if columns else ""
    body = "".join(f"<tr>{_cell(row[0], 'row')}{''.join(map(_cell, row[1:]))}</tr>" for row in rows)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escaped(name)}">'
        f"<table>{head}<tbody>{body}</tbody></table></div>"
    )


def figures(plots: Sequence[Plot]) -> str:
    """Plots side by side, each with its numbers below."""
    inside = "".join(
        f"<figure><h3>{escaped(plot.title)}</h3>{plot.svg}"
        f"{f'<figcaption>{escaped(plot.note)}</figcaption>' if plot.note else ''}"
        f"{details('Numbers', table(plot.title, _as_numbers(plot.columns), [_as_numbers(row) for row in plot.rows]))}"
        "</figure>"
        for plot in plots
    )
    return f'<div class="plots">{inside}</div>' if plots else ""


def details(summary: str, *parts: str, small: str = "") -> str:
    """Something that opens when it is asked for."""
    behind = f' <span class="interval">{escaped(small)}</span>' if small else ""
    return f"<details><summary>{escaped(summary)}{behind}</summary>{''.join(parts)}</details>"


def listed(texts: Sequence[str]) -> str:
    """A list of texts."""
    return f"<ul>{''.join(f'<li>{escaped(text)}</li>' for text in texts)}</ul>"


def check_plots_folder(folder: str, names: Sequence[str]) -> None:
    """Find before any work that plots cannot be written there.

    Raises:
        InputError: as `check_output`, or a file has the name of a plot and is none of ours.
    """
    place = check_output(folder, is_folder=True)
    wanted = {f"{name}.svg" for name in names}
    for child in place.children():
        if child.name in wanted and not _is_ours(child):
            raise InputError(
                f"plots {folder!r} holds a {child.name!r} that raytower has not drawn, and which would be lost; name "
                "another folder, or remove it"
            )


def write_plots(folder: Location, plots: Sequence[Plot]) -> None:
    """A file `<name>.svg` each."""
    for plot in plots:
        (folder / f"{plot.name}.svg").write_bytes(svg_file(plot))


def _is_ours(place: Location) -> bool:
    if not place.is_file():
        return False
    with place.open_read() as stream:
        return _OURS in stream.read(_FIRST_BYTES)


def _cell(cell: Cell | str, scope: str = "") -> str:
    text, kind, small = cell if isinstance(cell, Cell) else Cell(cell)
    scope = scope if text != "" or small else ""  # a heading without a text heads nothing
    tag = "th" if scope else "td"
    behind = f' <span class="interval">{escaped(small)}</span>' if small else ""
    scoped = f' scope="{scope}"' if scope else ""
    return f"<{tag}{scoped}{f' class={kind!r}' if kind else ''}>{escaped(text)}{behind}</{tag}>"


def _as_numbers(cells: Sequence[str]) -> list[Cell | str]:
    return [cells[0], *(Cell(text, "number") for text in cells[1:])]
