"""Plots are well-formed SVG whose coordinates are those of their values; texts in them are texts."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from raytower.errors import InputError
from raytower.pages.html import Cell, check_plots_folder, details, figures, page, section, table, write_plots
from raytower.pages.plots import (
    WIDTH,
    Axis,
    Line,
    Plot,
    Point,
    Row,
    histogram,
    line_plot,
    matrix,
    row_plot,
    svg_file,
)
from raytower.pages.texts import escaped, fitted, text_width
from raytower.storage import Location
from tests.support.report_cases import HOSTILE

SVG = "{http://www.w3.org/2000/svg}"
LINES = [
    Line(HOSTILE, [Point(1, 0.25, 0.2, 0.3), Point(10, 0.5, 0.4, 0.6), Point(100, 1.0, 0.9, 1.0)]),
    Line("second", [Point(1, 0.0), Point(100, 0.5)]),
]


def _parsed(plot: Plot) -> ElementTree.Element:
    return ElementTree.fromstring(svg_file(plot).decode())


def _dots(plot: Plot) -> list[tuple[float, float]]:
    return [
        (float(dot.get("cx", "")), float(dot.get("cy", ""))) for dot in _parsed(plot).iter(f"{SVG}circle")
    ]


def test_a_line_goes_through_its_values() -> None:
    plot = line_plot(
        "lines", "A title", LINES, Axis("k", is_log=True, ticks=[1, 10, 100]), Axis("recall", bounds=(0, 1))
    )
    dots = _dots(plot)
    left, middle, right = (x for x, _ in dots[:3])
    # 10 lies halfway between 1 and 100 by logarithm.
    assert middle == pytest.approx((left + right) / 2, abs=0.1)
    quarter, half, whole, none, half_again = (y for _, y in dots)
    assert half == pytest.approx((whole + none) / 2, abs=0.1)
    assert quarter == pytest.approx(none + (whole - none) / 4, abs=0.1)
    assert half_again == half
    assert 0 < left < right < WIDTH
    assert plot.rows[0][1:] == ("1", "0.2500", "0.2000 to 0.3000")
    assert plot.rows[3] == ("second", "1", "0.0000", "")


def test_rows_lie_on_one_scale() -> None:
    rows = [Row("a", -0.5, -1.0, 0.0, 3), Row("b", 0.5, 0.0, 1.0, 4)]
    plot = row_plot("rows", "title", rows, "difference", zero=True)
    zero = next(line for line in _parsed(plot).iter(f"{SVG}line") if line.get("class") == "guide")
    (first, _), (second, _) = _dots(plot)
    assert float(zero.get("x1", "")) == pytest.approx((first + second) / 2, abs=0.1)
    assert plot.rows == [("a", "-0.5000", "-1.0000 to 0.0000", "3"), ("b", "0.5000", "0.0000 to 1.0000", "4")]


def test_a_histogram_shows_shares_and_tells_counts() -> None:
    plot = histogram("scores", "title", [0, 1, 2], [("few", [1, 1]), ("many", [300, 100])], "score")
    text = svg_file(plot).decode()
    assert "few: 2" in text
    assert "many: 400" in text
    assert plot.rows == [("0 to 1", "1", "300"), ("1 to 2", "1", "100")]
    # The highest bin of `many` is .75, of `few` .5: two thirds of its height above the axis.
    paths = [
        path.get("d", "") for path in _parsed(plot).iter(f"{SVG}path") if "line" in path.get("class", "")
    ]
    heights = [[float(y) for y in re.findall(r" (\S+?)[LZ]?(?=L|$)", path)] for path in paths]
    few, many = (max(ys) - min(ys) for ys in heights)
    assert few / many == pytest.approx(2 / 3, abs=0.01)


def test_a_matrix_shades_by_the_share_of_a_row() -> None:
    plot = matrix("m", "title", ["a", HOSTILE], [[3, 1], [0, 0]])
    opacity = [
        float(box.get("fill-opacity", ""))
        for box in _parsed(plot).iter(f"{SVG}rect")
        if box.get("fill-opacity")
    ]
    assert opacity == pytest.approx([0.08 + 0.62 * 0.75, 0.08 + 0.62 * 0.25], abs=0.01)
    assert plot.rows[0] == ("a", "3", "1")


@pytest.mark.parametrize(
    "plot",
    [
        line_plot("a", HOSTILE, LINES, Axis(HOSTILE, is_log=True), Axis(HOSTILE)),
        line_plot("one", "x", [Line("x", [Point(3, 0.5, 0.4, 0.6, HOSTILE)])], Axis("x"), Axis("y")),
        histogram("b", HOSTILE, [0, 1], [(HOSTILE, [0]), ("none", [0])], HOSTILE),
        row_plot("c", HOSTILE, [Row(HOSTILE, 1.0, 1.0, 1.0)], HOSTILE, legend=[HOSTILE, "b"]),
        matrix("d", HOSTILE, [HOSTILE], [[1]]),
    ],
    ids=lambda plot: plot.name,
)
def test_texts_in_plots_are_texts(plot: Plot) -> None:
    parsed = _parsed(plot)
    assert {part.tag.removeprefix(SVG) for part in parsed.iter()} <= {
        *("svg", "title", "style", "rect", "line", "path", "circle", "text")
    }
    assert "nan" not in svg_file(plot).decode().lower().replace("name", "")
    inline = figures([plot])
    assert "<script" not in inline
    assert "\x00" not in inline
    assert "\u202e" not in inline


def test_texts_are_cut_and_escaped() -> None:
    assert escaped("<&\"'>") == "&lt;&amp;&quot;&#x27;&gt;"
    assert escaped("abcdef", 5) == "abc …"
    assert escaped({"a": None}) == "{&quot;a&quot;: null}"
    assert escaped("a\x00\ud800\u202eb\tc\n") == "a\ufffd\ufffd\ufffdb\tc\n"
    assert fitted("汽车保险", 1000) == "汽车保险"
    assert text_width(fitted("汽车保险怎么赔付", 60)) <= 60
    assert fitted("汽车保险怎么赔付", 60).endswith("…")


def test_parts_of_a_page() -> None:
    shown = page(
        "t", HOSTILE, HOSTILE, [section(HOSTILE, details(HOSTILE, table("n", ("a",), [[Cell(HOSTILE)]])))]
    )
    assert "<script" not in shown
    assert "default-src 'none'" in shown
    assert section("nothing", "") == ""
    assert figures([]) == ""


def test_plots_of_others_are_not_lost(tmp_path: Path) -> None:
    plot = row_plot("rows", "title", [Row("a", 1.0, 0.5, 1.5)], "x")
    check_plots_folder(str(tmp_path / "new"), ["rows"])
    write_plots(Location.of(tmp_path / "new"), [plot])
    check_plots_folder(str(tmp_path / "new"), ["rows"])
    (tmp_path / "new" / "notes.txt").touch()
    check_plots_folder(str(tmp_path / "new"), ["rows"])
    (tmp_path / "new" / "rows.svg").write_text("<svg>mine</svg>")
    with pytest.raises(InputError, match=r"holds a 'rows.svg' that raytower has not drawn"):
        check_plots_folder(str(tmp_path / "new"), ["rows"])
