"""Plots as SVG: lines with intervals, histograms, rows with intervals, a matrix.

They are written here and not by a plotting library. matplotlib writes colours and glyphs into each SVG, so that its
plots are light on a dark page, can be neither selected nor read aloud, and bring 40 MB of packages; other libraries
draw by scripts, which a page that holds strangers' texts does without. Colours here are classes, which `style.STYLE`
gives, for light and dark.

Coordinates are in units of the viewBox, WIDTH of them from left to right.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from raytower.pages.style import PLOT_STYLE
from raytower.pages.texts import escaped, fitted, text_width

WIDTH = 440
_HEIGHT = 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 14, 10, 40
_LEGEND_ROW = 20
_ROW = 30
_COLOURS = 6
MOST_IN_MATRIX = 12
_NAMES = 132
# Narrow screens take larger letters; see `style`.
_WIDEST_FONT = 14

# x or y of a value.
Scale = Callable[[float], float]


@dataclass(frozen=True)
class Plot:
    """A plot, and its numbers for who cannot see it: `rows` under `columns`."""

    name: str
    """Of its file, without an ending."""
    title: str
    svg: str
    """The svg element; `svg_file` makes a file of it."""
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    """A sentence below it."""


@dataclass(frozen=True)
class Point:
    """A point of a line; `low` and `high` bound its interval."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    label: str = ""
    """Said beside it."""


@dataclass(frozen=True)
class Line:
    """Points from left to right."""

    name: str
    points: Sequence[Point]


@dataclass(frozen=True)
class Axis:
    """A way of going through an axis; `ticks` None takes round numbers."""

    label: str
    is_log: bool = False
    ticks: Sequence[float] | None = None
    bounds: tuple[float, float] | None = None


@dataclass(frozen=True)
class Row:
    """A row of `row_plot`."""

    name: str
    value: float
    low: float
    high: float
    count: int | None = None
    colour: int = 0
    """Place of its name in the legend."""
    label: str | None = None
    """Said at its left; None is the name."""


@dataclass
class _Drawing:
    height: float
    parts: list[str] = field(default_factory=list)

    def line(self, x1: float, y1: float, x2: float, y2: float, kind: str) -> None:
        self.parts.append(f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>')

    def text(self, x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> None:
        self.parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{escaped(text)}</text>'
        )

    def path(self, points: Sequence[tuple[float, float]], kind: str, end: str = "") -> None:
        steps = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        self.parts.append(f'<path d="M{steps}{end}" class="{kind}"/>')

    def dot(self, x: float, y: float, kind: str, said: str, radius: float = 3.5) -> None:
        self.parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" class="{kind}"><title>{escaped(said)}</title></circle>'
        )

    def box(self, x: float, y: float, width: float, height: float, kind: str, more: str = "") -> None:
        self.parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" class="{kind}"{more}/>'
        )

    def svg(self, title: str) -> str:
        return (
            f'<svg viewBox="0 0 {WIDTH} {self.height:.0f}" class="plot" role="img" aria-label="{escaped(title)}">'
            f"{''.join(self.parts)}</svg>"
        )


def svg_file(plot: Plot) -> bytes:
    """A file of its own with the style inside, light or dark as the viewer is."""
    opened = plot.svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" width="880" ', 1)
    head, _, rest = opened.partition(">")
    background = '<rect width="100%" height="100%" class="ground"/>'
    return (
        f"{head}><title>{escaped(plot.title)}</title><style>{PLOT_STYLE}</style>{background}{rest}\n".encode()
    )


def line_plot(
    name: str, title: str, lines: Sequence[Line], x: Axis, y: Axis, *, diagonal: bool = False, note: str = ""
) -> Plot:
    """Lines over one another, each with a band where its points have intervals; `diagonal` draws y = x."""
    legend = _legend_rows([line.name for line in lines]) if len(lines) > 1 else []
    top = _TOP + _LEGEND_ROW * len(legend)
    drawing = _Drawing(_HEIGHT + _LEGEND_ROW * len(legend))
    bottom = drawing.height - _BOTTOM
    _draw_legend(drawing, legend)
    points = [point for line in lines for point in line.points]
    x_scale, x_ticks = _scaled(x, [point.x for point in points], _LEFT, WIDTH - _RIGHT)
    heights = [value for point in points for value in (point.y, point.low, point.high) if value is not None]
    y_scale, y_ticks = _scaled(y, heights, bottom, top)
    _draw_axes(drawing, top, bottom, (x.label, x_scale, x_ticks), (y.label, y_scale, y_ticks))
    if diagonal:
        drawing.line(x_scale(0), y_scale(0), x_scale(1), y_scale(1), "guide")
    for number, line in enumerate(lines):
        colour = number % _COLOURS + 1
        band = [point for point in line.points if point.low is not None and point.high is not None]
        if len(band) > 1:
            upper = [(x_scale(point.x), y_scale(point.high or 0.0)) for point in band]
            lower = [(x_scale(point.x), y_scale(point.low or 0.0)) for point in reversed(band)]
            drawing.path([*upper, *lower], f"band c{colour}", "Z")
        elif band:
            at = x_scale(band[0].x)
            drawing.line(at, y_scale(band[0].low or 0.0), at, y_scale(band[0].high or 0.0), f"line c{colour}")
        drawing.path([(x_scale(point.x), y_scale(point.y)) for point in line.points], f"line c{colour}")
        for point in line.points:
            said = f"{point.label or line.name}: {_number(point.x)}, {point.y:.4f}"
            drawing.dot(x_scale(point.x), y_scale(point.y), f"dot c{colour}", said)
            if point.label:
                _draw_label(drawing, x_scale(point.x), y_scale(point.y), point.label)
    rows = [
        (point.label or line.name, _number(point.x), f"{point.y:.4f}", _interval(point.low, point.high))
        for line in lines
        for point in line.points
    ]
    # Where no point has an interval, neither has the table.
    shown = 4 if any(row[3] for row in rows) else 3
    columns = ("", x.label, y.label, "95 % interval")[:shown]
    return Plot(name, title, drawing.svg(title), columns, [row[:shown] for row in rows], note)


def histogram(
    name: str,
    title: str,
    edges: Sequence[float],
    groups: Sequence[tuple[str, Sequence[int]]],
    label: str,
    note: str = "",
) -> Plot:
    """How each group's values lie over the same bins, as shares of the group, so that a rare group is seen too.

    Args:
        edges: of the bins, one more than there are.
        groups: name and how many values each bin has.
    """
    names = [f"{group}: {sum(counts):,}" for group, counts in groups]
    legend = _legend_rows(names)
    top = _TOP + _LEGEND_ROW * len(legend)
    drawing = _Drawing(_HEIGHT + _LEGEND_ROW * len(legend))
    bottom = drawing.height - _BOTTOM
    _draw_legend(drawing, legend)
    shares = [[count / max(sum(counts), 1) for count in counts] for _, counts in groups]
    x_scale, x_ticks = _scaled(Axis(label, bounds=(edges[0], edges[-1])), [], _LEFT, WIDTH - _RIGHT)
    highest = max((share for each in shares for share in each), default=0.0) or 1.0
    y_scale, y_ticks = _scaled(Axis("share of the group", bounds=(0, highest * 1.05)), [], bottom, top)
    _draw_axes(drawing, top, bottom, (label, x_scale, x_ticks), ("share of the group", y_scale, y_ticks))
    for number, each in enumerate(shares):
        outline = [(x_scale(edges[0]), y_scale(0))]
        for left, right, share in zip(edges[:-1], edges[1:], each, strict=True):
            outline += [(x_scale(left), y_scale(share)), (x_scale(right), y_scale(share))]
        outline.append((x_scale(edges[-1]), y_scale(0)))
        drawing.path(outline, f"band c{number % _COLOURS + 1}", "Z")
        drawing.path(outline, f"line c{number % _COLOURS + 1}")
    rows = [
        (f"{_number(left)} to {_number(right)}", *(f"{counts[place]:,}" for _, counts in groups))
        for place, (left, right) in enumerate(itertools.pairwise(edges))
        if any(counts[place] for _, counts in groups)
    ]
    return Plot(name, title, drawing.svg(title), (label, *(group for group, _ in groups)), rows, note)


def row_plot(
    name: str,
    title: str,
    rows: Sequence[Row],
    label: str,
    *,
    zero: bool = False,
    legend: Sequence[str] = (),
    note: str = "",
) -> Plot:
    """A row each: its name, its value with the interval. `zero` marks 0, for differences."""
    names = _legend_rows(legend)
    top = _TOP + _LEGEND_ROW * len(names)
    drawing = _Drawing(top + _ROW * len(rows) + _BOTTOM)
    _draw_legend(drawing, names)
    bottom = drawing.height - _BOTTOM
    left, right = _NAMES + 14, WIDTH - 66
    values = [value for row in rows for value in (row.low, row.high, row.value)]
    scale, ticks = _scaled(Axis(label), [*values, 0.0] if zero else values, left, right)
    for tick in ticks:
        drawing.line(scale(tick), top, scale(tick), bottom, "grid")
    _draw_ticks(drawing, bottom + 16, scale, ticks)
    drawing.text((left + right) / 2, drawing.height - 6, label, "name", "middle")
    if zero:
        drawing.line(scale(0), top, scale(0), bottom, "guide")
    for place, row in enumerate(rows):
        y, colour = top + _ROW * (place + 0.5), row.colour % _COLOURS + 1
        shown = row.name if row.label is None else row.label
        drawing.text(_NAMES, y + 4, fitted(shown, _NAMES - 4, _WIDEST_FONT), "label", "end")
        drawing.line(scale(row.low), y, scale(row.high), y, f"bar c{colour}")
        drawing.dot(scale(row.value), y, f"dot c{colour}", f"{row.name}: {row.value:.4f}", 4.5)
        drawing.text(WIDTH - 4, y + 4, f"{row.value:+.4f}" if zero else f"{row.value:.4f}", "label", "end")
    is_counted = all(row.count is not None for row in rows)
    table = [
        (
            row.name,
            f"{row.value:.4f}",
            _interval(row.low, row.high),
            *([f"{row.count:,}"] if is_counted else []),
        )
        for row in rows
    ]
    columns = ("", label, "95 % interval", *(["number"] if is_counted else []))
    return Plot(name, title, drawing.svg(title), columns, table, note)


def matrix(
    name: str, title: str, names: Sequence[str], counts: Sequence[Sequence[int]], note: str = ""
) -> Plot:
    """What was expected (rows) and given (columns, by the number of their row); shades are shares of a row."""
    size = (WIDTH - _NAMES - 28 - _RIGHT) / max(len(names), 1)
    top = 40
    drawing = _Drawing(top + size * len(names) + 12)
    drawing.text(_NAMES + 24, 14, "given, by number", "name")
    drawing.text(_NAMES, 14, "expected", "name", "end")
    for row, (label, line) in enumerate(zip(names, counts, strict=True)):
        y = top + size * row
        drawing.text(_NAMES, y + size / 2 + 4, fitted(label, _NAMES - 4, _WIDEST_FONT), "label", "end")
        drawing.text(_NAMES + 20, y + size / 2 + 4, str(row + 1), "tick", "end")
        drawing.text(_NAMES + 28 + size * (row + 0.5), top - 6, str(row + 1), "tick", "middle")
        total = sum(line)
        for column, count in enumerate(line):
            share = count / total if total else 0.0
            x = _NAMES + 28 + size * column
            kind = "cell c5" if row == column else "cell c2"
            drawing.box(x, y, size - 1.5, size - 1.5, "empty")
            if count:
                drawing.box(x, y, size - 1.5, size - 1.5, kind, f' fill-opacity="{0.08 + 0.62 * share:.2f}"')
                if text_width(f"{count}", 10) < size:
                    drawing.text(x + size / 2 - 0.75, y + size / 2 + 3.5, f"{count}", "count", "middle")
    rows = [(label, *(f"{count:,}" for count in line)) for label, line in zip(names, counts, strict=True)]
    return Plot(name, title, drawing.svg(title), ("expected \\ given", *names), rows, note)


# --- parts ---------------------------------------------------------------------------------------------------------


def _scaled(axis: Axis, values: Sequence[float], start: float, end: float) -> tuple[Scale, list[float]]:
    """Where a value lies between two coordinates, and the ticks."""
    low, high = axis.bounds or (min(values), max(values))
    if axis.bounds is None and not axis.is_log:
        margin = (high - low) * 0.06 or abs(high) * 0.1 or 0.1
        low, high = low - margin, high + margin
    if high <= low:
        low, high = (low / 2, high * 2) if axis.is_log else (low - 0.5, high + 0.5)
    ticks = list(axis.ticks) if axis.ticks is not None else _round_ticks(low, high)
    if axis.is_log:
        span = math.log(high / low)
        return lambda value: start + (end - start) * math.log(value / low) / span, ticks
    return lambda value: start + (end - start) * (value - low) / (high - low), ticks


def _round_ticks(low: float, high: float) -> list[float]:
    """Four to eight round numbers between two."""
    power = 10.0 ** math.floor(math.log10((high - low) / 4))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if (high - low) / (power * factor) <= 7)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def _draw_axes(
    drawing: _Drawing,
    top: float,
    bottom: float,
    x: tuple[str, Scale, Sequence[float]],
    y: tuple[str, Scale, Sequence[float]],
) -> None:
    x_label, x_scale, x_ticks = x
    y_label, y_scale, y_ticks = y
    for tick in y_ticks:
        drawing.line(_LEFT, y_scale(tick), WIDTH - _RIGHT, y_scale(tick), "grid")
        drawing.text(_LEFT - 6, y_scale(tick) + 4, _number(tick), "tick", "end")
    for tick in x_ticks:
        drawing.line(x_scale(tick), bottom, x_scale(tick), bottom + 4, "axis")
    _draw_ticks(drawing, bottom + 17, x_scale, x_ticks)
    drawing.line(_LEFT, bottom, WIDTH - _RIGHT, bottom, "axis")
    drawing.text((_LEFT + WIDTH - _RIGHT) / 2, drawing.height - 6, x_label, "name", "middle")
    middle = (top + bottom) / 2
    drawing.parts.append(
        f'<text x="11" y="{middle:.1f}" class="name" text-anchor="middle" transform="rotate(-90 11 {middle:.1f})">'
        f"{escaped(y_label)}</text>"
    )


def _draw_ticks(drawing: _Drawing, y: float, scale: Scale, ticks: Sequence[float]) -> None:
    """The numbers below an axis, but for those that would touch the one before."""
    taken = -math.inf
    for tick in ticks:
        at, half = scale(tick), text_width(_number(tick), _WIDEST_FONT) / 2
        if at - half > taken + 4:
            drawing.text(at, y, _number(tick), "tick", "middle")
            taken = at + half


def _legend_rows(names: Sequence[str]) -> list[list[tuple[int, float, str]]]:
    """Number, x and text of each name, in rows that fit."""
    rows: list[list[tuple[int, float, str]]] = []
    x = math.inf
    for number, name in enumerate(names):
        shown = fitted(name, WIDTH - _LEFT - 40, _WIDEST_FONT)
        width = text_width(shown, _WIDEST_FONT) + 36
        if x + width > WIDTH - _RIGHT:
            rows.append([])
            x = _LEFT
        rows[-1].append((number, x, shown))
        x += width
    return rows


def _draw_legend(drawing: _Drawing, rows: Sequence[Sequence[tuple[int, float, str]]]) -> None:
    for place, row in enumerate(rows):
        y = 12 + _LEGEND_ROW * place
        for number, x, name in row:
            drawing.line(x, y, x + 16, y, f"line c{number % _COLOURS + 1}")
            drawing.text(x + 22, y + 4, name, "label")


def _draw_label(drawing: _Drawing, x: float, y: float, label: str) -> None:
    """Beside a point, on the side where there is more room; below, where a rising line leaves some."""
    y += 17 if y < drawing.height - _BOTTOM - 24 else -8
    if x > (WIDTH + _LEFT) / 2:
        drawing.text(x - 6, y, fitted(label, x - _LEFT - 8), "label", "end")
    else:
        drawing.text(x + 6, y, fitted(label, WIDTH - x - 12), "label")


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value + 0.0:.3g}"


def _interval(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"{low:.4f} to {high:.4f}"
